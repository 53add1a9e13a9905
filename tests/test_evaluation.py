"""Evaluation shared by ranks, the baselines it is held against, and the learning criteria."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import recipe
from PIL import Image

import engine
from engine import baselines, checkpoint, training
from engine.config import TrainConfig
from engine.data.files import Item
from engine.data.index import find_indexes
from engine.data.pipeline import PicturePipeline, plain
from engine.data.sampler import make_streams
from engine.errors import InputError
from engine.evaluation import BASELINES, BATCH, Evaluation, _has_test, _one_thread_each, measurable
from engine.model.instruction import build_tokenizer, tokenize
from engine.protocols import PROTOCOLS
from engine.results import print_check
from engine.runtime import Runtime
from engine.tasks import TASKS

TESTED = ("--quick", "--dataset", "market1501,cuhk_pedes,cocas", "--baselines")


@pytest.fixture(scope="module")
def untrained(mini, tmp_path_factory) -> Path:
    """A checkpoint folder of the tiny model with its initial weights, but open gates: instructions matter."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("untrained")
    indexes = find_indexes(mini)
    streams = make_streams(indexes, tuple(TASKS))
    tokenizer = build_tokenizer(training._corpus(indexes))
    config = TrainConfig(data=str(mini))
    model = training.build_model(config, streams, tokenizer)
    torch.nn.init.constant_(model.edit.gates, 0.5)
    heads = training._heads(streams)
    state = checkpoint.State(0, 1, heads, [stream.name for stream in streams], tokenizer.get_vocab_size())
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json())
    (folder / "state.json").write_text(json.dumps(state.__dict__))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("evaluation")
def test_metrics_do_not_depend_on_the_number_of_ranks(untrained, mini, tmp_path):
    """The whole file: sentences, clothes pictures, descriptions and re-scored texts, over blocks with a short tail."""
    command = ["recipes/evaluate.py", "--checkpoint", untrained, "--data", mini, *TESTED, "--save-features"]
    for ranks in (0, 2, 3):  # 0: told no rank
        arguments = [*command, "--output", tmp_path / str(ranks)]
        done = recipe(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("mean mAP over tasks") == 1
        written = ["features.npz", "metrics.json", "retrieval.html"]
        assert sorted(path.name for path in (tmp_path / str(ranks)).iterdir()) == written
    texts = [(tmp_path / str(ranks) / "metrics.json").read_text() for ranks in (0, 2, 3)]
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]
    metrics = json.loads(texts[0])["tasks"]
    assert {task: set(rows) for task, rows in metrics.items()} == {
        "trad": {"market1501"},
        "ctcc": {"real2", "real2:pid_clothes"},
        "t2i": {"cuhk_pedes", "cuhk_pedes:cosine"},
        "li": {"real2", "real2:pid_clothes"},
    }
    stored = [np.load(tmp_path / str(ranks) / "features.npz") for ranks in (0, 2, 3)]
    for name in stored[0].files:
        assert np.array_equal(stored[1][name], stored[0][name]), name
        assert np.array_equal(stored[2][name], stored[0][name]), name
    counts = [stored[0][f"{name}/features"].shape[1] for name in ("trad/market1501", "t2i/cuhk_pedes", "li/cocas")]
    assert min(counts) < BATCH < max(counts)  # fewer blocks than ranks; and several
    assert all(count % BATCH for count in counts)
    for task, rows in metrics.items():
        for row in rows.values():
            known = {name for name in BASELINES if row[name] is not None}
            expected = {"trad": set(BASELINES[:2]), "t2i": set()}.get(task, set(BASELINES))
            assert known == expected


