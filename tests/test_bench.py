"""The benchmarks: what they count, that they refuse what is wrong, that no shipped configuration spills."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import kernels
from bench import attention, compile_report, measure, triplet
from bench import rank as rank_benchmark
from bench import topk as topk_benchmark
from bench.compiled import ctas_per_sm


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
print(measure.peak_bytes(lambda: triplet.with_gradient(triplet.ours, case), torch.device("cpu")))
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
