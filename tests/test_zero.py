"""What DeepSpeed is relied on for."""

import json

import pytest
from conftest import forked, options, recipe


def test_a_window_is_the_weighted_sum_of_its_streams():
    """Every parameter: the mean over the window of weight x gradient, but for one rounding to float32."""
    done = recipe("tests/gradients.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["idle"] == ["picture"]  # the tower of a task that is not in the window: gradients of 0
    assert found["error"] < 6e-8
    assert found["norm"] == pytest.approx(1, abs=6e-8)
    assert found["rates"] == {"old": pytest.approx(1, rel=1e-2), "new": pytest.approx(7, rel=1e-2)}


@pytest.mark.slow  # tests/test_equality.py says the same of every gradient
def test_two_ranks_compute_what_one_does(mini, tmp_path):
    """With --global-losses every term of the first two steps, so the gradient of the first as well."""
    common = {"steps": 2, "global_losses": True, "tasks": ["trad", "li", "t2i"]}
    common["datasets"] = ["market1501", "cuhk_pedes", "cocas"]
    cases = [(stage, ranks) for stage in range(4) for ranks in (1, 2)]
    forked(
        tmp_path,
        [
            {"ranks": ranks, "change": options(mini, tmp_path / f"{stage}{ranks}", stage, **common)}
            for stage, ranks in cases
        ],
    )
    rows = {
        case: [json.loads(line) for line in (tmp_path / f"{case[0]}{case[1]}" / "log.jsonl").open()] for case in cases
    }
    for stage in range(4):
        for one, two in zip(rows[stage, 1], rows[stage, 2], strict=True):
            assert one["streams"] == two["streams"]
            assert {"contrastive", "match", "triplet_cls", "id_fout"} <= set(one["terms"])
            for name, value in one["terms"].items():
                assert two["terms"][name] == pytest.approx(value, rel=2e-4), name
            assert two["stream_loss"] == pytest.approx(one["stream_loss"], rel=2e-4)
