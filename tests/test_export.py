"""What leaves the engine computes what evaluation computes: engine.load, exported folders, graphs, a FAISS index."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, SMALL, recipe
from safetensors.torch import load_file, save_file

import engine
import kernels
from engine import checkpoint, export, graphs, training
from engine.config import MODELS, TrainConfig
from engine.data.index import find_indexes
from engine.data.sampler import make_streams
from engine.errors import InputError
from engine.evaluation import Evaluation, _one_thread_each, measurable
from engine.instructions import SENTENCES
from engine.model.instruction import Instruction, build_tokenizer
from engine.model.irm import Features
from engine.model.neck import GlobalBatchNorm
from engine.runtime import Runtime
from engine.tasks import TASKS
from recipes import export as export_recipe
from recipes import options

STREAMS = {"trad": "market1501", "cc": "ltcc", "ctcc": "cocas", "vi": "llcm", "t2i": "cuhk_pedes", "li": "cocas"}
SLOW = pytest.mark.slow


def write_checkpoint(folder: Path, mini: Path, model_config) -> Path:
    """Initial weights but open gates, and statistics as different as those of data sets."""
    indexes = find_indexes(mini)
    streams = make_streams(indexes, tuple(TASKS))
    tokenizer = build_tokenizer(training._corpus(indexes))
    config = TrainConfig(data=str(mini), model=model_config, feature="fout")
    torch.manual_seed(0)
    model = training.build_model(config, streams, tokenizer)
    torch.nn.init.constant_(model.edit.gates, 0.5)
    for norm in model.modules():
        if isinstance(norm, GlobalBatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
    heads = training._heads(streams)
    state = checkpoint.State(0, 1, heads, [stream.name for stream in streams], tokenizer.get_vocab_size())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json())
    (folder / "state.json").write_text(json.dumps(state.__dict__))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def stored(mini, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("stored"), mini, replace(SMALL, embed_norm=True, part_tokens=2))


@pytest.fixture(scope="module")
def onnx_folder(stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export.export(stored, folder, backends=("onnx",))
    return folder


def alike(ours: torch.Tensor, theirs: torch.Tensor, half: bool) -> None:
    """Unit vectors."""
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    if half:
        assert (ours * theirs).sum(-1).min() >= 0.999
    else:
        assert (ours - theirs).abs().max() <= 1e-4
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(ours)))


def texts(count: int, length: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.arange(count) * 3 % length + 1
    lengths[0] = length
    ids = torch.randint(4, vocabulary, (count, length))
    return ids * (torch.arange(length) < lengths[:, None]), lengths


def same_features(checkpoint_folder: Path, exported: Path, backend: str, half: bool = False) -> None:
    """Every task's feature path; one and several images; one instruction for all, and one each, of several lengths
    with padding; a stream of the model and one that it does not know."""
    model, config, state, _ = checkpoint.load_model(checkpoint_folder)
    every = graphs.Graphs(exported, backend)
    torch.manual_seed(1)
    for task, dataset in STREAMS.items():
        for stream, (count, told, length) in zip(
            (f"{task}/{dataset}", f"{task}/{dataset}", f"{task}/unknown", f"{task}/{dataset}"),
            ((1, 1, 5), (2, 1, 16), (5, 5, 9), (7, 7, 1)),
            strict=True,
        ):
            theirs = every.at(stream)
            images = torch.randn(count, 3, *config.model.image_size)
            with torch.inference_mode():
                if TASKS[task].instruction == "clothes":
                    clothes = torch.randn(told, 3, *config.model.clothes_size)
                    asked = model.instruction_of_clothes(clothes), theirs.instruction_of_clothes(clothes)
                else:
                    words = texts(told, length, state.vocabulary)
                    asked = model.instruct.of_text(*words), theirs.instruct.of_text(*words)
                if TASKS[task].instruction == "query":
                    seen = model.features(images, None), theirs.features(images, None)
                    alike(theirs.image_embedding(seen[1], stream), model.image_embedding(seen[0], stream), half)
                    alike(theirs.text_embedding(asked[1], stream), model.text_embedding(asked[0], stream), half)
                    pairs = Instruction(*(part.expand(count, *part.shape[1:]) for part in asked[0]))
                    found = theirs.match_scores(seen[1].tokens, asked[1], stream).softmax(-1)
                    wanted = model.match_scores(seen[0].tokens, pairs, stream).softmax(-1)
                    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 if half else 1e-5)
                    continue
                seen = model.features(images, asked[0]), theirs.features(images, asked[1])
                for kind in ("cls", "fout", "concat"):
                    alike(theirs.test_feature(seen[1], stream, kind), model.test_feature(seen[0], stream, kind), half)
                plain = model.features(images, None), theirs.features(images, None)
                alike(theirs.test_feature(plain[1], stream, "cls"), model.test_feature(plain[0], stream, "cls"), half)


@pytest.mark.xdist_group("onnx")
def test_onnx_computes_every_tasks_features(stored, onnx_folder):
    same_features(stored, onnx_folder, "onnx")


@SLOW
@pytest.mark.parametrize("half", [False, True])
def test_torch_export_and_float16_compute_every_tasks_features(stored, tmp_path, half):
    export.export(stored, tmp_path / "out", backends=tuple(graphs.BACKENDS), half=half)
    for backend in graphs.BACKENDS:
        same_features(stored, tmp_path / "out", backend, half)
        assert json.loads((tmp_path / "out" / backend / "graphs.json").read_text())["weights"] == (
            "float16" if half else "float32"
        )


@SLOW
def test_graphs_of_the_tiny_model(mini, tmp_path):
    """Conv stem shared by both towers, CLS from all patches."""
    folder = write_checkpoint(tmp_path / "tiny", mini, MODELS["irm_tiny"])
    export.export(folder, tmp_path / "out", backends=tuple(graphs.BACKENDS))
    for backend in graphs.BACKENDS:
        same_features(folder, tmp_path / "out", backend)


@pytest.mark.xdist_group("onnx")
def test_a_program_without_this_engine_finds_all_it_needs_in_graphs_json(stored, onnx_folder):
    """A gallery under one sentence, by onnxruntime and what the file says."""
    facts = json.loads((onnx_folder / "onnx" / "graphs.json").read_text())
    results = {}
    model, _, state, tokenizer = checkpoint.load_model(stored)
    ids = np.array([tokenizer.encode(SENTENCES["trad"][0]).ids])
    images = np.random.default_rng(0).normal(size=(3, 3, *facts["images"]["size"])).astype(np.float32)
    given = {"ids": ids, "lengths": np.array([ids.shape[1]]), "images": images}
    given["stream"] = np.array(facts["streams"]["trad/market1501"])
    for name in ("text", "instructed"):
        graph = facts["graphs"][name]
        session = onnxruntime.InferenceSession(onnx_folder / "onnx" / graph["file"], providers=["CPUExecutionProvider"])
        found = session.run(list(graph["outputs"]), {key: given[key] for key in graph["inputs"]})
        results |= dict(zip(graph["outputs"], found, strict=True))
        given |= results
        for described, real in ((graph["inputs"], session.get_inputs()), (graph["outputs"], session.get_outputs())):
            assert [one.name for one in real] == list(described)
            kinds = {"int64": "tensor(int64)", "float32": "tensor(float)"}
            assert [one.type for one in real] == [kinds[row["dtype"]] for row in described.values()]
            assert [len(one.shape) for one in real] == [len(row["shape"]) for row in described.values()]
    with torch.inference_mode():
        told = model.instruct.of_text(torch.from_numpy(ids), torch.tensor([ids.shape[1]]))
        wanted = model.test_feature(model.features(torch.from_numpy(images), told), "trad/market1501", "fout")
    alike(torch.from_numpy(results["fout"]), wanted, half=False)
    assert set(facts["streams"]) == {"", *state.streams}
    assert not any(str(ROOT).encode() in file.read_bytes() for file in (onnx_folder / "onnx").iterdir())
    assert (facts["images"]["channels"], facts["images"]["mean"][0]) == ("RGB", 0.485)


@pytest.mark.parametrize("task", TASKS)
def test_load_gives_evaluations_features(stored, mini, task):
    """With one thread bit for bit; files and tensors alike."""
    extractor = engine.load(stored)
    config = replace(extractor.config, tasks=(task,), quick=True, feature="concat")
    row, index, protocols = measurable(find_indexes(mini, (STREAMS[task],)), config)[0][0]
    runtime = Runtime(torch.device("cpu"))
    with _one_thread_each(runtime.device) as threads:
        run = Evaluation(extractor.model, row, index, protocols, extractor.tokenizer, config, runtime, threads)
    items = [index.item(number) for number in run.rows]
    given: dict = {"dataset": STREAMS[task], "feature": "concat"}
    if row.instruction == "sentence":
        given["text"] = SENTENCES[task][0]
    elif row.instruction == "description":
        given["text"] = [index.captions(number)[0] for number in run.rows]
    elif row.instruction == "clothes":
        given["clothes"], given["clothes_boxes"] = zip(*map(index.clothes_picture, run.rows), strict=True)
    wanted = torch.from_numpy(run.features.features[0])
    many = torch.get_num_threads()
    assert (extractor.images(items, task, **given) - wanted).abs().max() <= 1e-6
    torch.set_num_threads(1)
    try:
        assert torch.equal(extractor.images(items, task, **given), wanted)
        if row.instruction == "query":
            assert torch.equal(extractor.texts(run.captions, dataset=STREAMS[task]), torch.from_numpy(run.texts))
    finally:
        torch.set_num_threads(many)


def test_one_instruction_for_all_is_that_of_each(stored, mini):
    extractor = engine.load(stored)
    index = find_indexes(mini, ("cocas",))[0]
    paths = [str(index.path(row)) for row in index.select("gallery")[:5]]
    for task, name, one in (("trad", "text", "a man"), ("ctcc", "clothes", paths[0]), ("li", "text", "a red coat")):
        single, each = (extractor.images(paths, task, **{name: [one] * count}) for count in (1, 5))
        torch.testing.assert_close(single, each, rtol=0, atol=1e-6)
    first = extractor.images(paths, "trad", text=SENTENCES["trad"][0])
    assert torch.equal(extractor.images(paths, "trad"), first)
    assert torch.equal(extractor.images(paths, "trad", feature="fout"), first)  # as the model's run tested
    assert not torch.allclose(extractor.images(paths, "trad", dataset="market1501"), first, atol=1e-3)
    pixels = torch.randn(3, 3, *SMALL.image_size)
    with torch.inference_mode():
        tokens = extractor.model.edit(pixels)
        wanted = extractor.model.image_embedding(Features(tokens[:, 0], None, None, tokens), "t2i/unknown")
    torch.testing.assert_close(extractor.images(pixels, "t2i"), wanted)


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("other", {}, "expected one of trad"),
        ("ctcc", {}, "takes `clothes`"),
        ("ctcc", {"clothes": [], "text": "a"}, "takes `clothes` and no `text`"),
        ("trad", {"clothes": ["a.jpg"]}, "takes `text` and no `clothes`"),
        ("t2i", {"text": "a man"}, "takes neither"),
        ("li", {}, "a description, or one for each"),
        ("li", {"text": ["a", "b"]}, "expected 1 or 3, as many as images, got 2"),
        ("trad", {"dataset": "market"}, "the model was trained on .*market1501"),
        ("trad", {"feature": "all"}, "expected cls, fout or concat"),
    ],
)
def test_load_says_what_a_task_takes(stored, task, given, message):
    with pytest.raises(InputError, match=message):
        engine.load(stored).images(torch.zeros(3, 3, *SMALL.image_size), task, **given)


def test_load_names_bad_pictures(stored, tmp_path):
    extractor = engine.load(stored)
    (tmp_path / "no.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(InputError, match=r"no\.jpg: "):
        extractor.images([tmp_path / "no.jpg"], "trad")
    with pytest.raises(InputError, match=r"expected float32 \[B, 3, 32, 16\], got"):
        extractor.images(torch.zeros(1, 3, 16, 16), "trad")
    for call in (lambda: extractor.images([], "trad"), lambda: extractor.texts([])):
        with pytest.raises(InputError, match="none given"):
            call()


@pytest.mark.xdist_group("onnx")
def test_an_exported_folder_moves_and_holds_no_classifier(stored, onnx_folder, mini, tmp_path):
    folder = shutil.move(shutil.copytree(onnx_folder, tmp_path / "a"), tmp_path / "elsewhere")
    weights, before = (load_file(Path(path) / "model.safetensors") for path in (folder, stored))
    assert before.keys() - weights.keys() == {name for name in before if ".classify." in name} != set()
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    images = torch.randn(3, 3, *SMALL.image_size)
    for backend, bound in (("torch", 0), ("onnx", 1e-4)):
        both = engine.load(folder, backend=backend), engine.load(stored)
        ours, theirs = (one.images(images, "cc", dataset="ltcc", feature="fout") for one in both)
        assert (ours - theirs).abs().max() <= bound
        ours, theirs = (one.texts(["a man"], dataset="cuhk_pedes") for one in both)
        assert (ours - theirs).abs().max() <= bound


@pytest.mark.xdist_group("onnx")
def test_metrics_of_all_backends_agree(stored, onnx_folder, mini):
    """All tasks; the untrained network of an exported folder is another draw: classifiers come before what follows."""
    given: dict = {"datasets": ("market1501", "cuhk_pedes", "cocas", "llcm"), "quick": True}
    torch_path = engine.evaluate(stored, mini, **given)["tasks"]
    for folder, backend, bound in ((onnx_folder, "torch", 0), (onnx_folder, "onnx", 1e-6)):
        tasks = engine.evaluate(folder, mini, backend=backend, **given)["tasks"]
        assert {task: set(rows) for task, rows in tasks.items()} == {t: set(rows) for t, rows in torch_path.items()}
        for task, rows in torch_path.items():
            for name, row in rows.items():
                for figure in ("mAP", "mINP", "rank1", "rank5"):
                    assert tasks[task][name][figure] == pytest.approx(row[figure], abs=bound), (task, name, figure)
    assert set(torch_path) == {"trad", "ctcc", "vi", "t2i", "li"}


def test_half_weights_are_half_as_large(stored, tmp_path):
    export.export(stored, tmp_path / "whole")
    export.export(stored, tmp_path / "half", half=True)
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert 0.5 <= sum(v.nbytes for v in half.values()) / sum(v.nbytes for v in whole.values()) < 0.6
    images = torch.randn(4, 3, *SMALL.image_size)
    ours, theirs = (engine.load(path).images(images, "vi") for path in (tmp_path / "half", stored))
    assert 0.999 < float((ours * theirs).sum(-1).min()) < 1


def test_nothing_is_left_of_an_export_that_fails(stored, tmp_path, monkeypatch):
    def export_to(name: str = "out") -> None:
        export.export(stored, tmp_path / name, backends=("torch-export",))

    monkeypatch.setattr(graphs, "graphs", lambda config, real=graphs.graphs: {"clothes": real(config)["clothes"]})
    found = graphs.open_graph
    monkeypatch.setattr(graphs, "open_graph", lambda file: lambda *given: [t + 0.01 for t in found(file)(*given)])
    with pytest.raises(InputError, match=r"clothes\.pt2: its tokens differs from torch's by 0\.01; nothing was publ"):
        export_to()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(graphs, "open_graph", found)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(graphs, "_save", full)
        with pytest.raises(InputError, match="No space left"):
            export_to()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".part-out").mkdir()  # of one that was killed
    (tmp_path / ".part-out" / "onnx").touch()
    export_to()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS", "config.json", "model.safetensors", "state.json", "tokenizer.json", "torch-export",
    ]  # fmt: skip
    with pytest.raises(InputError, match="exists already"):
        export_to()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.xdist_group("onnx")
def test_foreign_and_damaged_folders_get_one_line(stored, onnx_folder, tmp_path):
    with pytest.raises(InputError, match=r"no .*graphs\.json; write one by recipes/export\.py --onnx"):
        engine.load(stored, backend="onnx")
    with pytest.raises(InputError, match="no checkpoint there"):
        engine.load(tmp_path)
    copy = shutil.copytree(onnx_folder, tmp_path / "copy")
    for name, content in (
        ("clothes.onnx", (copy / "onnx" / "clothes.onnx").read_bytes()[:1000]),
        ("graphs.json", b"{"),
        ("graphs.json", b"[]"),
        ("graphs.json", b'{"format": 99}'),
    ):
        before = (copy / "onnx" / name).read_bytes()
        (copy / "onnx" / name).write_bytes(content)
        with pytest.raises(InputError, match=r"damaged or of another engine .* export it again"):
            engine.load(copy, backend="onnx")
        (copy / "onnx" / name).write_bytes(before)
    (copy / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged or cut short"):
        engine.load(copy, backend="onnx")


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code of recipes/export.py and its last line."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    code = options.run(export_recipe.main)
    said = capsys.readouterr()
    return code, (said.err or said.out).splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to write"),
        (["--faiss", "f", "--onnx"], "give --output DIR"),
        (["--faiss", "f", "--task", "trad"], "which gallery"),
        (["--output", "o", "--data", "d"], "give --faiss FILE"),
        (["--output", "o", "--wrong"], "--help lists the options"),
        (["--output", "o", "--onnx"], "error: --onnx: onnxscript not installed; pip install onnxscript"),
        (["--faiss", "f", "--dataset", "market1501", "--task", "trad"], "error: --faiss: faiss not installed"),
    ],
)
def test_the_recipes_refusals(stored, mini, tmp_path, monkeypatch, capsys, given, message):
    real = graphs.importlib.util.find_spec
    absent = ("onnxscript", "faiss")
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    monkeypatch.setattr(options, "mini_data", lambda data: None)
    monkeypatch.chdir(tmp_path)
    code, line = call(monkeypatch, capsys, "--checkpoint", stored, *given)
    assert code == 2
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["trad", "t2i"])
def test_a_faiss_index_ranks_as_topk(stored, mini, tmp_path, monkeypatch, capsys, task):
    faiss = pytest.importorskip("faiss")
    file = tmp_path / "new" / "gallery.faiss"
    given = ["--checkpoint", stored, "--faiss", file, "--data", mini, "--dataset", STREAMS[task], "--task", task]
    code, line = call(monkeypatch, capsys, *given, "--device", "cpu")
    assert (code, line.endswith(f"facts in {file}.npz")) == (0, True)
    index, facts = faiss.read_index(str(file)), np.load(f"{file}.npz")
    source = find_indexes(mini, (STREAMS[task],))[0]
    assert index.ntotal == len(facts["id"]) > 5
    assert [str(source.root / path) for path in facts["path"]] == [str(source.path(row)) for row in facts["id"]]
    assert np.array_equal(facts["pid"], source.pid[facts["id"]])
    assert np.array_equal(facts["query_camera"], source.camera[facts["query_id"]])
    gallery = torch.from_numpy(index.index.reconstruct_n(0, index.ntotal))
    scores, places = kernels.topk(torch.from_numpy(facts["query_features"]), gallery, 10)
    found, ids = index.search(facts["query_features"], 10)
    np.testing.assert_allclose(found, scores.numpy(), atol=1e-6)
    ranked = facts["id"][places.numpy()]
    apart = np.abs(np.diff(scores.numpy(), axis=1, prepend=2, append=-2)) > 1e-6  # near ties may change places
    assert np.array_equal(ids[apart[:, :-1] & apart[:, 1:]], ranked[apart[:, :-1] & apart[:, 1:]])
    assert apart.mean() > 0.9
    assert (str(facts["instruction"]) == SENTENCES["trad"][0]) == (task == "trad")
    code, line = call(monkeypatch, capsys, *given)
    assert (code, "exists already" in line) == (2, True)
    code, line = call(monkeypatch, capsys, *given[:3], tmp_path / "f", *given[4:], "--protocol", "none")
    assert (code, "protocols: " in line) == (2, True)


@SLOW
def test_the_recipes_from_end_to_end(stored, mini, tmp_path):
    done = recipe("recipes/export.py", "--checkpoint", stored, "--output", tmp_path / "model", "--onnx")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "onnx/instructed.onnx" in done.stdout
    given = ["--checkpoint", tmp_path / "model", "--data", mini, "--quick", "--dataset", "cuhk_pedes,cocas"]
    for backend in ("torch", "onnx"):
        output = tmp_path / backend
        done = recipe("recipes/evaluate.py", *given, "--backend", backend, "--output", output, "--device", "cpu")
        assert done.returncode == 0, done.stderr[-3000:]
        assert (output / "retrieval.html").stat().st_size > 10_000
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("torch", "onnx"))
    assert ours["mean_mAP"] == pytest.approx(theirs["mean_mAP"], abs=1e-6)
    done = recipe("recipes/evaluate.py", *given, "--backend", "onnx", "--attention", "--output", tmp_path / "no")
    assert done.returncode == 2
    assert "leave one out" in done.stderr
