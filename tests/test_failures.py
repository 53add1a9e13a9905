"""What goes wrong ends in one line and exit code 2, on any number of ranks, and nothing that was saved is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, free_port, launch, recipe
from safetensors.torch import load_file

import engine
from engine import checkpoint, runtime
from engine.config import TrainConfig
from engine.data.index import find_indexes
from engine.data.loader import TrainLoader
from engine.data.sampler import Sampler, make_streams
from engine.errors import InputError
from engine.log import quarantine
from engine.model.instruction import build_tokenizer
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
BROKEN_ONCE = [True, False, True, True]  # whether each step changed the weights


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def one_line(done: subprocess.CompletedProcess) -> str:
    """The one line of ours; fails when there are more, a traceback, or another exit code."""
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


@pytest.fixture(scope="session")
def small(mini, tmp_path_factory) -> Path:
    """A run of the smallest model with checkpoints of steps 2 and 4, and its model file beside it."""
    output = tmp_path_factory.mktemp("small") / "run"
    (output.parent / "small.json").write_text(json.dumps(asdict(SMALL)))
    done = recipe(*training(mini, output, 4))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def training(mini: Path, output: Path, steps: int) -> list[str | Path]:
    config = output.parent / "small.json"
    config.write_text(json.dumps(asdict(SMALL)))
    return [
        "recipes/stl.py", "--dataset", "market1501", "--data", mini, "--config", config, "--ids", "4", "--no-eval",
        "--checkpoint-every", "2", "--output", output, "--steps", str(steps),
    ]  # fmt: skip


@pytest.fixture
def copy(small, tmp_path) -> Path:
    shutil.copytree(small, tmp_path / "run")
    return tmp_path / "run"


def inject(mini: Path, output: Path, kind: str, stages: str, ranks: int = 1) -> subprocess.CompletedProcess:
    return recipe("tests/inject.py", mini, output, kind, stages, ranks=ranks)


def changed(done: subprocess.CompletedProcess) -> list[list[bool]]:
    return [json.loads(line)["changed"] for line in done.stdout.splitlines() if line.startswith('{"stage"')]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("gradient", 1),
        *[pytest.param(*case, marks=slow) for case in (("loss", 1), ("infinite", 1), ("gradient", 2), ("loss", 2))],
    ],
)
def test_a_step_that_is_not_finite_is_skipped_under_every_zero_stage(mini, tmp_path, kind, ranks):
    done = inject(mini, tmp_path, kind, "0123", ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert changed(done) == [BROKEN_ONCE] * 4
    for stage in "0123":
        rows = lines(tmp_path / stage / "log.jsonl")
        assert [row["skipped"] for row in rows] == [0, 1, 1, 1]
        assert [row["grad_norm"] is None for row in rows] == [False, True, False, False]
        assert (rows[1]["loss"] is None) == (kind != "gradient")


@slow
@pytest.mark.parametrize("stage", "0123")
def test_twenty_such_steps_in_a_row_end_the_run(mini, tmp_path, stage):
    done = inject(mini, tmp_path, "always", stage)
    assert "not finite for 20 steps in a row, at step 20" in one_line(done)
    assert changed(done) == [[False] * 20]
    assert checkpoint.latest(tmp_path / stage / "checkpoints").name == "step-00000015"
    state = checkpoint.load_model(tmp_path / stage)[2]
    assert (state.skipped, state.in_a_row) == (15, 15)
    assert "not finite for 20 steps in a row, at step 20" in one_line(
        inject(mini, tmp_path, "always", stage)
    )  # resumed
    assert lines(tmp_path / stage / "log.jsonl")[-1]["skipped"] == 20


@slow
def test_zero_3_counts_each_gradient_once(mini, tmp_path):
    """Each stream's head has a gradient in one micro-step of a window only. Biases of keys have no gradient but noise,
    which Adam enlarges."""
    assert inject(mini, tmp_path, "nothing", "03").returncode == 0
    parts = [load_file(checkpoint.find(tmp_path / stage) / "model.safetensors") for stage in "03"]
    for name, value in parts[0].items():
        if "running" not in name and not name.endswith("bias"):
            assert (parts[1][name] - value).abs().max() < 1e-4, name  # a tenth of one step of Adam


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=slow)])
def test_a_full_disk_ends_all_ranks_and_keeps_older_checkpoints(mini, copy, ranks):
    """A limit on the size of a file stands for the disk: the weights exceed it."""
    if ranks > 1:
        shutil.rmtree(copy)
        assert recipe(*training(mini, copy, 4), ranks=ranks).returncode == 0
    left = copy / "checkpoints" / ".part-step-00000003"
    left.mkdir()
    (copy.parent / "limited.py").write_text(f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
sys.dont_write_bytecode = True
sys.path[0] = "{ROOT}/recipes"
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    said = one_line(recipe(copy.parent / "limited.py", *training(mini, copy, 8), "--resume", ranks=ranks))
    assert "cannot write" in said
    assert "free space or choose another --output" in said
    folder = copy / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002", "step-00000004"]
    assert lines(copy / "log.jsonl")[-1]["step"] == 6  # the next checkpoint, which did not succeed
    assert checkpoint.load_model(copy)[2].step == 4


def test_a_log_that_cannot_be_written(mini, copy):
    (copy / "log.jsonl").unlink()
    (copy / "log.jsonl").symlink_to("/dev/full")
    said = one_line(recipe(*training(mini, copy, 6), "--resume"))
    assert "log.jsonl: cannot write there (No space left on device)" in said
    assert checkpoint.load_model(copy)[2].step == 4


def test_results_that_cannot_be_written(mini, small, tmp_path):
    (tmp_path / "metrics.json.part").symlink_to("/dev/full")
    done = recipe(
        "recipes/evaluate.py", "--checkpoint", small, "--data", mini, "--dataset", "market1501", "--quick",
        "--tasks", "trad", "--output", tmp_path,
    )  # fmt: skip
    assert f"{tmp_path}: cannot write there (No space left on device)" in one_line(done)
    assert not (tmp_path / "metrics.json").exists()
    assert "mean mAP over tasks" in done.stdout  # what was measured is not lost


def test_results_are_not_written_over(mini, small, monkeypatch):
    from recipes import evaluate

    (small / "metrics.json").write_text("{}")
    arguments = ["evaluate.py", "--checkpoint", str(small), "--data", str(mini), "--output", str(small)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(InputError, match=f"--output {small}: holds results already"):
        evaluate.main()
    (small / "metrics.json").unlink()


def test_a_damaged_stamp_of_the_mini_data(tmp_path):
    from engine.data.mini import write_mini

    (tmp_path / "mini.json").write_text('{"format"')
    with pytest.raises(InputError, match=r"mini\.json: damaged; remove .* to draw it again"):
        write_mini(tmp_path)


def test_weights_that_are_not_finite(mini, small, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint.find(small), tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights["edit.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "broken/model.safetensors")
    (tmp_path / "broken/SHA256SUMS").unlink()
    with pytest.raises(InputError, match="the model's features of trad/market1501 are not finite"):
        engine.evaluate(tmp_path / "broken", mini, datasets=("market1501",), tasks=("trad",), quick=True)


def test_an_index_that_cannot_be_stored_leaves_no_part(mini, tmp_path, monkeypatch, capsys):
    import os

    from recipes import data

    def full(*_):
        raise OSError(28, "No space left on device")

    shutil.copytree(mini / "prcc", tmp_path / "prcc")
    monkeypatch.setattr(os, "replace", full)
    assert data.main(["index", "--data", str(tmp_path)]) == 2
    assert ".index: cannot write there (No space left on device); free space" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / ".index").rglob("[!.]*")] == ["prcc.journal"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("mini", "--output", "/proc/mini"),
        ("mini", "--output", "TMP/mini", "--train-ids", "1"),
        ("mini", "--output", "TMP/mini", "--seed", "-1"),
        ("mini", "--output", "TMP/mini", "--sheet", "sheet.xyz"),
        ("index", "--data", "TMP"),
        ("index", "--data", "TMP/none"),
        ("index", "--date", "TMP"),
    ],
)
def test_data_recipes(tmp_path, arguments, capsys, monkeypatch):
    from recipes import data

    assert data.main([text.replace("TMP", str(tmp_path)) for text in arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wrong"], "unrecognized arguments: --wrong"),
        pytest.param(["--output", "/proc/run"], "--output /proc/run: cannot write", marks=slow),
    ],
)
def test_two_ranks_say_it_once(mini, tmp_path, options, message):
    done = launch(*training(mini, tmp_path / "run", 2), *options, ranks=2)
    assert message in one_line(done)


@slow
def test_what_one_rank_meets_ends_the_others(mini, tmp_path):
    """Nobody can be decoded but those whom rank 0 draws first: only rank 1 knows."""
    shutil.copytree(mini / "Market-1501-v15.09.15", tmp_path / "data" / "Market-1501-v15.09.15")
    [index] = find_indexes(tmp_path / "data")
    sampler = Sampler(make_streams([index], ("trad",)), seed=0, ids=4, images_per_id=4, world=2)
    whole = set(index.pid[sampler.sample(0, 0).rows].tolist())
    for row in index.select("train").tolist():
        if index.pid[row] not in whole:
            index.path(row).write_bytes(b"no image")
    said = one_line(recipe(*training(tmp_path / "data", tmp_path / "run", 20), ranks=2))
    assert "damaged" in said
    assert "repair the data set" in said
    noted = [row["path"] for row in lines(tmp_path / "run" / "quarantine.jsonl")]
    assert len(noted) == len(set(noted)) > 0


def test_a_damaged_file_is_noted_once(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"path": "cut by a k')
    for path, step in (("a.jpg", 1), ("b.jpg", 2), ("a.jpg", 3)):
        quarantine(file, {Path(path): "cannot be decoded"}, step)
    assert [(row["path"], row["step"]) for row in map(json.loads, file.read_text().splitlines()[1:])] == [
        ("a.jpg", 1),
        ("b.jpg", 2),
    ]


@pytest.mark.parametrize("task", ["ctcc", "li", "t2i"])
def test_a_substitute_brings_its_own_instruction(mini, tmp_path, task):
    folder = "CUHK-PEDES" if task == "t2i" else "COCAS+"
    shutil.copytree(mini / folder, tmp_path / folder)
    indexes = find_indexes(tmp_path)
    sampler = Sampler(make_streams(indexes, (task,)), seed=0, ids=4, images_per_id=4)
    whole = sampler.sample(0)
    index = whole.stream.index
    several = [
        row for row in whole.instruction_rows.tolist() if np.sum(index.pid[whole.stream.rows] == index.pid[row]) > 1
    ]
    wanted = several[0]  # for ctcc and li the record whose clothes the first image asks for
    damaged = index.clothes_picture(wanted)[0].path if task == "ctcc" else index.path(wanted)
    damaged.write_bytes(b"no image")
    config = TrainConfig(data=str(tmp_path), model=SMALL, workers=1)
    tokenizer = build_tokenizer(iter(["a person"]))
    found: list[Path] = []

    def loader() -> TrainLoader:
        return TrainLoader(
            sampler, config, tokenizer, torch.device("cpu"), rank=0, start=0,
            quarantine=lambda path, reason, step: found.append(path),
        )  # fmt: skip

    surprised, warned = loader(), loader()
    warned.damaged.add(damaged)
    batch, sample = surprised.next()
    again, same = warned.next()
    assert set(found) == {damaged}
    bad = [
        row
        for row in {*whole.rows, *whole.instruction_rows}
        if index.path(row) == damaged
        or (task == "ctcc" and row in whole.instruction_rows and index.clothes_picture(row)[0].path == damaged)
    ]
    hit = np.isin(whole.rows, bad)
    assert hit.any()
    assert not hit.all()
    assert not np.isin(sample.rows, whole.rows[hit]).any()
    assert not np.isin(sample.instruction_rows, whole.rows[hit]).any()
    assert (sample.rows[~hit] == whole.rows[~hit]).all()
    own = hit & (whole.instruction_rows == whole.rows)
    assert own.any()
    assert (sample.instruction_rows[own] == sample.rows[own]).all()
    assert (index.pid[sample.rows] == index.pid[whole.rows]).all()
    assert torch.equal(batch.images, again.images)
    assert (sample.rows == same.rows).all()
    if task == "ctcc":
        assert torch.equal(batch.clothes, again.clothes)
    else:
        for sentence, row in zip(surprised._sentences(sample), sample.instruction_rows, strict=True):
            assert sentence in index.captions(row)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """One bit of the last weight."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shutil.rmtree(c.parent.parent), "no such folder"),
        (lambda c: shutil.rmtree(c.parent), "no checkpoint there"),
        (lambda c: cut(c / "model.safetensors"), "model.safetensors: damaged or cut short"),
        (lambda c: (c / "model.safetensors").write_text("x"), "model.safetensors: damaged or cut short"),
        (lambda c: flip(c / "model.safetensors"), "model.safetensors: damaged or cut short .its sum is not that of"),
        (lambda c: ((c / "SHA256SUMS").unlink(), cut(c / "model.safetensors")), "model.safetensors: damaged or cut"),
        (lambda c: (c / "config.json").write_text('{"steps"'), "config.json: .*not JSON"),
        (lambda c: change(c / "config.json", steps="abc"), "config.json: .*steps 'abc': expected int"),
        (lambda c: change(c / "config.json", stepz=1), "config.json: .*unknown fields stepz"),
        (
            lambda c: change(c / "config.json", model=asdict(replace(SMALL, width=32))),
            "not the model of its config.json",
        ),
        (lambda c: (c / "tokenizer.json").write_text("{}"), "tokenizer.json: not of a checkpoint"),
        (lambda c: (c / "tokenizer.json").unlink(), "tokenizer.json: not of a checkpoint"),
        (lambda c: build_tokenizer(iter(["a b"])).save(str(c / "tokenizer.json")), "tokenizer.json: .*tokens, but"),
        (lambda c: change(c / "state.json", format=99), "state.json: .*format 99.*newer engine"),
        (lambda c: change(c / "state.json", heads={"trad/market1501": "many"}), "state.json: .*wrong type"),
        (lambda c: change(c / "state.json", streams=[1]), "state.json: .*wrong type"),
    ],
)
def test_checkpoints_of_something_else(copy, damage, message):
    damage(copy / "checkpoints" / "step-00000004")
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "step-00000099\n", "../..", "\xff"])
def test_latest_that_points_to_nothing(copy, content):
    (copy / "checkpoints" / "latest").write_text(content)
    assert checkpoint.latest(copy / "checkpoints").name == "step-00000004"


