"""Sampling is a pure function: coverage, disjointness, independence of rank count, resumption."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.data.index import Index, find_indexes
from engine.data.sampler import ROUNDS, Sampler, Stream, make_streams, permute
from engine.errors import InputError
from engine.tasks import TASKS


def stream(identities=24, images=(5, 6, 7), task="trad", number=0, infrared=0):
    """A stream whose row numbers tell the label: row = label * 100 + image."""
    counts = [images[label % len(images)] for label in range(identities)]
    rows = np.concatenate([label * 100 + np.arange(count) for label, count in enumerate(counts)])
    modality = np.zeros(identities * 100, dtype=np.int8)
    for label, count in enumerate(counts):
        modality[label * 100 + count - infrared : label * 100 + count] = 1
    index = SimpleNamespace(name="drawn", modality=modality)
    return Stream(number, TASKS[task], index, rows, np.append(0, np.cumsum(counts)))


def sampler(streams, world=1, ids=16, images_per_id=4, seed=3):
    return Sampler(tuple(streams), seed=seed, ids=ids, images_per_id=images_per_id, world=world)


@pytest.mark.parametrize("n", [1, 2, 3, 24, 77, 150, 751, 10_000])
def test_permute_is_a_permutation(n):
    keys = np.random.default_rng(n).integers(1 << 32, size=ROUNDS, dtype=np.uint64)
    assert np.array_equal(np.sort(permute(np.arange(n), n, keys)), np.arange(n))
    if n > 20:
        assert not np.array_equal(permute(np.arange(n), n, keys), np.arange(n))
        other = permute(np.arange(n), n, keys + np.uint64(1))
        assert np.mean(other == permute(np.arange(n), n, keys)) < 0.2


@pytest.mark.parametrize("identities", [24, 77, 150, 751])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_an_epoch_visits_every_identity_once(identities, world):
    one = sampler([stream(identities)], world)
    P = one.batches[0][0]
    assert P % world == 0
    batches = -(-identities // P)
    orders, fillings = [], []
    for epoch in (0, 1):
        drawn = [one.identities(one.streams[0], epoch * batches + batch) for batch in range(batches)]
        for labels in drawn:
            assert len(set(labels.tolist())) == P  # no identity twice in a batch, the filled one included
        visited, filling = np.split(np.concatenate(drawn), [identities])
        assert np.array_equal(np.sort(visited), np.arange(identities))
        orders.append(visited.tolist())
        fillings.append(filling.tolist())
    last = orders[0][(batches - 1) * P :]
    assert fillings[0] == [label for label in orders[1] if label not in last][: len(fillings[0])]  # the next epoch's
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_same_global_batch(world):
    streams = [stream(24), stream(32, task="ctcc", number=1)]
    alone, together = sampler(streams), sampler(streams, world)
    assert alone.batches == together.batches
    for step in range(12):
        whole = alone.sample(step)
        parts = [together.sample(step, rank) for rank in range(world)]
        assert {part.stream.name for part in parts} == {whole.stream.name}
        assert {part.sentence for part in parts} == {whole.sentence}
        for name in ("rows", "labels", "instruction_rows", "choice"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        for i in range(4):
            both = np.concatenate([part.augmentation[i] for part in parts])
            assert np.array_equal(both, whole.augmentation[i])
        sets = [set(part.labels.tolist()) for part in parts]
        assert sum(map(len, sets)) == len(set.union(*sets))


def test_a_step_does_not_depend_on_those_before():
    streams = [stream(77), stream(24, number=1)]
    straight = sampler(streams)
    before = [straight.sample(step) for step in range(20)]
    for step in (19, 3, 11):
        again = sampler(streams).sample(step)
        assert np.array_equal(again.rows, before[step].rows)
        assert np.array_equal(again.augmentation.erase, before[step].augmentation.erase)
    other = sampler(streams, seed=4).sample(3)
    assert not np.array_equal(other.rows, before[3].rows)


def test_every_stream_once_per_cycle():
    streams = [stream(24, number=i) for i in range(5)]
    one = sampler(streams)
    for cycle in range(6):
        located = [one.locate(cycle * 5 + place) for place in range(5)]
        assert {item.number for item, _ in located} == set(range(5))
        assert {occurrence for _, occurrence in located} == {cycle}


def test_shares_and_the_leaders_head_start():
    streams = [stream(number=number, task=task) for number, task in enumerate(("trad", "trad", "cc", "vi"))]
    one = Sampler(tuple(streams), seed=3, ids=16, images_per_id=4, shares={"vi": 3}, leaders=("trad",), ahead=2)
    located = [(item.number, occurrence) for item, occurrence in map(one.locate, range(4 + 2 * 6))]
    assert sorted(located[:4]) == [(0, 0), (0, 1), (1, 0), (1, 1)]  # the leaders alone, each twice
    for cycle in range(2):  # then each once per cycle, vi three times; no occurrence is skipped or used twice
        part = sorted(located[4 + 6 * cycle : 10 + 6 * cycle])
        assert part == [(0, 2 + cycle), (1, 2 + cycle), (2, cycle), *((3, 3 * cycle + i) for i in range(3))]


def test_visible_infrared_training_mostly_drops_colour():
    one = sampler([stream(task="vi", infrared=3)])
    channels = np.concatenate([one.sample(step).augmentation.channels for step in range(50)])
    coloured = (channels == [0, 1, 2]).all(1)
    assert 0.13 < coloured.mean() < 0.17
    assert set(channels[~coloured][:, 0]) == {0, 1, 2}
    assert (channels[~coloured] == channels[~coloured][:, :1]).all()


def test_steps_and_streams_draw_anew():
    streams = [stream(24, number=i, task="li") for i in range(5)]
    one = sampler(streams, ids=24)
    orders = {tuple(one.locate(cycle * 5 + place)[0].number for place in range(5)) for cycle in range(20)}
    assert len(orders) > 10
    drawn = [one.sample(step) for step in range(100)]
    assert {item.sentence for item in drawn} == set(range(20))
    choices = np.concatenate([item.choice for item in drawn])
    assert choices.min() >= 0
    assert choices.max() < 1
    assert np.histogram(choices, 4, (0, 1))[0].min() > 0.2 * len(choices)
    for step in range(0, 10, 5):  # the streams of one cycle, and the next one of each
        batches = [tuple(item.labels) for item in drawn[step : step + 10]]
        assert len(set(batches)) == 10
    own = [item for item in drawn if item.stream.number == 2]
    assert len({item.augmentation.shift.tobytes() for item in own}) == len(own)
    images = [tuple(item.rows[item.labels == 7]) for item in own]  # every batch holds all 24 identities
    assert len(set(images)) > len(own) // 2


def test_rows_belong_to_labels_and_do_not_repeat():
    one = sampler([stream(24, images=(5, 2))])
    for step in range(6):
        drawn = one.sample(step)
        assert np.array_equal(drawn.rows // 100, drawn.labels)
        for label in set(drawn.labels.tolist()):
            rows = drawn.rows[drawn.labels == label]
            assert len(set(rows.tolist())) == (4 if label % 2 == 0 else 2)  # repeats only where there are too few


def test_both_modalities_of_each_identity():
    one = sampler([stream(24, images=(6, 7), task="vi", infrared=3)])
    drawn = one.sample(0)
    infrared = one.streams[0].index.modality[drawn.rows].reshape(-1, 4)
    assert (infrared.sum(1) == 2).all()


def test_half_of_the_images_ask_for_the_clothes_of_the_other_half():
    drawn = sampler([stream(24, task="li")]).sample(0)
    rows, asked = drawn.rows.reshape(-1, 4), drawn.instruction_rows.reshape(-1, 4)
    assert np.array_equal(rows[:, 2:], asked[:, 2:])
    assert all(set(a[:2]) <= set(r[2:]) for a, r in zip(asked.tolist(), rows.tolist(), strict=True))


def test_text_pairs_come_from_different_identities():
    one = sampler([stream(100, task="t2i")])
    assert one.batches == [(64, 1)]
    labels = one.sample(0).labels
    assert len(set(labels.tolist())) == len(labels) == 64


def test_a_short_stream_shrinks_the_batch_and_says_so():
    one = sampler([stream(24)], world=5, ids=32)
    assert one.batches == [(20, 4)]
    assert len(one.notes) == 1
    assert "20 identities per batch instead of 32" in one.notes[0]
    with pytest.raises(InputError, match="use fewer ranks"):
        sampler([stream(3)], world=4)


def test_a_replacement_is_another_image_of_the_identity():
    one = sampler([stream(24)])
    row = int(one.sample(7).rows[5])
    chosen = {one.replacement(7, 5, row, attempt) for attempt in range(20)}
    assert row not in chosen
    assert len(chosen) > 1
    assert {item // 100 for item in chosen} == {row // 100}
    assert one.replacement(7, 5, row, 0) == one.replacement(7, 5, row, 0)


def test_augmentation_is_as_stated():
    parts = [sampler([stream(24)]).sample(step).augmentation for step in range(50)]
    flip, shift, erase, _, channels = (np.concatenate(column) for column in zip(*parts, strict=True))
    assert (channels == [0, 1, 2]).all()
    assert set(flip) == {0, 1}
    assert 0.45 < flip.mean() < 0.55
    assert np.abs(shift).max() <= 1
    area = erase[:, 2] * erase[:, 3]
    assert 0.45 < (area > 0).mean() < 0.55
    assert area[area > 0].min() > 0.015
    assert area.max() < 0.41
    assert (erase[:, :2] + erase[:, 2:] <= 1).all()


def test_the_same_in_another_process(mini):
    code = (
        "import sys, hashlib; from pathlib import Path; from engine.data.index import find_indexes;"
        "from engine.data.sampler import *; from engine.tasks import TASKS;"
        "s = Sampler(make_streams(find_indexes(Path(sys.argv[1])), tuple(TASKS)), seed=1, ids=4, images_per_id=4);"
        "print(hashlib.sha256(b''.join(s.sample(i).rows.tobytes() for i in range(30))).hexdigest())"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", code, str(mini)],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert results[0] == results[1] != ""


def test_streams_of_the_drawn_data(mini):
    streams = make_streams(find_indexes(Path(mini)), tuple(TASKS))
    assert {item.task.name for item in streams} == set(TASKS)
    for item in streams:
        for label in range(item.identities):
            rows = item.rows[item.starts[label] : item.starts[label + 1]]
            assert len(set(item.index.pid[rows].tolist())) == 1
        assert len(set(item.index.pid[item.rows].tolist())) == item.identities
    (li,) = (item for item in streams if item.task.name == "li")
    silent, spoken = li.rows[li.starts[0]], li.rows[li.starts[0] + 1 :]
    captions = [[] if row == silent else li.index.captions(row) for row in range(len(li.index))]
    column = li.index.table.schema.get_field_index("captions")
    table = li.index.table.set_column(
        column, "captions", make_table({"path": [""] * len(captions), "captions": captions})["captions"]
    )
    (described,) = make_streams([Index(li.index.dataset, li.index.root, table)], ("li",))
    assert set(described.rows.tolist()) == {*spoken.tolist()}  # an image without a description cannot be asked for
    with pytest.raises(InputError, match="nothing to train"):
        make_streams(find_indexes(Path(mini), ["market1501"]), ("vi",))
