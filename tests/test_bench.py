"""The benchmarks: what they count, that they refuse what is wrong, that no shipped configuration spills."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import kernels
from bench import attention, compile_report, measure, starts, triplet
from bench import loader as loader_benchmark
from bench import rank as rank_benchmark
from bench import topk as topk_benchmark
from bench.compiled import ctas_per_sm
from engine.data import pipeline


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
