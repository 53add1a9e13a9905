"""The grid of Tables 5 and 6: what is trained, in how many sittings, and the tables that come of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL

from engine import checkpoint, grid, tables
from engine.errors import InputError
from recipes import ablation

# In place of a training: tells that it was called, fails for folders named in "failing", else measures something.
FAKE = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
assert str(folder.parent / ".lock") in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
with (folder.parent / "calls").open("a") as calls:
    print(folder.name, *(["again"] if "--resume" in sys.argv else []), file=calls)
if folder.name in (folder.parent / "failing").read_text().split():
    sys.exit("error: the reason")
value = {"mtl-irm-seed0": 0.5, "mtl-irm-seed1": 0.6, "mtl-plain-seed0": 0.45, "mtl-plain-seed1": 0.57}[folder.name]
(folder / "metrics.json").write_text(json.dumps({"tasks": {"trad": {"market1501": {"mAP": value}}}}))
"""


@pytest.fixture
def data(tmp_path) -> Path:
    """What is looked at before anything is started: a folder of the right name."""
    (tmp_path / "data" / "Market-1501-v15.09.15").mkdir(parents=True)
    return tmp_path / "data"


@pytest.fixture
def fake(data, tmp_path, monkeypatch):
    """main(options...) with FAKE in place of DeepSpeed; .calls() tells what was started since."""
    script, output = tmp_path / "fake.py", tmp_path / "out"
    script.write_text(FAKE)
    output.mkdir()
    (output / "failing").write_text("")
    monkeypatch.setattr(grid, "launcher", lambda: [sys.executable, str(script)])

    def main(*more: str) -> int:
        (output / "calls").write_text("")
        common = ("--data", str(data), "--output", str(output), "--rows", "mtl-irm,mtl-plain", "--seeds", "0,1")
        return ablation.main([*common, "--steps", "4", *more])

    main.calls = lambda: (output / "calls").read_text().splitlines()
    main.output = output
    return main