@pytest.mark.xdist_group("evaluation")
def test_a_damaged_test_image_ends_both_ranks_with_one_line(untrained, mini, tmp_path):
    shutil.copytree(mini / "Market-1501-v15.09.15", tmp_path / "data" / "Market-1501-v15.09.15")
    rows = find_indexes(tmp_path / "data")[0]
    test = rows.select("query", "gallery")
    image = rows.path(test[BATCH + 1])  # in the second block: rank 1 alone meets it
    image.write_bytes(image.read_bytes()[:100])
    done = recipe(
        "recipes/evaluate.py", "--checkpoint", untrained, "--data", tmp_path / "data", "--quick", "--output",
        tmp_path / "out", ranks=2,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    [error] = errors
    assert error.startswith(f"error: {image}: test image cannot be decoded (")
    assert error.endswith("replace the file, or measure without it: --allow-missing")
    assert "Traceback" not in done.stderr + done.stdout
    assert "gloo" not in done.stderr.lower()
    assert not list((tmp_path / "out").iterdir())


def criteria(**changes: float | None) -> dict:
    """metrics.json of a run that passes by a hair; changes: TASK_FIGURE=value."""
    figures = {"random_mAP": 0.05, "untrained_mAP": 0.1, "histogram_mAP": 0.2, "pixel_mAP": 0.2}
    shuffled = {"shuffled_instruction_mAP": 0.21, "shuffled_picture_mAP": 0.21}
    tasks: dict = {}
    for task in TASKS:
        row = {"mAP": 0.29, **figures, **dict.fromkeys(shuffled)}
        if task in ("cc", "vi"):
            row |= {"mAP": 0.2, "histogram_mAP": 0.19, "pixel_mAP": 0.19}
        elif task == "t2i":
            row |= {"histogram_mAP": None, "pixel_mAP": None}
        elif task in ("ctcc", "li"):
            row |= shuffled
        row |= {name.split("_", 1)[1]: value for name, value in changes.items() if name.split("_", 1)[0] == task}
        tasks[task] = {"a": {**row, "mAP": row["mAP"] and row["mAP"] + 0.01}, "b": row}
    return {"tasks": tasks}


@pytest.mark.parametrize(
    ("change", "losses", "line"),
    [
        ({}, None, ""),
        *[({f"{task}_untrained_mAP": 0.13}, None, f"{task:4} gain") for task in TASKS],
        ({"vi_random_mAP": 0.13}, None, "vi   gain"),
        ({"t2i_untrained_mAP": None}, None, "t2i  gain"),
        *[({f"{task}_histogram_mAP": 0.3}, None, "histograms'") for task in ("trad", "cc", "ctcc", "vi", "li")],
        *[({f"{task}_pixel_mAP": 0.3}, None, "pixels'") for task in ("trad", "cc", "ctcc", "vi", "li")],
        ({"trad_pixel_mAP": None}, None, "pixels'"),
        *[({f"{task}_shuffled_instruction_mAP": 0.23}, None, "query's instruction") for task in ("ctcc", "li")],
        *[({f"{task}_shuffled_picture_mAP": 0.23}, None, "query's picture") for task in ("ctcc", "li")],
        ({"li_shuffled_picture_mAP": None}, None, "query's picture"),
        ({}, [3.0, 2.0, 3.0], "loss of trad/a"),
    ],
)
def test_each_learning_criterion_alone_fails_the_check(tmp_path, capsys, change, losses, line):
    log = tmp_path / "log.jsonl"
    rows = [
        {"streams": ["trad/a", "li/b"], "stream_loss": [loss, 2.0 - number]}
        for number, loss in enumerate(losses or [3.0, 2.5, 2.0])
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = print_check(criteria(**change), log)
    said = capsys.readouterr().out.splitlines()
    failed = [text for text in said if "FAIL" in text]
    assert len(said) == 2 + 6 + 10 + 4
    assert all(text.startswith("check: ") for text in said)
    if not line:
        assert (code, failed) == (0, [])
        return
    assert code == 1
    assert len(failed) == 1
    assert line in failed[0]


def person(file: Path, coat: tuple[int, int, int], legs: tuple[int, int, int], light: float = 1.0, shift: int = 0):
    """A person in two colours before grey, half as bright or moved."""
    image = np.full((128, 64, 3), 128.0)
    image[20:70, 20 + shift : 44 + shift] = coat
    image[70:120, 22 + shift : 42 + shift] = legs
    Image.fromarray((image * light).astype(np.uint8)).save(file)


def test_colours_and_pixels_rank_by_clothes_not_by_light(tmp_path):
    red, green, blue = (200, 40, 40), (40, 160, 40), (40, 40, 200)
    person(tmp_path / "query.png", red, blue)
    person(tmp_path / "same.png", red, blue, 0.6, 3)
    person(tmp_path / "swapped.png", blue, red)
    person(tmp_path / "other.png", green, green)
    names = ("query", "same", "swapped", "other")
    for describe in (baselines.histogram, baselines.pixels):
        query, *gallery = (describe(Item(tmp_path / f"{name}.png")) for name in names)
        scores = [float(query @ part) for part in gallery]
        assert float(query @ query) == pytest.approx(1, abs=1e-5)
        assert scores[0] > 0.8 > max(scores[1:])
    person(tmp_path / "same.png", red, blue, 0.95)
    query, *gallery = (
        baselines.histogram(Item(tmp_path / f"{name}.png"), (0.35, 0.2, 0.65, 0.5), clothes=True) for name in names
    )
    assert float(query @ gallery[0]) > 0.5 > float(query @ gallery[1])
    (tmp_path / "damaged.png").write_bytes((tmp_path / "query.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"damaged\.png: test image cannot be decoded"):
        baselines.pixels(Item(tmp_path / "damaged.png"))


def test_every_query_gets_what_another_identity_asks_for(mini):
    index = next(index for index in find_indexes(mini) if index.name == "cocas")
    queries = index.select("query")
    others = baselines.exchange(index, queries, 0)
    assert others is not None
    assert sorted(others) == sorted(queries)
    assert (index.pid[others] != index.pid[queries]).all()
    for row, other in zip(queries, others, strict=True):
        assert index.clothes_picture(row) != index.clothes_picture(other)
        assert index.captions(row)[0] != index.captions(other)[0]
    assert np.array_equal(others, baselines.exchange(index, queries, 0))
    assert not np.array_equal(others, baselines.exchange(index, queries, 1))
    one = queries[index.pid[queries] == index.pid[queries[0]]]
    assert baselines.exchange(index, one, 0) is None


@pytest.mark.parametrize("task", ["ctcc", "li"])
def test_exchanges_change_the_queries_alone(mini, untrained, task):
    """A query with another's instruction is that picture edited by it: as computed by the model itself."""
    model, config, _, tokenizer = checkpoint.load_model(untrained)
    index = next(index for index in find_indexes(mini) if index.name == "cocas")
    protocols = [PROTOCOLS[name] for name in index.dataset.protocols[task]]
    config = config.but(baselines=True, quick=True)
    runtime = Runtime(torch.device("cpu"))
    with _one_thread_each(runtime.device) as threads:
        run = Evaluation(model, TASKS[task], index, protocols, tokenizer, config, runtime, threads)
        plain = Evaluation(
            model, TASKS[task], index, protocols, tokenizer, config.but(baselines=False), runtime, threads
        )
        rows = run.metrics()["real2"]
    assert np.array_equal(run.features.features, plain.features.features)
    queries = index.select("query")
    others = baselines.exchange(index, queries, config.seed)
    for what, picture, instruction in ("instruction", queries, others), ("picture", others, queries):
        found = run.baselines.exchanged[what].of(queries)
        assert np.abs(found - run.features.of(queries)).max(1).min() > 1e-4
        image = model_input(index.path(picture[0]), config.model.image_size)
        if task == "ctcc":
            asked = model.instruction_of_clothes(model_input(index.clothes_picture(instruction[0])[0], (64, 64)))
        else:
            ids, lengths = tokenize(tokenizer, index.captions(instruction[0])[:1], 64)
            asked = model.instruct.of_text(ids, lengths)
        with torch.inference_mode():
            want = model.test_feature(model.features(image, asked), f"{task}/cocas", "cls")[0]
        assert torch.from_numpy(found[0]) @ want > 1 - 1e-5
        assert rows[f"shuffled_{what}_mAP"] != rows["mAP"]


def model_input(path: Path, size: tuple[int, int]) -> torch.Tensor:
    pipeline = PicturePipeline(lambda _: plain([path]), size=size, batch=1, augment=False, device=torch.device("cpu"))
    return pipeline.next()


def test_a_copy_with_captions_behind_the_first_image_is_tested(mini, tmp_path):
    shutil.copytree(mini / "CUHK-PEDES", tmp_path / "CUHK-PEDES")
    file = tmp_path / "CUHK-PEDES" / "reid_raw.json"
    entries = json.loads(file.read_text())
    index = find_indexes(tmp_path)[0]
    first = index.path(index.select("test")[0])
    protocols = [PROTOCOLS["cuhk_pedes"]]
    for keep, expected in ((lambda path: path != first, True), (lambda path: False, False)):
        for entry in entries:
            if entry["split"] == "test" and not keep(tmp_path / "CUHK-PEDES" / "imgs" / entry["file_path"]):
                entry["captions"] = []
        file.write_text(json.dumps(entries))
        index = find_indexes(tmp_path)[0]
        assert not index.captions(index.select("test")[0])
        assert _has_test(TASKS["t2i"], index, protocols) == expected


def test_a_protocol_that_a_copy_cannot_serve_is_left_out(mini, tmp_path):
    """PRCC without same-clothes queries, VC-Clothes without cameras 3 and 4: the other protocols stay."""
    shutil.copytree(mini / "prcc", tmp_path / "prcc")
    for image in (tmp_path / "prcc/rgb/test/B").rglob("*.jpg"):
        image.rename(tmp_path / f"prcc/rgb/test/C/{image.parent.name}/cropped_rgb9{image.stem[-2:]}.jpg")
    shutil.copytree(mini / "VC-Clothes", tmp_path / "VC-Clothes")
    for image in (tmp_path / "VC-Clothes/query").iterdir():
        if image.name.split("-")[1] in "03 04":
            image.unlink()
    shutil.rmtree(tmp_path / "prcc/rgb/test/B")
    (tmp_path / "prcc/rgb/test/B").mkdir()
    config = TrainConfig(data=str(tmp_path), quick=True)
    tested, left_out = measurable(find_indexes(tmp_path, ("vc_clothes",)), config)
    assert [protocol.name for protocol in tested[0][2]] == ["vc_clothes:general", "vc_clothes:sc"]
    assert left_out == {
        "vc_clothes:cc": f"vc_clothes:cc: no query image in {tmp_path}/VC-Clothes; is the copy complete?"
    }
    for image in (tmp_path / "VC-Clothes/query").iterdir():
        image.rename(image.with_name("9" + image.name[1:]))
    with pytest.raises(InputError, match=r"vc_clothes:general, .*VC-Clothes: no query has a positive"):
        measurable(find_indexes(tmp_path, ("vc_clothes",)), config)
    assert measurable(find_indexes(mini, ("synth_pedes",)), config) == ([], {})


def test_figures_of_the_released_evaluator(untrained, mini):
    """Other names; galleries below 500 images have the same figures, but for LLCM's CMC over images."""
    given = {"datasets": ("market1501", "llcm"), "quick": True}
    ours, theirs = (engine.evaluate(untrained, mini, released=released, **given)["tasks"] for released in (False, True))
    assert ours["trad"]["market1501"] == theirs["trad"]["market1501:instruct"]
    assert set(theirs["vi"]) == {f"{name}:instruct" for name in ours["vi"]}
    for name, row in ours["vi"].items():
        assert row["mAP"] == theirs["vi"][f"{name}:instruct"]["mAP"]
    assert any(row["rank5"] > theirs["vi"][f"{name}:instruct"]["rank5"] for name, row in ours["vi"].items())
