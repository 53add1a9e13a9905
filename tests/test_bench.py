"""The benchmarks: what they count, that they refuse what is wrong, that no shipped configuration spills."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, recipe
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench import attention, compile_report, measure, starts, triplet
from bench import loader as loader_benchmark
from bench import rank as rank_benchmark
from bench import step as step_benchmark
from bench import topk as topk_benchmark
from bench.compiled import ctas_per_sm
from engine.config import MODELS, TrainConfig
from engine.data import pipeline
from engine.data.record import Batch
from engine.losses import TrainingModel
from engine.model.editing import EditingTransformer
from engine.model.irm import IRM


def test_bytes_and_flops_of_attention_by_hand():
    """B 256, H 12, N 129, M 70, D 64 in 16 bits: q, k, v, out and k', v' once; backward q, k, v, dout, dq, dk, dv."""
    shape = attention.SHAPES["text-256x128"]
    image, instruction, logarithms = 256 * 12 * 129 * 64 * 2, 256 * 12 * 70 * 64 * 2, 2 * 256 * 12 * 129 * 4
    moved, flops = attention.cost("forward", 256, shape, 2)
    assert moved == 4 * image + 2 * instruction + logarithms
    assert flops == 256 * 12 * (129 * 129 + 129 * 70) * 64 * 2 * 2
    assert attention.cost("backward", 256, shape, 2) == (
        7 * image + 4 * instruction + logarithms,
        256 * 12 * (129 * 129 + 129 * 70) * 64 * 2 * 5,
    )
    assert attention.floor_us("forward", 256, shape, 2, 90) == pytest.approx(moved / 3.35e6)
    assert compile_report.attention_padding(shape) == pytest.approx(144 * (144 + 80) / (129 * (129 + 70)))


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [(90, 168, 16384, 4, 3), (90, 169, 0, 4, 2), (90, 255, 0, 8, 1), (90, 32, 100_000, 4, 2), (80, 64, 80_000, 4, 2),
     (90, 16, 0, 8, 8), (90, 16, 240_000, 4, 0)],
)  # fmt: skip
def test_programs_on_a_multiprocessor(arch, registers, shared, warps, programs):
    assert ctas_per_sm(arch, registers, shared, warps) == programs


def test_attention_refuses_to_report_what_is_wrong(monkeypatch):
    arguments = ["attention.py", "--device", "cpu", "--shapes", "demo", "--batch", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setitem(attention.RIVALS, attention.OURS, lambda case: attention.packed(case) * 1.001)
    with pytest.raises(SystemExit, match=r"out errs by .* no figures are reported"):
        attention.main()


def test_attention_leaves_a_wrong_rival_out():
    case = attention.case_of(attention.SHAPES["demo"], 2, torch.float32, torch.device("cpu"))
    shifted = case._replace(gate=case.gate.detach() * 1.01)
    rivals = {"right": attention.separate, "wrong": lambda _: attention.packed(shifted)}
    refused = attention.refusals(case, rivals)
    assert list(refused) == ["wrong"]


def test_attention_from_the_command_line(tmp_path):
    file = tmp_path / "rows.json"
    command = ["bench/attention.py", "--device", "cpu", "--shapes", "demo", "--batch", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--json", file], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "nothing about a GPU" in done.stdout
    result = json.loads(file.read_text())
    assert {"device", "torch", "triton", "commit"} <= set(result)
    timed = [row for row in result["rows"] if "left_out" not in row]
    assert {row["pass"] for row in timed} == {"forward", "backward", "both"}
    assert {"gated_attention_packed", "eager concat", "2x sdpa flash"} <= {row["rival"] for row in timed}
    assert all("us" not in row for row in timed)  # a time in microseconds comes from a GPU


def test_triplet_from_the_command_line(tmp_path):
    file = tmp_path / "rows.json"
    command = ["bench/triplet.py", "--device", "cpu", "--samples", "32", "--rounds", "1", "--json", file]
    done = subprocess.run(
        [sys.executable, *command, "--plot", tmp_path / "plot.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 1000
    timed = [row for row in json.loads(file.read_text())["rows"] if "left_out" not in row]
    assert {row["rival"] for row in timed} == set(triplet.RIVALS)
    assert {row["pass"] for row in timed} == {"forward", "both"}
    assert all("us" not in row for row in timed)


@pytest.mark.parametrize("wrong", ["loop", "all"])
def test_triplet_refuses_to_report_what_is_wrong(wrong, monkeypatch):
    """A rival that is shifted; ours, by the margin, against the sum anchor by anchor."""
    monkeypatch.setattr(sys, "argv", ["triplet.py", "--device", "cpu", "--samples", "32", "--rounds", "1"])
    if wrong == "loop":
        shifted = triplet.RIVALS["loop"]._replace(run=lambda case: triplet.loop(case) * 1.01)
        monkeypatch.setitem(triplet.RIVALS, "loop", shifted)
    else:
        plain = kernels.adaptive_triplet
        monkeypatch.setattr(kernels, "adaptive_triplet", lambda *a, **k: plain(*a, **k | {"margin": 0.31}))
    with pytest.raises(SystemExit, match=r"no figures are reported"):
        triplet.main()


def test_triplet_loop_must_be_the_released_one(monkeypatch):
    plain = triplet.loop
    monkeypatch.setattr(triplet, "loop", lambda case: plain(case._replace(features=case.features * 1.001)))
    with pytest.raises(SystemExit, match="the loop differs from the released code on pk"):
        triplet.check_loop()


@pytest.mark.slow
def test_triplet_memory_grows_with_samples_not_with_their_square():
    """Beyond the gradient: at most 64 MiB at 8192 samples of 768 features, where one matrix would take 256."""
    code = """