def dry(capsys, *arguments: str) -> list[str]:
    assert ablation.main(["--dry-run", "--output", "out", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_papers_figures_are_those_it_prints():
    five, six = (tables.paper_figures(table) for table in (5, 6))
    assert five["stl-plain"]["t2i/cuhk_pedes"] is None
    assert five["stl-irm"]["cc/vc_clothes:cc"] == 0.801
    assert five["stl-noediting"]["ctcc/real2"] == 0.326
    assert five["mtl-irm"]["vi/llcm:ir2vis"] == 0.672
    assert five["mtl-noediting"]["vi/llcm:ir2vis"] == 0.652
    assert five["mtl-plain"]["li/real2"] == 0.392
    assert [five[name]["average"] for name in five] == [0.618, 0.615, 0.613, 0.651, 0.645, 0.648]
    assert six["mtl-albef"]["t2i/cuhk_pedes"] == 0.683
    assert six["stl-hap"]["trad/cuhk03"] == 0.796
    assert (five["mtl-irm"]["vi/llcm:vis2ir"], six["mtl-pass"]["vi/llcm:vis2ir"]) == (0.675, 0.685)
    assert six["mtl-pass384"]["cc/prcc:single"] == 0.584
    assert six["stl-deit"]["trad/msmt17"] == 0.679
    for row in tables.ROWS.values():
        assert len(row.paper) == 11 + (row.table == 5)
        if row.table == 5:  # a slip of the pen in one figure shows in the mean
            assert np.mean([value for value in row.paper[:11] if value]) == pytest.approx(row.paper[11], abs=0.11)
    assert [len([row for row in tables.ROWS.values() if row.table == table]) for table in (5, 6)] == [6, 10]


def test_every_column_is_a_protocol_of_its_data_set():
    from engine.data.datasets import DATASETS

    known = {item.name: item.protocols for item in DATASETS}
    assert all(column.protocol in known[column.dataset][column.task] for column in tables.COLUMNS)
    assert len({column.key for column in tables.COLUMNS}) == 11


def test_multi_task_commands(capsys, data):
    asked = ["--data", str(data), "--rows", "mtl-irm,mtl-noediting,mtl-plain", "--seeds", "0,3", "--num_gpus", "2"]
    found = dry(capsys, *asked, "--ids", "8", "--", "--steps", "9")
    start = f"deepspeed --num_gpus 2 recipes/mtl.py --data {data} --ids 8 --steps 9"
    assert found == [
        f"{start} {option}--seed {seed} --output out/mtl-{name}-seed{seed}"
        for seed in (0, 3)
        for name, option in (("irm", ""), ("noediting", "--no-editing "), ("plain", "--plain-triplet "))
    ]


def test_single_task_commands_train_nothing_twice(capsys):
    found = dry(capsys, "--rows", "stl-irm,stl-plain")
    streams = ["cocas --task ctcc", "cocas --task li", "cuhk_pedes --task t2i", "llcm --task vi", "ltcc --task cc"]
    streams += ["prcc --task cc", "vc_clothes --task cc"]
    streams += [f"{name} --task trad" for name in ("market1501", "msmt17", "cuhk03")]
    want = [("irm", stream) for stream in streams] + [("plain", stream) for stream in streams[:2]]
    assert found == [
        f"deepspeed recipes/stl.py --dataset {stream} {'--plain-triplet ' if name == 'plain' else ''}--seed 0 "
        f"--output out/stl-{name}-{stream.replace(' --task ', '-')}-seed0"
        for name, stream in want
    ]
    only = dry(capsys, "--rows", "stl-plain")  # its other cells are IRM's, which has to be trained
    assert len(only) == 2 + 7
    assert not [line for line in only if "t2i" in line]


def test_pre_trained_models(capsys, data, tmp_path):
    files = {name: tmp_path / f"{name}.pth" for name in ("deit", "pass")}
    for file in files.values():
        file.touch()
    weights = ",".join(f"{name}={file}" for name, file in files.items())
    found = dry(capsys, "--data", str(data), "--weights", weights, "--tables", "6")
    streams = "--dataset market1501 --task trad "
    want = []
    for variant in ("deit", "irm", "pass384"):
        name = "deit" if variant == "deit" else "pass"
        size = "--image-size 384x192 " if variant == "pass384" else ""
        for mode, stream, folder in (("stl", streams, "-market1501-trad"), ("mtl", "", "")):
            want.append(
                f"deepspeed recipes/{mode}.py {stream}--data {data} --backbone {name} --pretrained {files[name]} {size}"
                f"--seed 0 --output out/{mode}-{variant}{folder}-seed0"
            )
    assert found == want
    both = dry(capsys, "--data", str(data), "--weights", weights)  # PASS (256) is IRM of Table 5
    assert len(both) == len(set(both)) == 5 + 4  # Market-1501 has fixed sentences: stl-plain is IRM as well
    assert sum("--no-editing --seed" in line and "--backbone pass" in line for line in both) == 2


def test_the_demo(capsys):
    found = dry(capsys, "--demo", "--num_gpus", "2", "--rows", "mtl-irm,mtl-plain")
    assert len(found) == 6
    assert (
        found[-1]
        == "deepspeed --num_gpus 2 recipes/mtl.py --steps 400 --plain-triplet --seed 2 --output out/mtl-plain-seed2"
    )
    assert " --steps 7 " in dry(capsys, "--demo", "--rows", "mtl-irm", "--steps", "7")[0]
    assert len(dry(capsys, "--demo")) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["--rows", "mtl-irm,irm"], "--rows irm: unknown; choose from stl-irm"),
        (["--rows", "mtl-irm", "--tables", "6"], "--rows mtl-irm: unknown; .*Table 6"),
        (["--tables", "4"], "--tables 4: expected 5, 6"),
        (["--tables", "6"], "--tables 6: no row can be filled without --weights"),
        (["--rows", "mtl-deit"], "--rows mtl-deit: give its pre-trained weights, --weights deit=FILE"),
        (["--weights", "deit=/nowhere"], "--weights deit=/nowhere: no such file"),
        (["--weights", "vit=/nowhere"], "--weights vit=/nowhere: expected NAME=FILE once for each of deit"),
        (["--seeds", "0,0"], "--seeds 0,0: expected different numbers"),
        (["--seeds", "-1"], "--seeds"),
        (["--max-runs", "0"], "--max-runs 0: expected at least 1"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--", "--wrong", "5"], "unrecognized arguments: --wrong 5"),
        (["--seed", "3"], "--seed: leave it out"),
        (["--", "--output", "x"], "--output: leave it out"),
        (["--no-eval"], "--no-eval: leave it out"),
        (["--plain-triplet"], "--plain-triplet: leave it out"),
        (["--demo", "--data", "."], "--demo --data: .*leave one of them out"),
        (["--config", "huge"], "--config huge: expected"),
    ],
)
def test_bad_input_is_found_before_anything_starts(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [] if {"--rows", "--tables", "--demo"} & {*arguments} else ["--rows", "mtl-irm"]
    with pytest.raises(InputError, match=message):
        ablation.main([*rows, *arguments])
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_no_column_tests(tmp_path):
    (tmp_path / "SYNTH-PEDES").mkdir()
    with pytest.raises(InputError, match="no data set in it that these rows test"):
        ablation.main(["--data", str(tmp_path), "--rows", "mtl-irm", "--dry-run"])


def cut(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_spread_over_seeds_and_paired_differences():
    rng = np.random.default_rng(0)
    value = rng.uniform(0.2, 0.9, (2, 11, 3))  # rows, columns, seeds
    names = ("mtl-irm", "mtl-plain")
    figures = {
        name: {c.key: dict(enumerate(value[i, j].tolist())) for j, c in enumerate(tables.COLUMNS)}
        for i, name in enumerate(names)
    }
    result = tables.results(5, figures, tables.COLUMNS)
    lines = tables.lay_out(5, result, 3)
    assert [line[0] for line in lines[1:]] == ["IRM (MTL)", "w/o L_atri (MTL)", "IRM minus w/o L_atri (MTL)"]
    everything = np.concatenate([value, value.mean(1, keepdims=True)], 1)
    for line, numbers in zip(lines[1:3], everything, strict=True):
        assert line[1:] == [f"{100 * np.mean(x):.1f} ± {100 * np.std(x, ddof=1):.1f}" for x in numbers]
    paired = everything[0] - everything[1]
    assert lines[3][1:] == [f"{100 * np.mean(x):+.1f} ± {100 * np.std(x, ddof=1):.1f}" for x in paired]
    cell = result["differences"]["mtl-plain"]["average"]
    assert cell["mean"] == pytest.approx(paired[-1].mean())
    assert cell["std"] == pytest.approx(paired[-1].std(ddof=1))
    assert list(cell["seeds"]) == ["0", "1", "2"]


def test_missing_cells_are_never_averaged_over():
    columns = [column for column in tables.COLUMNS if column.task in ("t2i", "trad")]
    t2i, market, msmt, cuhk03 = (column.key for column in columns)
    figures = {
        "stl-irm": {t2i: {0: 0.9, 1: 0.9}, market: {0: 0.5, 1: 0.7}, msmt: {0: 0.25, 1: 0.25}, cuhk03: {0: 0.3}},
        "stl-plain": {market: {0: 0.5, 1: 0.7}, msmt: {0: 0.25, 1: 0.25}, cuhk03: {0: 0.3}},
    }
    whole, plain, difference = tables.lay_out(5, tables.results(5, figures, columns), 2)[1:]
    none = ["…"] * 2
    assert whole[1:] == [*none, "90.0 ± 0.0", *["…"] * 5, "60.0 ± 14.1", "25.0 ± 0.0", "30.0 (1)", "48.8 (1)"]
    assert plain[1:] == [*none, "-", *["…"] * 5, "60.0 ± 14.1", "25.0 ± 0.0", "30.0 (1)", "35.0 (1)"]
    assert difference[1:] == [*none, "-", *["…"] * 5, "+0.0 ± 0.0", "+0.0 ± 0.0", "+0.0 (1)", "+0.0 (1)"]
    assert "Avg." not in tables.lay_out(6, tables.results(6, {"mtl-pass": {}}, columns), 1)[0]


def test_text_is_aligned_and_markdown_has_as_many_cells_in_each_line():
    lines = tables.lay_out(5, tables.results(5, {"mtl-irm": {}, "stl-plain": {}}, tables.COLUMNS), 1)
    text = tables.as_text(lines).splitlines()
    assert text[0].split() == ["ours", *(tables.TASKS[column.task].title for column in tables.COLUMNS), "Avg."]
    assert text[2].split() == [column.protocol for column in tables.COLUMNS]
    assert text[3] == "-" * len(text[3])
    assert max(map(len, text)) == len(text[3])
    markdown = tables.as_markdown(lines).splitlines()
    assert len({line.count("|") for line in markdown}) == 1


def test_runs_go_on_where_they_were(fake, capsys):
    (fake.output / "failing").write_text("mtl-plain-seed0")
    assert fake("--max-runs", "1") == 0
    assert fake.calls() == ["mtl-irm-seed0"]
    assert "3 of 4 trainings are left" in capsys.readouterr().out
    assert fake() == 1
    assert fake.calls() == ["mtl-plain-seed0", "mtl-irm-seed1", "mtl-plain-seed1"]  # the failure stopped none
    said = capsys.readouterr().out
    assert "[2/4] mtl-plain-seed0, about" in said
    assert "mtl-plain-seed0 failed (exit code 1)" in said
    assert "  error: the reason" in said
    assert "failed: mtl-plain-seed0;" in said
    document = json.loads((fake.output / "ablation.json").read_text())
    assert document["tables"]["5"]["rows"]["mtl-plain"]["trad/market1501"]["seeds"] == {"1": 0.57}
    assert [run["finished"] for run in document["runs"].values()] == [True, False, True, True]
    (fake.output / "failing").write_text("")
    assert fake() == 0
    assert fake.calls() == ["mtl-plain-seed0"]
    document = json.loads((fake.output / "ablation.json").read_text())
    cell = document["tables"]["5"]["differences"]["mtl-plain"]["trad/market1501"]
    assert cell["mean"] == pytest.approx(0.04)
    assert cell["std"] == pytest.approx(np.std([0.05, 0.03], ddof=1))
    assert document["runs"]["mtl-irm-seed1"]["command"].startswith("deepspeed recipes/mtl.py --data ")
    assert document["runs"]["mtl-irm-seed1"]["config"]["seed"] == 1
    assert fake() == 0
    assert fake.calls() == []


def test_what_a_stopped_run_left(fake):
    """With a checkpoint it goes on, without it begins anew; half a metrics.json is none."""
    (fake.output / "failing").write_text("mtl-irm-seed0 mtl-plain-seed0")
    assert fake("--seeds", "0") == 1
    whole = fake.output / "mtl-irm-seed0" / "checkpoints" / "step-00000002"
    whole.mkdir(parents=True)
    (whole / "state.json").touch()
    (fake.output / "mtl-plain-seed0" / "log.jsonl").write_text("of no use\n")
    (fake.output / "mtl-plain-seed0" / "metrics.json").write_text('{"tasks": ')
    (fake.output / "failing").write_text("")
    assert fake("--seeds", "0") == 0
    assert fake.calls() == ["mtl-irm-seed0 again", "mtl-plain-seed0"]
    assert not (fake.output / "mtl-plain-seed0" / "log.jsonl").exists()


def test_folders_of_other_options_are_refused(fake):
    assert fake("--seeds", "0") == 0
    assert fake("--seeds", "0", "--workers", "3") == 0  # changes no result
    for options, message in (
        (["--lr", "0.5"], r"mtl-irm-seed0: was begun with lr 1e-05, now it is 0.5; give the same options"),
        (["--image-size", "384x192"], r"begun with model.image_size \[256, 128\], now it is \[384, 192\]"),
        (["--num_gpus", "2"], "begun with num_gpus None, now it is 2"),
    ):
        with pytest.raises(InputError, match=message):
            fake("--seeds", "0", *options)
    (fake.output / "mtl-irm-seed7").mkdir()
    (fake.output / "mtl-irm-seed7" / "precious").touch()
    with pytest.raises(InputError, match="mtl-irm-seed7: holds something that this recipe did not begin"):
        fake("--seeds", "0,7")
    assert fake.calls() == []
    assert (fake.output / "mtl-irm-seed7" / "precious").exists()


def test_one_at_a_time(fake):
    import fcntl

    with (fake.output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process, or a run that it left, is at work there"):
            fake()
    assert fake.calls() == []


RANK = """
import pathlib, signal, subprocess, sys, time
depth, folder = int(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
def save(*_):
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "state.json").touch()
    sys.exit(143)
if depth:  # the deepspeed command, then its launcher
    sys.exit(subprocess.call([sys.executable, __file__, str(depth - 1), *sys.argv[2:]]))
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_has_the_ranks_save(fake, tmp_path, monkeypatch, capsys, number):
    script, run = tmp_path / "rank.py", fake.output / "mtl-irm-seed0"
    script.write_text(RANK)
    monkeypatch.setattr(grid, "launcher", lambda: [sys.executable, str(script), "2"])

    def stop() -> None:
        while not (run / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    stopper = threading.Thread(target=stop)
    stopper.start()
    assert fake() == 143
    stopper.join()
    assert signal.getsignal(number) == before
    assert (run / "checkpoints" / "step-1" / "state.json").exists()
    said = capsys.readouterr().out
    assert "stopped; the same command goes on from here" in said
    assert "failed" not in said
    assert not (fake.output / "mtl-plain-seed0").exists()


def test_the_papers_figures_stand_apart_and_beside_real_data_only(fake, data):
    assert fake("--seeds", "0") == 0
    ours, paper = (
        (fake.output / "ablation.md").read_text().split("## Table 5 (ablations): the figures printed in the paper")
    )
    assert "93.5" in paper
    assert "93.5" not in ours
    assert cut(next(line for line in ours.splitlines() if line.startswith("| IRM (MTL)")))[9] == "50.0"
    assert "50.0" not in paper
    assert json.loads((fake.output / "ablation.json").read_text())["paper"]["5"]["mtl-irm"]["trad/market1501"] == 0.935
    (data / "mini.json").touch()
    assert fake("--seeds", "0") == 0
    text = (fake.output / "ablation.md").read_text()
    assert "drawn data: not to be compared" in text
    assert "printed in the paper" not in text
    assert "paper" not in json.loads((fake.output / "ablation.json").read_text())


@pytest.mark.slow  # most of it DeepSpeed's start
def test_stopped_in_the_middle_and_gone_on_with(mini, tmp_path):
    """A real training, by DeepSpeed: SIGTERM to the recipe, then the same command again."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Market-1501-v15.09.15").symlink_to(mini / "Market-1501-v15.09.15")
    (tmp_path / "small.json").write_text(json.dumps(asdict(SMALL)))
    output = tmp_path / "out"
    command = [sys.executable, "recipes/ablation.py", "--data", tmp_path / "data", "--rows", "mtl-irm", "--steps", "40"]
    command += ["--config", tmp_path / "small.json", "--quick", "--ids", "4", "--num_gpus", "1", "--output", output]
    settings = {"cwd": ROOT, "env": os.environ | {"CUDA_VISIBLE_DEVICES": ""}, "stdout": subprocess.PIPE, "text": True}
    run = output / "mtl-irm-seed0"
    process = subprocess.Popen([*map(str, command), "--checkpoint-every", "1000"], **settings)
    try:
        deadline = time.monotonic() + 180
        while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
            assert time.monotonic() < deadline, (run / "output.txt").read_text()
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "stopped; the same command goes on from here" in said
    stopped = checkpoint.load_model(run)[2].step
    assert 0 < stopped < 40
    assert f"stopped by SIGTERM after step {stopped}" in (run / "output.txt").read_text()
    done = subprocess.run([*map(str, command), "--checkpoint-every", "1000"], timeout=300, **settings)
    assert done.returncode == 0, done.stdout + (run / "output.txt").read_text()
    assert f"resumed after step {stopped}" in (run / "output.txt").read_text()
    measured = json.loads((run / "metrics.json").read_text())["tasks"]["trad"]["market1501"]["mAP"]
    document = json.loads((output / "ablation.json").read_text())
    assert document["tables"]["5"]["rows"]["mtl-irm"]["trad/market1501"]["seeds"] == {"0": measured}
    assert f"{100 * measured:.1f}" in done.stdout
