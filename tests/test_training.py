"""Whole runs as users start them: DeepSpeed, real files, one and two ranks."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, recipe
from safetensors.torch import load_file

from engine import checkpoint
from engine.model.irm import IRM
from engine.runtime import seed_everything

QUICK = ("--config", "irm_tiny", "--quick", "--ids", "4", "--warmup", "2", "--window", "3")
QUICK += ("--ahead", "0", "--shares", "trad=1")  # every stream once in a cycle


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")  # not module: parallel runs interleave modules
def run(mini, tmp_path_factory) -> Path:
    """Multi-task training and evaluation on the small drawn data, 12 steps."""
    output = tmp_path_factory.mktemp("mtl") / "run"
    done = launch(
        "recipes/mtl.py", "--data", mini, *QUICK, "--steps", "12", "--checkpoint-every", "5", "--save-features",
        "--eval-every", "6", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mean mAP over tasks" in done.stdout
    return output


@pytest.mark.xdist_group("run")
def test_every_output_is_there(run):
    for name in ("config.json", "log.jsonl", "quarantine.jsonl", "metrics.json", "features.npz", "checkpoints/latest"):
        assert (run / name).is_file(), name
    assert "learning rate" in (run / "retrieval.html").read_text()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    best, _ = checkpoint.best(run / "checkpoints")
    kept = sorted(path.name for path in (run / "checkpoints").glob("*"))
    assert kept == sorted({"best.json", "latest", best, "step-00000010", "step-00000012"})
    rows = lines(run / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    fields = {"step", "streams", "loss", "terms", "lr", "grad_norm", "images_per_s", "data_wait_s", "skipped"}
    assert all(fields <= set(row) for row in rows)
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    assert (run / "quarantine.jsonl").read_text() == ""


@pytest.mark.xdist_group("run")
def test_evaluations_while_training_name_the_best(run):
    """The last one is that of metrics.json."""
    rows, metrics = lines(run / "evaluations.jsonl"), json.loads((run / "metrics.json").read_text())
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[1]["mean_mAP"] == metrics["mean_mAP"]
    assert rows[0]["tasks"].keys() == metrics["tasks"].keys()
    best = max(rows, key=lambda row: row["mean_mAP"])
    assert checkpoint.best(run / "checkpoints") == (f"step-{best['step']:08d}", best["mean_mAP"])
    assert metrics["best"]["mean_mAP"] == best["mean_mAP"]
    assert checkpoint.load_model(Path(metrics["best"]["checkpoint"]))[2].step == best["step"]


def test_the_best_checkpoint_stays(tmp_path):
    for number in range(1, 6):
        (tmp_path / f".part-{number}").mkdir()
        (tmp_path / f".part-{number}" / "state.json").touch()
        checkpoint._publish(tmp_path, tmp_path / f".part-{number}", f"step-{number}", keep=2)
        best = checkpoint.mark_best(tmp_path, f"step-{number}", {1: 0.1, 2: 0.5, 4: 0.5}.get(number, 0.2), keep=2)
        assert best[0] == f"step-{min(number, 2)}"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-4", "step-5"]
    checkpoint.mark_best(tmp_path, "step-5", 0.6, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-4", "step-5"]
    (tmp_path / ".part-3").mkdir()  # of a run that was resumed from step 2
    (tmp_path / ".part-3" / "state.json").touch()
    checkpoint._publish(tmp_path, tmp_path / ".part-3", "step-3", keep=2)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-3"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-3"
    (tmp_path / "best.json").write_text("{")
    assert checkpoint.best(tmp_path) is None


@pytest.mark.xdist_group("run")
def test_every_stream_is_trained_in_turn(run):
    streams = [name for row in lines(run / "log.jsonl") for name in row["streams"]]
    assert len(set(streams)) == 12
    for start in range(0, 36, 12):
        assert len(set(streams[start : start + 12])) == 12


@pytest.mark.xdist_group("run")
def test_metrics_hold_every_protocol_beside_chance_and_the_untrained_network(run):
    from engine.data.datasets import DATASETS

    metrics = json.loads((run / "metrics.json").read_text())
    expected = {(task, name) for item in DATASETS for task, names in item.protocols.items() for name in names}
    assert {(task, name) for task, rows in metrics["tasks"].items() for name in rows} == expected
    for rows in metrics["tasks"].values():
        for row in rows.values():
            for key in ("mAP", "mINP", "rank1", "rank5", "rank10", "mAP_std", "random_mAP", "untrained_mAP"):
                assert 0 <= row[key] <= 1, key
            assert row["queries"] > 0
            assert row["gallery"] > 0
            assert row["identities"] > 0
            assert row["relevance"]
            assert row["feature"]
    means = [sum(r["mAP"] for r in rows.values()) / len(rows) for rows in metrics["tasks"].values()]
    assert metrics["mean_mAP"] == pytest.approx(sum(means) / 6)


@pytest.mark.xdist_group("run")
def test_metrics_can_be_recomputed_from_the_stored_features(run):
    import numpy as np

    stored = np.load(run / "features.npz")
    want = json.loads((run / "metrics.json").read_text())["tasks"]["trad"]["market1501"]["mAP"]
    features, pid, camera = (stored[f"trad/market1501/{name}"] for name in ("features", "pid", "camera"))
    query, gallery = stored["trad/market1501/0/query"], stored["trad/market1501/0/gallery"]
    similarity = features[0][query] @ features[0][gallery].T
    precisions = []
    for q, row in zip(query, similarity, strict=True):
        keep = (pid[gallery] != pid[q]) | (camera[gallery] != camera[q])
        hits = (pid[gallery] == pid[q])[keep][np.argsort(-row[keep], kind="stable")]
        ranks = np.flatnonzero(hits) + 1
        if len(ranks):
            precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    assert np.mean(precisions) == pytest.approx(want, abs=1e-6)


@pytest.mark.xdist_group("run")
def test_a_stored_checkpoint_evaluates_to_the_same_numbers(run, mini, tmp_path):
    command = f"recipes/evaluate.py --checkpoint {run} --data {mini} --quick --tasks trad,li --output {tmp_path}"
    done = recipe(*command.split())
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "metrics.json").read_text())["tasks"]
    before = json.loads((run / "metrics.json").read_text())["tasks"]
    assert again == {task: before[task] for task in ("trad", "li")}
    page = (tmp_path / "retrieval.html").read_text()
    assert page.count("<article>") == 6 * sum(len(rows) for rows in again.values())
    assert "learning rate" in page  # the log of the checkpoint's run


@pytest.mark.xdist_group("run")
def test_same_seed_same_run_and_resuming_is_the_same(run, mini, tmp_path):
    first = tmp_path / "again"
    options = ("recipes/mtl.py", "--data", mini, *QUICK, "--no-eval", "--output", first)
    assert recipe(*options, "--steps", "12", "--checkpoint-every", "5").returncode == 0
    losses = [row["stream_loss"] for row in lines(run / "log.jsonl")]
    weights = [(folder / "checkpoints/step-00000012/model.safetensors").read_bytes() for folder in (run, first)]
    assert weights[0] == weights[1]  # and so the same metrics
    assert [row["stream_loss"] for row in lines(first / "log.jsonl")] == losses
    # a run that was killed after its checkpoint at step 10
    (first / "checkpoints" / "latest").write_text("step-00000010\n")
    done = recipe(*options, "--steps", "12", "--checkpoint-every", "5", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 10" in done.stdout
    rows = lines(first / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["stream_loss"] for row in rows] == losses
    done = recipe(*options, "--steps", "12", "--resume", "--seed", "1")
    assert done.returncode == 2
    assert "has seed 0, this run has 1" in done.stderr


def test_two_ranks_share_each_batch(mini, tmp_path):
    done = recipe(
        "recipes/mtl.py", "--data", mini, *QUICK, "--steps", "8", "--no-eval", "--log-samples", "--output",
        tmp_path / "run", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [lines(tmp_path / "run" / f"samples.rank{rank}.jsonl") for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 24
    for a, b in zip(*ranks, strict=True):
        assert (a["step"], a["stream"]) == (b["step"], b["stream"])
        assert a["labels"]
        assert not set(a["labels"]) & set(b["labels"])
    assert len({row["stream"] for row in ranks[0]}) == 12


@pytest.mark.parametrize("settings", [pytest.param("zero1_bf16", marks=pytest.mark.slow), "zero3"])
def test_zero_stages_train_and_evaluate_alike(mini, tmp_path, settings):
    stages = ["zero0", settings]
    for stage in stages:
        done = recipe(
            "recipes/mtl.py", "--data", mini, *QUICK, "--steps", "2", "--tasks", "trad,t2i", "--deepspeed_config",
            f"recipes/deepspeed/{stage}.json", "--output", tmp_path / stage,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row["loss"] for row in lines(tmp_path / stage / "log.jsonl")] for stage in stages]
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if "bf16" in settings else 1e-5)
    weights = [load_file(checkpoint.find(tmp_path / stage) / "model.safetensors") for stage in stages]
    whole = [torch.cat([value.float().flatten() for _, value in sorted(part.items())]) for part in weights]
    assert (whole[1] - whole[0]).norm() < (1e-2 if "bf16" in settings else 1e-3) * whole[0].norm()
    metrics = [json.loads((tmp_path / stage / "metrics.json").read_text())["mean_mAP"] for stage in stages]
    assert metrics[1] == pytest.approx(metrics[0], abs=0.02)


def test_single_task_on_a_market_folder_with_24_identities(mini, tmp_path):
    """Any folder in Market-1501 layout; the batch shrinks to the identities there are, and says so."""
    from engine.data.mini import write_mini

    write_mini(tmp_path / "data", train_ids=24, test_ids=6, images_per_id=8, datasets=["market1501"])
    done = recipe(
        "recipes/stl.py", "--dataset", "market1501", "--data", tmp_path / "data", "--config", "irm_tiny", "--ids", "32",
        "--steps", "3", "--quick", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 identities per batch instead of 32" in done.stdout
    assert list(json.loads((tmp_path / "run" / "metrics.json").read_text())["tasks"]) == ["trad"]
    # no task asks the picture tower: it begins and ends alike, and costs the optimiser nothing
    model = checkpoint.load_model(tmp_path / "run" / "checkpoints")[0]
    seed_everything(0)
    begun = IRM(model.config, model.instruct.text.config.vocab_size, {"trad/market1501": 24}).state_dict()
    still = {name for name, value in model.state_dict().items() if torch.equal(value, begun[name])}
    assert {name.split(".")[1] for name in still if name.startswith("instruct.")} == {"picture"}
    assert not [name for name in begun if name.startswith("instruct.picture.") and name not in still]
    moments = load_file(checkpoint.latest(tmp_path / "run" / "checkpoints") / "optimizer.safetensors")
    assert not [name for name in moments if "instruct.picture." in name]


def test_a_damaged_training_image_costs_that_image_only(mini, tmp_path):
    import shutil

    shutil.copytree(mini / "Market-1501-v15.09.15", tmp_path / "data" / "Market-1501-v15.09.15")
    images = sorted((tmp_path / "data" / "Market-1501-v15.09.15" / "bounding_box_train").glob("*.jpg"))
    images[3].write_bytes(images[3].read_bytes()[:100])
    done = recipe(
        "recipes/stl.py", "--dataset", "market1501", "--data", tmp_path / "data", *QUICK, "--ids", "12", "--steps", "8",
        "--no-eval", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = lines(tmp_path / "run" / "quarantine.jsonl")
    assert [row["path"] for row in rows] == [str(images[3])]
    assert rows[0]["reason"]


def test_sigterm_saves_and_leaves_with_its_code(mini, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "recipes/mtl.py", "--data", str(mini), *QUICK, "--steps", "5000", "--no-eval"]
    process = subprocess.Popen([*command, "--output", str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (output / "log.jsonl").exists() or not (output / "log.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    step = int(re.search(r"after step (\d+)", said)[1])
    assert (output / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/mtl.py", "--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["recipes/mtl.py", "--data", "MINI", "--steps", "0"], "--steps 0: expected at least 1"),
        (["recipes/mtl.py", "--data", "MINI", "--tasks", "trad,tea"], "--tasks tea: expected names among"),
        (["recipes/mtl.py", "--data", "MINI", "--config", "huge"], "--config huge: expected"),
        (["recipes/mtl.py", "--data", "MINI", "--image-size", "big"], "expected HEIGHTxWIDTH"),
        (["recipes/mtl.py", "--data", "MINI", "--resume", "--output", "TMP/none"], "--resume: no checkpoint"),
        (["recipes/mtl.py", "--data", "MINI", "--output", "/proc/run"], "--output /proc/run: cannot write"),
        (["recipes/mtl.py", "--data", "MINI", "--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["recipes/mtl.py", "--data", "MINI", "--wrong"], "unrecognized arguments: --wrong"),
        (["recipes/stl.py", "--data", "MINI", "--dataset", "mars"], "mars"),
        (["recipes/stl.py", "--data", "MINI", "--dataset", "ltcc", "--task", "tea"], "argument --task: invalid choice"),
        (["recipes/evaluate.py", "--data", "MINI", "--checkpoint", "TMP"], "no checkpoint there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(mini, tmp_path, arguments, message):
    arguments = [text.replace("MINI", str(mini)).replace("TMP", str(tmp_path)) for text in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "run")]
    done = recipe(*arguments)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(ours) == 1
    assert message in ours[0]
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("run")
def test_a_used_folder_is_refused(run, mini):
    done = recipe("recipes/mtl.py", "--data", mini, *QUICK, "--steps", "1", "--output", run)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert "Traceback" not in done.stderr
