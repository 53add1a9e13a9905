"""Runs that are killed and resumed: the same numbers to the last bit, on other numbers of ranks the same samples."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import SMALL, forked, options
from safetensors.torch import load_file

from engine import checkpoint
from engine.config import TrainConfig
from engine.schedule import learning_rate

LOGGED = ("step", "streams", "loss", "stream_loss", "terms", "lr", "grad_norm", "skipped")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(output: Path) -> list[dict]:
    """Everything of log.jsonl but times."""
    return [{name: row[name] for name in LOGGED} for row in lines(output / "log.jsonl")]


def killed_and_resumed(mini: Path, folder: Path, stage: int, ranks: int, **change) -> list[dict]:
    """A run of 40 steps; another that is killed when step 13 is logged; and that one resumed."""
    straight = options(mini, folder / f"straight{stage}{ranks}", stage, **change)
    broken = options(mini, folder / f"broken{stage}{ranks}", stage, **change)
    return [
        {"ranks": ranks, "change": straight},
        {"ranks": ranks, "change": broken, "kill_at": 13, "code": -9},
        {"ranks": ranks, "change": {**broken, "resume": True}},
    ]


def assert_equal_runs(folder: Path, stage: int, ranks: int) -> None:
    straight, broken = folder / f"straight{stage}{ranks}", folder / f"broken{stage}{ranks}"
    assert [row["step"] for row in losses(straight)] == list(range(1, 41))
    assert losses(broken) == losses(straight)
    config = TrainConfig.from_json((straight / "config.json").read_text())
    assert all(row["lr"] == learning_rate(row["step"] - 1, config) for row in losses(straight))
    for file in ("model.safetensors", "optimizer.safetensors"):
        files = [(folder / "checkpoints" / "step-00000040" / file).read_bytes() for folder in (straight, broken)]
        assert files[0] == files[1], file


FAST = [(0, 1), (1, 2)]
CHANGES: dict = {(0, 1): {"ema": 0.9}, (1, 2): {"model": asdict(replace(SMALL, depth=2, drop_path=0.5))}}
REST = [(stage, ranks) for stage in range(4) for ranks in (1, 2) if (stage, ranks) not in FAST]
ACROSS = {"steps": 12, "checkpoint_every": 6, "log_samples": True, "global_losses": True}
# The learning rate depends on the number of steps, which differs between the parts of a run here: held by a warm-up.
ACROSS |= {"warmup": 1000, "lr_start": 1e-3}
EVALUATED = {"evaluate": True, "quick": True, "eval_every": 2, "steps": 6, "checkpoint_every": 2, "keep": 9}
EVALUATED |= {"tasks": ["trad"], "datasets": ["market1501"]}


@pytest.fixture(scope="session")
def runs(mini, tmp_path_factory) -> tuple[Path, str]:
    """All the trainings of the fast tests, one after another in one go, and what they said."""
    folder = tmp_path_factory.mktemp("runs")
    plan = [run for case in FAST for run in killed_and_resumed(mini, folder, *case, **CHANGES[case])]
    plan.append({"change": options(mini, folder / "one", **ACROSS)})
    for before, after, stages in ((1, 2, (0, 2)), (2, 1, (3, 0))):
        first = options(mini, folder / f"{before}{after}", stages[0], **{**ACROSS, "steps": 6})
        then = options(mini, folder / f"{before}{after}", stages[1], **ACROSS, resume=True)
        plan += [{"ranks": before, "change": first}, {"ranks": after, "change": then}]
    plan.append({"change": options(mini, folder / "averaged", steps=2, checkpoint_every=1, ema=0.9)})
    evaluated = options(mini, folder / "evaluated", **EVALUATED)
    plan += [{"change": evaluated}, {"change": {**evaluated, "resume": True}, "back": "step-00000002"}]
    lost = {"ranks": 2, "change": options(mini, folder / "lost"), "kill_at": 6, "kill": [1], "codes": [2, -9]}
    stages = [{"change": options(mini, folder / f"stage{stage}", stage, steps=8)} for stage in range(4)]
    return folder, forked(folder, [*plan, *stages, lost])


together = pytest.mark.xdist_group("runs")


@together
@pytest.mark.parametrize(("stage", "ranks"), FAST)
def test_forty_steps_are_thirteen_a_kill_and_the_rest(runs, stage, ranks):
    assert_equal_runs(runs[0], stage, ranks)


@together
def test_averaged_weights_go_on_as_well(runs):
    averages = sorted(runs[0].glob("*/checkpoints/step-00000040/average.safetensors"))
    assert [file.parts[-4] for file in averages] == ["broken01", "straight01"]
    one, other = (load_file(file) for file in averages)
    weights = load_file(averages[0].with_name("model.safetensors"))
    assert all(one[name].equal(other[name]) for name in one)
    assert one.keys() == weights.keys()
    assert not one["edit.blocks.0.attn.qkv.weight"].equal(weights["edit.blocks.0.attn.qkv.weight"])
    model = checkpoint.load_model(averages[0].parent)[0]  # what an evaluation takes
    assert all(value.equal(one[name]) for name, value in model.state_dict().items())


@together
def test_averages_count_the_steps(runs):
    folder = runs[0] / "averaged" / "checkpoints"
    first, second = (load_file(folder / f"step-0000000{step}" / "average.safetensors") for step in (1, 2))
    weights = load_file(folder / "step-00000002" / "model.safetensors")
    for name, value in second.items():
        if value.is_floating_point():
            assert value.sub(first[name].lerp(weights[name], 10 / 12)).abs().max() < 1e-6, name


@together
def test_what_a_kill_left_unmeasured_is_measured(runs):
    """From the checkpoint of a step that --eval-every wants measured: as if nothing had happened."""
    before, after = (lines(runs[0] / "evaluated" / f"{name}.jsonl") for name in ("before", "evaluations"))
    assert [row["step"] for row in before] == [2, 4, 6]
    assert before == after


@pytest.mark.slow
def test_under_every_zero_stage(mini, tmp_path):
    forked(tmp_path, [run for case in REST for run in killed_and_resumed(mini, tmp_path, *case)])
    for case in REST:
        assert_equal_runs(tmp_path, *case)


@together
def test_another_number_of_ranks_goes_on_with_the_same_samples(runs):
    """1 -> 2 and 2 -> 1 ranks, and from one ZeRO stage to another. With the losses of all ranks together the numbers
    are the same up to the order of sums."""
    folder, said = runs
    assert "resumed after step 6, then of 1 rank(s)" in said
    assert "resumed after step 6, then of 2 rank(s)" in said

    def samples(output: Path) -> list[tuple]:
        """Per micro-step: stream and the images of all ranks."""
        ranks = [lines(file) for file in sorted(output.glob("samples.rank*.jsonl"))]
        found: dict[tuple, list[int]] = {}
        for rank in ranks:
            count: dict[int, int] = {}
            for row in rank:
                number = count[row["step"]] = count.get(row["step"], 0) + 1
                found.setdefault((row["step"], number, row["stream"]), []).extend(row["rows"])
        return [(*key, rows) for key, rows in sorted(found.items())]

    want = samples(folder / "one")
    assert len(want) == 24
    for name in ("12", "21"):
        assert samples(folder / name) == want
        rows = losses(folder / name)
        assert [row["step"] for row in rows] == list(range(1, 13))
        for one, other in zip(losses(folder / "one"), rows, strict=True):
            assert other["stream_loss"] == pytest.approx(one["stream_loss"], rel=2e-3)


@pytest.mark.slow
def test_twenty_kills_of_the_writer(mini, tmp_path):
    """A checkpoint after every step, a kill at a random moment of any: `latest` always opens, and at the end the run is
    what one without kills is."""
    chance = random.Random(0)
    common = {"steps": 200, "checkpoint_every": 1}
    broken = options(mini, tmp_path / "broken", **common)
    plan: list[dict] = [{"change": options(mini, tmp_path / "straight", **common)}]
    for number in range(20):
        after = chance.uniform(0, 0.1)
        change = broken | {"resume": number > 0}
        plan.append({"change": change, "kill_at": 2, "after": after, "code": -9, "check": True})
    plan.append({"change": broken | {"resume": True}})
    forked(tmp_path, plan)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    weights = [load_file(checkpoint.find(tmp_path / name) / "model.safetensors") for name in ("straight", "broken")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    left = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert left == ["latest", "step-00000199", "step-00000200"]


@together
def test_a_lost_rank_ends_the_others_with_one_line(runs):
    [said] = [line for line in runs[1].splitlines() if line.startswith("error: ")]
    assert "another rank is gone" in said
    assert "--resume goes on from" in said
    assert "step-00000005" in said


@together
def test_zero_stages_have_the_same_losses(runs):
    rows = [losses(runs[0] / f"stage{stage}") for stage in range(4)]
    for other in rows[1:]:
        for one, two in zip(rows[0], other, strict=True):
            assert two["stream_loss"] == pytest.approx(one["stream_loss"], rel=1e-4)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