@pytest.mark.parametrize(
    ("config", "state", "tokenizer", "message"),
    [
        ({"model": replace(SMALL, depth=2)}, {}, None, "has depth 1, this run has 2; give the same options"),
        ({"seed": 1}, {}, None, "has seed 0, this run has 1"),
        ({"window": 5}, {}, None, "has window 0, this run has 5"),
        ({"shares": {"trad": 2}}, {}, None, "has shares {}, this run has {'trad': 2}"),
        ({"temperature": 2.0}, {}, None, "has temperature 0.0, this run has 2.0"),
        ({"leaders": ("trad",)}, {}, None, "has leaders .*this run has .'trad',."),
        ({"ahead": 3}, {}, None, "has ahead 0, this run has 3"),
        ({"train_instruction": True}, {}, None, "has train_instruction False, this run has True"),
        ({}, {"streams": ["trad/msmt17"]}, None, "has streams"),
        (
            {},
            {"batches": [[3, 4]]},
            None,
            r"has batches \[\[4, 4\]\], this run has \[\[3, 4\]\].*divide the batches alike",
        ),
        ({}, {}, "other words", "another vocabulary"),
    ],
)
def test_resuming_another_run(small, config, state, tokenizer, message):
    stored_config, stored, stored_tokenizer = checkpoint.read_facts(checkpoint.find(small))
    other = stored_tokenizer if tokenizer is None else build_tokenizer(iter([tokenizer]))
    with pytest.raises(InputError, match=message):
        checkpoint.resume(
            small / "checkpoints", None, replace(stored, **state), stored_config.but(**config), other, CPU
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "optimizer.safetensors").unlink(), "optimizer.safetensors: No such file.* resume from the one"),
        (lambda c: flip(c / "optimizer.safetensors"), "optimizer.safetensors: damaged or cut .*resume from the one"),
        (lambda c: flip(c / "model.safetensors"), "model.safetensors: damaged or cut .*resume from the one before"),
        (lambda c: (c / "SHA256SUMS").write_bytes(b"\xff"), "SHA256SUMS: cannot be read"),
        (lambda c: (c / "SHA256SUMS").write_text(""), "damaged or cut short .its sum is not that of"),
        (lambda c: change(c / "state.json", batches=None), "made by an older engine"),
    ],
)
def test_resuming_a_damaged_checkpoint(copy, damage, message):
    folder = copy / "checkpoints" / "step-00000004"
    config, stored, tokenizer = checkpoint.read_facts(folder)
    model = checkpoint.load_model(folder)[0]
    damage(folder)
    with pytest.raises(InputError, match=message):
        checkpoint.resume(copy / "checkpoints", model, stored, config, tokenizer, CPU)