import torch
from bench import measure, triplet
case = triplet.case_of(8192, torch.device("cpu"))
peaks = [measure.peak_bytes(lambda: triplet.with_gradient(triplet.ours, case), torch.device("cpu")) for _ in range(2)]
print(min(peaks))  # what the system does with a process's pages meanwhile is counted, too
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) - 8192 * 768 * 4 < 64 << 20


def test_rounds_run_rivals_in_turn():
    order: list[str] = []
    seconds = measure.rounds({name: lambda name=name: order.append(name) for name in "ab"}, torch.device("cpu"), 3)
    assert order == ["a", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert measure.ratios({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "b") == {"a": 2.0, "b": 1.0}


@pytest.mark.slow
def test_no_shipped_configuration_spills():
    rows = compile_report.report()
    assert compile_report.faults(rows) == []
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        assert set(compile_report.COLUMNS) <= set(row)
        assert row["ctas_per_sm"] >= 1
        assert (row["tensor_core"] == "none") == (row["dtype"] not in ("bf16", "fp16"))
        if row["dtype"] == "bf16" and row["shape"].endswith("D 64"):
            assert row["ctas_per_sm"] >= 2
            assert row["padding"] <= 1.4


@pytest.mark.slow
def test_no_kernel_of_csrc_spills():
    rows = compile_report.csrc_rows()
    if not rows:
        pytest.skip("no CUDA toolkit")
    assert compile_report.faults(rows) == []
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for name in ("tile_kernel", "finish_kernel", "score_kernel", "norms_kernel", "count_kernel", "group_kernel"):
        assert any(name in row["kernel"] for row in rows)


def test_faults_are_found():
    good = {"kernel": "k", "arch": "sm_90", "spills": 0, "shared": 1000}
    assert compile_report.faults([good]) == []
    bad = [good | {"spills": 8}, good | {"shared": 300_000}, {"kernel": "k", "arch": "sm_90", "error": "no"}]
    assert len(compile_report.faults(bad)) == 3


def test_search_benchmark(tmp_path):
    command = ["bench/topk.py", "--cases", "few", "--queries", "8", "--gallery", "3000", "--k", "5", "--rounds", "1"]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["rival"] for row in rows] == list(topk_benchmark.RIVALS)
    assert all(row["seconds"] > 0 and row["gallery"] == 3000 for row in rows)


def test_search_benchmark_of_stored_features(tmp_path):
    rows = np.random.default_rng(0).normal(size=(1, 40, 6)).astype(np.float32)
    query, gallery = np.arange(5), np.arange(9, 40)
    places = {"query": query, "gallery": gallery}
    np.savez(
        tmp_path / "features.npz",
        **{"trad/one/features": rows, "t2i/two/features": rows, "t2i/two/text_features": rows[0]},
        **{f"{name}/0/{part}": order for name in ("trad/one", "t2i/two") for part, order in places.items()},
    )
    ((name, queries, others),) = topk_benchmark.stored(tmp_path / "features.npz", torch.device("cpu"))
    assert name == "trad/one"
    length = np.linalg.norm(rows[0], axis=1, keepdims=True)
    np.testing.assert_allclose(queries.numpy(), (rows[0] / length)[query], atol=1e-6)
    np.testing.assert_allclose(others.numpy(), (rows[0] / length)[gallery], atol=1e-6)


def test_what_the_leading_directions_hold():
    rows = torch.eye(16) * torch.tensor([3.0, 2.0] + [1.0] * 14)
    assert topk_benchmark.held(rows) == pytest.approx(13 / 27)


def test_search_benchmark_notices_other_rows():
    queries, gallery = topk_benchmark.features_of(4, 200, 32, torch.device("cpu"))
    case = topk_benchmark.Case("small", queries, gallery, 9)
    found = topk_benchmark.matmul_topk(case)()
    ours = kernels.topk(queries, gallery, 9)
    assert topk_benchmark.agrees(found, ours, case)
    assert not topk_benchmark.agrees((found[0], found[1].roll(1, 1)), ours, case)
    assert not topk_benchmark.agrees((found[0] + 0.01, found[1]), ours, case)


@pytest.mark.slow
def test_ranking_benchmark_and_its_rivals_agree(monkeypatch):
    monkeypatch.setitem(rank_benchmark.CASES, "small", (60, 700, 16, 20))
    case = rank_benchmark.case_of("small", torch.device("cpu"))
    expected = rank_benchmark.ours(case)()
    for rival in (rank_benchmark.argsort_numpy, rank_benchmark.argsort_cython):
        assert rival(case)() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Files -> a benchmark's case of batches of 8."""
    folder = tmp_path_factory.mktemp("crops")
    files = loader_benchmark.write_files(folder, (160, 64), 32)
    shards = loader_benchmark.write_shards(folder, files)
    return lambda mode: loader_benchmark.Case(folder, files, shards, mode, 8, torch.device("cpu"))


READERS = list(loader_benchmark.READERS)


@pytest.mark.xdist_group("readers")
def test_readers_yield_the_same_pictures(crops):
    """The first two batches of each: 0 to 7, then 8 to 15, or the second worker's shard."""
    own = (loader_benchmark.MEAN, loader_benchmark.STD, loader_benchmark.PADDING)
    assert own == (pipeline.MEAN, pipeline.STD, pipeline.PADDING)
    found = {}
    for name in READERS:
        batches = loader_benchmark.READERS[name](crops("bare"))
        found[name] = [next(batches).clone() for _ in range(2)]
        assert all(batch.shape == (8, 3, 256, 128) and batch.dtype == torch.float32 for batch in found[name])
    for name, (first, second) in found.items():
        assert loader_benchmark.difference(first, found["ours"][0]) < loader_benchmark.NEAR
        if not name.startswith("webdataset"):
            assert loader_benchmark.difference(second, found["ours"][1]) < loader_benchmark.NEAR
    assert loader_benchmark.difference(*found["ours"]) > 2 * loader_benchmark.NEAR  # other people
    assert loader_benchmark.difference(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)) == pytest.approx(
        57.63, abs=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_readers_augment_alike(name, crops):
    """Half of the pictures are erased, by a fifth on average; hardly two turns of a picture are the same."""
    torch.manual_seed(0)
    batches = loader_benchmark.READERS[name](crops("augmented"))
    images = torch.cat([next(batches).clone() for _ in range(40)])
    assert images.shape == (320, 3, 256, 128)
    erased = (images == 0).all(1).float().mean((1, 2))  # 0 is the mean colour, which next to no pixel has exactly
    assert 0.4 < (erased > 0.015).float().mean() < 0.6
    assert 0.15 < erased[erased > 0.015].mean() < 0.27
    assert erased.max() < 0.45
    black = -torch.tensor(loader_benchmark.MEAN) / torch.tensor(loader_benchmark.STD)
    padded = (images[:, :, 0] - black[:, None]).abs().amax((1, 2)) < 0.1  # the first row: shifted down
    assert 0.25 < padded.float().mean() < 0.6
    assert len({image.numpy().tobytes() for image in images}) > 0.98 * len(images)  # two may be shifted alike


def test_plain_sampler_draws_p_times_k():
    pids = [image % 7 for image in range(40)] + [7, 7]  # five or six images each, two of the last
    sampler = starts.PlainSampler(pids, 3, 4, 50)
    batches = torch.tensor(sampler.indices).view(50, 3, 4)
    of = torch.tensor(pids)[batches]
    assert (of == of[:, :, :1]).all()
    assert all(len(set(labels)) == 3 for labels in of[:, :, 0].tolist())
    assert set(of.flatten().tolist()) == set(range(8))
    for images, pid in zip(batches.view(-1, 4).tolist(), of[:, :, 0].flatten().tolist(), strict=True):
        assert len(set(images)) == 4 or pid == 7
    with pytest.raises(ValueError, match="8 identities, 9 are needed"):
        starts.PlainSampler(pids, 9, 4, 1)


def test_loader_benchmark_refuses_what_is_wrong(monkeypatch):
    """One that yields other pictures; one that yields another shape."""
    batch = torch.zeros(2, 3, 4, 4)
    case = loader_benchmark.Case(ROOT, [], [], "bare", 2, torch.device("cpu"))
    for wrong, message in ((batch + 0.1, "Pillow differs from ours by 5.8 grey levels"), (batch[:1], "Pillow yields")):
        readers = {"Pillow": lambda _, wrong=wrong: iter([wrong] * 99), "ours": lambda _: iter([batch] * 99)}
        monkeypatch.setattr(loader_benchmark, "READERS", readers)
        with pytest.raises(SystemExit, match=message):
            loader_benchmark.run(case, 1, 1)

    def absent(case):
        raise ImportError("no such package")

    readers |= {"Pillow": lambda _: iter([batch + 0.01] * 99), "packed": absent}
    monkeypatch.setattr(loader_benchmark, "READERS", readers)
    rows = loader_benchmark.run(case, 2, 3, size="none")
    assert [set(row) for row in rows[:2]] == [{"size", "case", "rival", "images/s", "to Pillow", "to ours"}] * 2
    assert rows[2] == {"size": "none", "case": "bare", "rival": "packed", "left_out": "no such package"}


def test_rows_of_starts(monkeypatch):
    """Medians; who is cut off is not tried again."""
    tried: list[str] = []

    def start(name: str, rows: int) -> dict:
        tried.append(name)
        return {"left_out": "stopped"} if name == "plain" else {"seconds": float(len(tried)), "MiB": 2.0}

    monkeypatch.setattr(loader_benchmark, "start", start)
    plain, ours, _ = loader_benchmark.startup([5_000_000], 3)
    assert tried == ["plain", "ours", "ours, stored index", *["ours", "ours, stored index"] * 2]
    assert plain == {"rows": 5_000_000, "identities": 328_604, "rival": "plain", "left_out": "stopped"}
    assert ours == {"rows": 5_000_000, "identities": 328_604, "rival": "ours", "seconds": 4.0, "MiB": 2.0}


def test_a_start_in_a_process_of_its_own():
    found = loader_benchmark.start("ours", 3000)
    assert found["seconds"] > 0
    assert 0 < found["MiB"] < 10
    assert loader_benchmark.start("plain", 3000, limit=0.01) == {"left_out": "stopped after 0.01 s"}
    stored = loader_benchmark.start("ours, stored index", 3000)
    assert set(stored) == set(loader_benchmark.STARTED)
    assert all(value > 0 for value in stored.values())


@pytest.mark.slow
def test_the_plain_sampler_lists_the_whole_training():
    assert loader_benchmark.start("plain", 3000)["MiB"] > 20  # 24,000 x 128 numbers of 8 bytes


@pytest.mark.slow
def test_loader_benchmark_from_the_command_line(tmp_path):
    command = ["bench/loader.py", "--device", "cpu", "--quick", "--sizes", "128x64", "--json", tmp_path / "rows.json"]
    done = subprocess.run(
        [sys.executable, *command, "--plot", tmp_path / "plot.png"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    timed = [row for row in rows if "left_out" not in row]
    assert [row["rival"] for row in timed] == READERS * 2
    assert {row["case"] for row in timed} == {"bare", "augmented"}
    assert all(row["images/s"] > 0 and 2000 < row["bytes"] < 6000 for row in timed)


@pytest.mark.parametrize("told", ["ragged", "whole", "one for all", "nothing"])
def test_the_plain_step_attends_as_the_kernels_do(told):
    torch.manual_seed(0)
    qkv = torch.randn(3, 7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    kv_ins = torch.randn(3, 5, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    inputs, lengths = [qkv, kv_ins, gate], torch.tensor([1, 5, 3]) if told == "ragged" else None
    instruction = kv_ins[:1].expand(3, -1, -1, -1, -1) if told == "one for all" else kv_ins
    arguments = [qkv] if told == "nothing" else [qkv, instruction, gate]
    inputs = inputs[: len(arguments)]
    toward = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    runs = []
    for attend in (step_benchmark.concatenated, kernels.gated_attention_packed):
        out = attend(*arguments, ins_lengths=lengths)
        runs.append([out, *torch.autograd.grad(out, inputs, toward)])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # gates are used in float32 by the kernels


def plain_and_ours(dtype: torch.dtype):
    """A model, its released losses, the engine's model of them, and a batch with a sentence for each image."""
    torch.manual_seed(0)
    model = IRM(SMALL, 20, {"li/x": 3}).to(dtype)
    torch.nn.init.normal_(model.edit.gates)
    images, lengths = torch.randn(12, 3, *SMALL.image_size, dtype=dtype), 3 + torch.arange(12) % 5
    batch = Batch(0, images, torch.arange(3).repeat_interleave(4), torch.randint(4, 20, (12, 8)), lengths, None)
    config = TrainConfig(model=SMALL, mining="hard")
    return model, step_benchmark.Released(model, "li/x"), TrainingModel(model, config, ["li/x"], [False]), batch


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def test_the_plain_step_has_the_engine_s_loss():
    model, released, ours, batch = plain_and_ours(torch.float32)
    want = ours(batch)[0]
    step_benchmark.attend_by(model, "released")
    torch.testing.assert_close(released(batch)[0], want, rtol=1e-5, atol=0)


def test_the_plain_step_has_our_gradients_in_float64():
    """The engine's losses are float32: here the same sum by the same kernels and modules in float64."""
    model, released, _, batch = plain_and_ours(torch.float64)
    features, head = model(batch), model.head("li/x")
    want = 0
    for name in ("cls", "fout"):
        value = getattr(features, name)
        unit, told = F.normalize(value, dim=-1), features.instruction.cls
        want = want + kernels.adaptive_triplet(unit, batch.labels, told, mining="hard")
        want = want + F.cross_entropy(head.classify[name](head.neck[name](value)), batch.labels)
    want_gradients = gradients(want, model)
    step_benchmark.attend_by(model, "released")
    got = released(batch)[0]
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    got_gradients = gradients(got, model)
    assert got_gradients.keys() == want_gradients.keys()
    assert len(got_gradients) > 40
    for name, gradient in got_gradients.items():
        scale = want_gradients[name].abs().max().clamp(min=1e-3)
        assert ((gradient - want_gradients[name]).abs().max() / scale) < 1e-6, name  # gates are float32 in the kernels


@pytest.mark.parametrize("name", ["pk", "big", "sentences"])
def test_the_plain_step_mines_as_the_released_code(name):
    stored = np.load(ROOT / "tests" / "data" / "released_triplet.npz")
    want = json.loads((ROOT / "tests" / "data" / "released_triplet.json").read_text())[name]
    x, t = (torch.from_numpy(stored[f"{name}_{part}"]).double() for part in ("features", "instructions"))
    case = triplet.Case(x.requires_grad_(), torch.from_numpy(stored[f"{name}_labels"]).long(), t)
    loss, gradient = triplet.with_gradient(step_benchmark.triplet.loop, case)
    assert abs(loss.item() - want) < 1e-10
    torch.testing.assert_close(gradient, torch.from_numpy(stored[f"{name}_gradient"]), rtol=1e-9, atol=1e-11)
    step_benchmark.check_loop()


def test_the_plain_step_reduces_twice_what_streams_share(monkeypatch):
    """Two ranks with the same gradients: averages change nothing, however often they are taken."""
    reduced = []
    monkeypatch.setattr(step_benchmark.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(step_benchmark.dist, "all_reduce", lambda grad: reduced.append(grad.mul_(2)))
    _, released, _, batch = plain_and_ours(torch.float32)
    released(batch)[0].backward()
    named = {name: p.grad.clone() for name, p in released.named_parameters() if p.grad is not None}
    step_benchmark.reduce_one_by_one(released)
    shared = [name for name in named if ".heads." not in name]
    assert len(reduced) == len(named) + len(shared)
    assert 0 < len(named) - len(shared) < 8
    for name, parameter in released.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, named[name])


def test_collectives_are_taken_out_of_the_part_that_they_interrupt(monkeypatch):
    clock = iter([0, 1, 10, 11, 14, 15, 16, 18, 30, 40, 45])
    monkeypatch.setattr(step_benchmark.time, "perf_counter", lambda: float(next(clock)))
    watch = step_benchmark.Watch(torch.device("cpu"))
    with watch("data"):
        pass  # 0 to 1
    with watch("backward"):  # 10 to 30
        with watch.collective(), watch.collective():  # 11 to 14; one inside of another counts once
            pass
        work = step_benchmark._Handle(type("Work", (), {"wait": lambda self: "done", "name": "sum"})(), watch)
        with watch.collective():  # 15 to 16: it begins
            pass
        assert work.name == "sum"
        clock = iter([18, 20, 30, 40, 45])
        assert work.wait() == "done"  # 18 to 20
    with watch.collective():  # in no step
        pass
    with watch("optimiser"):  # 40 to 45
        pass
    parts = {"data": 1.0, "forward": 0.0, "backward": 14.0, "optimiser": 5.0, "communication": 6.0}
    assert watch.read() == parts
    assert not any(watch.read().values())


def test_flops_are_those_of_the_shapes():
    """E_e of irm_base on two images and one sentence of 9 tokens, forward: what torch counts, by hand."""
    config, (B, N, M, C, L) = MODELS["irm_base"], (2, 129, 9, 768, 12)
    with torch.device("meta"):
        model = EditingTransformer(
            size=config.image_size, patch=16, stem="patch", width=C, depth=L, heads=12, instruction_width=C, fused=False
        )
        images, tokens = torch.empty(B, 3, *config.image_size), torch.empty(1, M, C)
    with FlopCounterMode(display=False) as counter:
        model(images, tokens)
    layer = 2 * B * N * C * (3 * C + C + 4 * C + 4 * C) + 2 * 2 * B * N * (N + M) * C
    assert counter.get_total_flops() == 2 * B * 128 * C * 3 * 16 * 16 + L * layer + 2 * M * C * 2 * L * C


def timed(first: dict, times: dict[str, list[float]], **more) -> dict:
    """What rank 0 of a visit leaves: half of each step is forward."""
    rows = {
        name: {"steps": [dict.fromkeys(step_benchmark.PARTS, 0.0) | {"step": t, "forward": t / 2} for t in row]}
        for name, row in times.items()
    }
    for row in rows.values():
        row["peak"] = 3 << 20
    return {"batches": [{"batch": 8, "images": 8, "matmul": 1e9, "data": "none", "first": first, "rows": rows} | more]}


SAME = {"loss": 2.0, "norm": 1.0}
FIRST = {"ours": SAME, "no fused": SAME | {"flops": 4e8}, "ours, hard": {"loss": 3.0, "norm": 2.0}}
FIRST["released"] = FIRST["ours, hard"]


@pytest.fixture
def visited(monkeypatch, tmp_path):
    """The benchmark's exit code and rows when its visits leave these results, one after another."""

    def run(results: list[dict], *arguments: str) -> tuple[int, list[dict]]:
        monkeypatch.setattr(step_benchmark, "write_mini", lambda *_, **__: None)
        monkeypatch.setattr(step_benchmark, "_missing", lambda package: "")  # nothing is forked here
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        left = iter(results)
        monkeypatch.setattr(step_benchmark, "run_visit", lambda job: next(left))
        file = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", "--json", str(file), *arguments])
        code = step_benchmark.main()
        return code, json.loads(file.read_text())["rows"] if file.exists() else []

    return run


def test_rows_of_steps(visited):
    """Two visits of two steps each; medians of what took turns; ZeRO 3, which failed once, has no figures."""
    times = {"ours": [1.0, 2.0], "no fused": [2.0, 2.0], "released": [4.0, 8.0]}
    zero = [timed({"ZeRO 1": SAME}, {"ZeRO 1": [1.5, 3.0]}), {"left_out": "no"}]
    arguments = [
        "--rounds",
        "4",
        "--visits",
        "2",
        "--ranks",
        "2",
        "--variants",
        "no fused",
        "released",
        "ZeRO 1",
        "ZeRO 3",
    ]
    code, rows = visited([timed(FIRST, times), *zero, timed(FIRST, times), zero[0], zero[0]], *arguments)
    assert code == 0
    assert [row["rival"] for row in rows] == ["ours", "no fused", "released", "ZeRO 1", "ZeRO 3"]
    assert [row.get("times_ours") for row in rows] == [1.0, 1.5, 4.0, 1.5, None]
    assert rows[0]["images/s"] == pytest.approx(2 * 8 / 1.5)
    assert rows[0]["forward %"] == pytest.approx(50)
    assert rows[0]["of matmul"] == pytest.approx(4e8 / 1.5 / 1e9)
    assert rows[0]["GFLOP an image"] == pytest.approx(0.05)
    assert rows[0]["peak MiB"] == 3
    assert rows[4]["left_out"] == "no"
    assert all("us" not in row and "mfu" not in row for row in rows)  # these come from a GPU


def test_steps_that_do_not_fit_are_left_out(visited):
    first = timed(FIRST, {"ours": [1.0, 1.0], "no fused": [2.0, 2.0]})
    first["batches"].append({"batch": 16, "left_out": "out of memory"})
    small, large = (timed({"ZeRO 1": SAME}, {"ZeRO 1": [1.0] * 2}, batch=size)["batches"] for size in (8, 16))
    code, rows = visited(
        [first, {"batches": small + large}], "--ranks", "2", "--batch", "8", "16", "--variants", "no fused", "ZeRO 1"
    )
    assert code == 0
    assert [(row["batch"], row["rival"], row.get("left_out")) for row in rows] == [
        (8, "ours", None), (8, "no fused", None), (8, "ZeRO 1", None), (16, "ours", "out of memory"),
        (16, "no fused", "out of memory"), (16, "ZeRO 1", "nothing to compare it with"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([timed(FIRST | {"no fused": {"loss": 2.001, "norm": 1.0}}, {})], "no fused: loss 2.001, ours 2; no figures"),
        ([timed(FIRST | {"released": {"loss": 3.0, "norm": 2.01}}, {})], "released: norm 2.01, ours 2; no figures"),
        ([timed(FIRST | {"released": SAME}, {})], "released: loss 2, ours 3"),
        ([timed(FIRST | {"no fused": {"loss": float("nan"), "norm": 1.0}}, {})], "no fused: loss nan"),
        ([{"error": "the loop differs"}], "the loop differs"),
        ([{"left_out": "rank 0 was lost"}], "ours cannot run: rank 0 was lost"),
    ],
)
def test_step_refuses_to_report_what_is_wrong(visited, capsys, results, message):
    assert visited(results, "--ranks", "1") == (2, [])
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "visit" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


def test_step_refuses_a_loop_that_is_not_the_released_one(monkeypatch):
    plain = triplet.loop
    monkeypatch.setattr(triplet, "loop", lambda case: plain(case) * 1.0001)
    with pytest.raises(step_benchmark.InputError, match="the loop over triplets differs"):
        step_benchmark.check_loop()


def quick_steps(*arguments: str) -> list[dict]:
    done = recipe("bench/step.py", "--device", "cpu", "--quick", *arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "nothing about a GPU" in done.stdout
    return json.loads(open(arguments[arguments.index("--json") + 1]).read())["rows"]


def test_step_from_the_command_line(tmp_path):
    plot = tmp_path / "plot.png"
    rows = quick_steps("--ranks", "1", "--rounds", "1", "--json", str(tmp_path / "rows.json"), "--plot", str(plot))
    assert plot.stat().st_size > 1000
    assert [row["rival"] for row in rows] == ["ours", "no fused", "released"]
    for row in rows:
        assert row["data"] == "drawn pictures by the engine's loader"
        parts = [row[f"{part}_s"] for part in step_benchmark.PARTS]
        assert 0.7 * row["step_s"] < sum(parts) < 1.01 * row["step_s"]
        assert min(row[f"{part}_s"] for part in ("data", "forward", "backward", "optimiser")) > 0
        assert row["images/s"] > 0
        assert 40 < row["peak MiB"] < 1000
        assert 0.001 < row["of matmul"] < 1


@pytest.mark.slow
def test_every_step_on_two_ranks(tmp_path):
    """All variants agree with ours, and each reduces something; accumulated over two micro-steps."""
    rows = quick_steps("--ranks", "2", "--window", "2", "--json", str(tmp_path / "rows.json"))
    assert [row["rival"] for row in rows] == step_benchmark.VARIANTS
    assert all("left_out" not in row for row in rows)
    assert all(row["communication_s"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ctcc", "li"])
def test_steps_of_other_tasks(tmp_path, task):
    rows = quick_steps("--ranks", "1", "--rounds", "1", "--task", task, "--json", str(tmp_path / "rows.json"))
    assert [row["task"] for row in rows] == [task] * 3


@pytest.mark.slow
def test_step_without_deepspeed_and_the_loader(tmp_path):
    """As on a machine that has neither: a plain loop, noise, and why the others are left out."""
    code = """
import sys
sys.modules |= {"deepspeed": None, "pyarrow": None}
from bench import step
sys.exit(step.main())
"""
    file = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--quick", "--ranks", "1", "--variants", "released", "ZeRO 1", "DDP"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json", file], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["rival"], "left_out" in row) for row in rows] == [
        ("ours", False), ("released", False), ("ZeRO 1", True), ("DDP", False)
    ]  # fmt: skip
    assert rows[0]["data"] == "noise: pyarrow is not installed"
    assert "deepspeed" in rows[2]["left_out"]