@slow
@pytest.mark.parametrize("target", ["command", "launcher"])
def test_sigterm_to_deepspeed_saves(mini, tmp_path, target):
    """The command does not pass it on, but its ranks see that it is gone; its launcher passes it on."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    output = tmp_path / "run"
    command = [deepspeed, "--num_gpus", "1", "--master_port", str(free_port()), *training(mini, output, 100_000)]
    process = subprocess.Popen([*map(str, command), "--checkpoint-every", "100000"], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        wait_for(lambda: (output / "log.jsonl").exists() and (output / "log.jsonl").read_text())
        launcher = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[0])
        os.kill(process.pid if target == "command" else launcher, signal.SIGTERM)
        assert process.wait(60) == (-signal.SIGTERM if target == "command" else 1)
        wait_for(lambda: not Path(f"/proc/{launcher}").exists())
    finally:
        process.kill()
    step = lines(output / "log.jsonl")[-1]["step"]
    assert checkpoint.load_model(output)[2].step == step


def wait_for(what, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_first_process_of_a_container_can_be_asked_to_end(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 0)  # its parent is outside, and not to be seen
    before = signal.getsignal(signal.SIGTERM)
    termination = runtime.Termination()
    try:
        assert not termination.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked()
    finally:
        termination.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_disk_that_gives_back_something_else(tmp_path, monkeypatch):
    tensors = {"model.safetensors": {"a": torch.tensor([1.0, float("nan")])}}
    checkpoint.write_files(tmp_path, tensors, {"state.json": "{}"})
    checkpoint.verify(tmp_path)
    monkeypatch.setattr(checkpoint, "load_file", lambda file: {"a": torch.tensor([1.0, 0.0])})
    with pytest.raises(InputError, match="does not hold what was written; check the disk"):
        checkpoint.write_files(tmp_path, tensors, {})
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", lambda file: "[]")
    with pytest.raises(InputError, match="does not hold what was written"):
        checkpoint.write_files(tmp_path, tensors, {"state.json": "{}"})


@pytest.mark.parametrize(
    ("listening", "message"),
    [
        (True, "error: --master_port {port}: in use on 127.0.0.1; choose another\n"),
        (False, "error: the ranks did not meet at 127.0.0.1:{port} (1 of 2 ranks came within 2 s); is every machine "),
    ],
)
def test_ranks_that_do_not_meet(tmp_path, listening, message):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if listening:
            other.listen()
        else:
            other.close()
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        code = f"import os, sys, datetime; os.environ |= {place}; sys.path.insert(0, {str(ROOT)!r})\n"
        code += "from engine import runtime; from recipes import options\n"
        code += "runtime.JOIN = datetime.timedelta(seconds=2)\n"
        code += "sys.exit(options.run(lambda: runtime.start('cpu')))"
        (tmp_path / "meet.py").write_text(code)
        done = recipe(tmp_path / "meet.py")
    assert done.returncode == 2
    assert message.format(port=port) in done.stderr
    assert "Traceback" not in done.stderr
