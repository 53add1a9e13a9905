"""Canonical pair scores, counts and group maxima against every score, computed apart in numpy (test_topk)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topk import KINDS, METRICS, emulated, every_score, features, lane_sum, level  # noqa: F401

import kernels
from kernels import gallery as module
from kernels._library import extension


def case(Q=7, G=23, D=33, seed=0, kind="normal", most=5):
    """Queries, gallery, groups of both, and of each query up to `most` - 1 listed rows, in no order."""
    queries, gallery = features(Q, G, D, kind, seed)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most, (Q,), generator=generator) if G else torch.zeros(Q, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    listed = torch.randint(0, max(G, 1), (int(offsets[-1]),), generator=generator)
    groups = [torch.randint(0, 6, (n,), generator=generator) for n in (Q, G)]
    return queries, gallery, *groups, offsets, listed


def expected_counts(queries, gallery, query_group, gallery_group, offsets, listed, metric) -> torch.Tensor:
    scores, counts = every_score(queries, gallery, metric), []
    groups = gallery_group.numpy()
    for q in range(len(queries)):
        for row in listed[offsets[q] : offsets[q + 1]].tolist():
            ahead = (scores[q] > scores[q, row]) | ((scores[q] == scores[q, row]) & (np.arange(len(gallery)) < row))
            counts.append(int((ahead & (groups != query_group[q].item())).sum()))
    return torch.tensor(counts, dtype=torch.int64)


def expected_best(queries, gallery, groups, count, metric, query_keys=None, gallery_keys=None):
    scores = every_score(queries, gallery, metric)
    values = np.full((len(queries), count), -np.inf, np.float32)
    rows = np.full((len(queries), count), -1)
    for q in range(len(queries)):
        for row in range(len(gallery)):
            if query_keys is not None and bool((query_keys[q] == gallery_keys[row]).any()):
                continue
            group = groups[row]
            if rows[q, group] < 0 or scores[q, row] > values[q, group]:
                values[q, group], rows[q, group] = scores[q, row], row
    return torch.from_numpy(-values if metric == "l2" else values), torch.from_numpy(rows)


def test_sums_are_added_in_the_order_that_was_promised():
    rows = torch.randn(40, 77, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(np.sqrt(lane_sum(rows.double().numpy() ** 2)))
    assert torch.equal(kernels.prepare_gallery(rows).norms, expected)
    assert torch.equal(module.running_sum(rows.double().square()).sqrt(), expected)


def test_the_extension_is_built():
    assert extension() is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("function", [kernels.pair_scores, kernels.pair_scores_reference])
def test_every_bit_of_a_pairs_score(function, metric, kind):
    for dtype in (torch.float32, torch.float16) if kind != "wild" else (torch.float32,):
        queries, gallery, _, _, offsets, listed = case(kind=kind)
        gallery = gallery.to(dtype)
        scores = every_score(queries, gallery, metric) * (-1 if metric == "l2" else 1)
        owner = np.repeat(np.arange(len(queries)), offsets.diff().numpy())
        found = function(queries, gallery, offsets, listed, metric=metric)
        assert torch.equal(found, torch.from_numpy(scores[owner, listed.numpy()]))


@pytest.mark.parametrize("codes", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_counts_equal_loops(metric, kind, codes):
    given = case(9, 2600, 40, kind=kind, most=30)
    prepared = kernels.prepare_gallery(given[1], low_precision=codes)
    scores, counts = kernels.negatives_ahead(given[0], prepared, *given[2:], metric=metric)
    assert torch.equal(scores, kernels.pair_scores(given[0], given[1], *given[4:], metric=metric))
    assert torch.equal(counts, expected_counts(*given, metric))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_gpus_blocks_count_the_same(metric, kind, emulated):  # noqa: F811
    given = case(9, 2600, 40, kind=kind, most=30)
    assert torch.equal(kernels.negatives_ahead(*given, metric=metric)[1], expected_counts(*given, metric))
    many = case(2, 300, 8, kind=kind, most=6000)  # more than a block counts together
    assert len(many[5]) > 2100
    assert torch.equal(kernels.negatives_ahead(*many, metric=metric)[1], expected_counts(*many, metric))


def test_many_listed_rows():
    given = case(2, 3000, 8, most=6000)
    assert torch.equal(kernels.negatives_ahead(*given)[1], expected_counts(*given, "cosine"))


@pytest.mark.parametrize("metric", METRICS)
def test_references(metric):
    given = case(5, 200, 40)
    queries, gallery, query_group, gallery_group, offsets, listed = given
    scores = kernels.pair_scores(queries, gallery, offsets, listed, metric=metric)
    counts = kernels.count_ahead_reference(
        queries, gallery, query_group, gallery_group, offsets, scores, listed, metric=metric
    )
    assert torch.equal(counts, expected_counts(*given, metric))
    found = kernels.best_per_group_reference(queries, gallery, gallery_group, 7, metric=metric)
    expected = expected_best(queries, gallery, gallery_group, 7, metric)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("codes", [None, "int8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_best_of_every_group(metric, kind, codes):
    queries, gallery, _, gallery_group, _, _ = case(5, 900, 40, kind=kind)
    generator = torch.Generator().manual_seed(1)
    keys = [torch.randint(0, 3, (n, 2), generator=generator) for n in (5, 900)]
    keys[1][gallery_group == 4] = keys[0][2]  # nothing of group 4 for query 2
    prepared = kernels.prepare_gallery(gallery, low_precision=codes)
    for held in ((), keys):
        named = dict(zip(("query_keys", "gallery_keys"), held, strict=False))
        found = kernels.best_per_group(queries, prepared, gallery_group, 7, metric=metric, **named)
        expected = expected_best(queries, gallery, gallery_group, 7, metric, *held)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[1][2, 4] == -1  # and group 6 has no row
    keyed = kernels.prepare_gallery(gallery, keys=keys[1], low_precision=codes)
    again = kernels.best_per_group(queries, keyed, gallery_group, 7, metric=metric, query_keys=keys[0])
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert (found[1][:, 6] == -1).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    Q=st.integers(1, 6),
    G=st.integers(1, 200),
    D=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    kind=st.sampled_from(KINDS),
    codes=st.sampled_from([None, "int8", "bfloat16"]),
    most=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_anything_equals_loops(seed, Q, G, D, metric, kind, codes, most):
    given = case(Q, G, D, seed, kind, most)
    prepared = kernels.prepare_gallery(given[1], low_precision=codes)
    counts = kernels.negatives_ahead(given[0], prepared, *given[2:], metric=metric)[1]
    assert torch.equal(counts, expected_counts(*given, metric))
    best = kernels.best_per_group(given[0], prepared, given[3], 6, metric=metric)
    expected = expected_best(given[0], given[1], given[3], 6, metric)
    assert all(torch.equal(a, b) for a, b in zip(best, expected, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_instruction_sets_agree(which, level):  # noqa: F811
    level(which)
    if extension().simd_level() < which:
        pytest.skip("not on this processor")
    given = case(9, 3000, 97, most=30)
    assert torch.equal(kernels.negatives_ahead(*given)[1], expected_counts(*given, "cosine"))
    found = kernels.best_per_group(given[0], given[1], given[3], 6)
    assert torch.equal(found[1], expected_best(given[0], given[1], given[3], 6, "cosine")[1])


@pytest.mark.parametrize("Q", [3, 300])
def test_threads_and_blocks_do_not_matter(Q, monkeypatch):
    given = case(Q, 9000, 24, most=9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*kernels.negatives_ahead(*given), *kernels.best_per_group(*given[:2], given[3], 6)])
            assert torch.get_num_threads() == threads
        monkeypatch.setattr(module, "ROWS", 50)
        monkeypatch.setattr(module, "COLUMNS", 97)
        results.append([*kernels.negatives_ahead(*given), *kernels.best_per_group(*given[:2], given[3], 6)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("kind", ["normal", "equal", "whole"])
def test_counts_and_maxima_of_parts_make_the_whole(kind):
    queries, gallery, query_group, gallery_group, offsets, listed = case(8, 1000, 20, kind=kind)
    scores, whole = kernels.negatives_ahead(queries, gallery, query_group, gallery_group, offsets, listed)
    total, best = torch.zeros_like(whole), None
    for start, stop in ((0, 333), (333, 334), (334, 1000)):
        part = queries, gallery[start:stop]
        total += kernels.count_ahead(
            *part, query_group, gallery_group[start:stop], offsets, scores, listed, index_base=start
        )
        values, rows = kernels.best_per_group(*part, gallery_group[start:stop], 6)
        rows = torch.where(rows < 0, rows, rows + start)
        if best is None:
            best = values, rows
        else:  # later rows come after equal ones
            best = tuple(torch.where(values > best[0], new, old) for new, old in zip((values, rows), best, strict=True))
    assert torch.equal(total, whole)
    found = kernels.best_per_group(queries, gallery, gallery_group, 6)
    assert all(torch.equal(a, b) for a, b in zip(found, best, strict=True))


@pytest.mark.parametrize(("Q", "G", "D"), [(0, 5, 3), (4, 0, 3), (0, 0, 3), (3, 5, 1), (3, 40, 1536), (3, 5, 0)])
def test_sizes_at_the_edge(Q, G, D):
    given = case(Q, G, D)
    for metric in METRICS:
        scores, counts = kernels.negatives_ahead(*given, metric=metric)
        assert (scores.dtype, counts.dtype) == (torch.float32, torch.int64)
        assert torch.equal(counts, expected_counts(*given, metric))
        found = kernels.best_per_group(given[0], given[1], given[3], 6, metric=metric)
        expected = expected_best(given[0], given[1], given[3], 6, metric)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_strided_and_empty():
    queries, gallery, *groups, offsets, listed = case()
    want = kernels.negatives_ahead(queries, gallery, *groups, offsets, listed)
    strided = gallery.repeat_interleave(2, 0)[::2]
    groups[1] = groups[1].repeat_interleave(2)[::2]
    found = kernels.negatives_ahead(queries.T.contiguous().T, strided, *groups, offsets, listed)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    nothing = kernels.pair_scores(queries, gallery, torch.zeros_like(offsets), listed[:0])
    assert nothing.shape == (0,)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(7, 4), "queries: expected"),
        (1, torch.zeros(23, 33, dtype=torch.float64), "gallery: expected"),
        (1, torch.full((23, 33), torch.nan), "gallery: expected finite numbers"),
        (2, torch.zeros(7), "query_group: expected"),
        (3, torch.zeros(7, dtype=torch.int64), "gallery_group: expected"),
        (4, torch.zeros(3, dtype=torch.int64), "offsets: expected"),
        (4, torch.arange(8), "offsets: expected"),
        (5, torch.full((99,), 23), "offsets: expected"),
    ],
)
def test_errors_name_the_argument(place, value, message):
    given = list(case())
    given[place] = value
    with pytest.raises(ValueError, match=message):
        kernels.negatives_ahead(*given)


def test_numbers_out_of_range():
    queries, gallery, query_group, gallery_group, offsets, listed = case()
    thresholds = torch.zeros(len(listed))
    thresholds[1] = torch.nan
    with pytest.raises(ValueError, match="thresholds: expected scores, got NaN"):
        kernels.count_ahead(queries, gallery, query_group, gallery_group, offsets, thresholds, listed)
    with pytest.raises(ValueError, match=r"gallery_group: expected numbers in 0\.\.4"):
        kernels.best_per_group(queries, gallery, gallery_group, 5)
    listed[0] = 23
    with pytest.raises(ValueError, match="positives: expected"):
        kernels.pair_scores(queries, gallery, offsets, listed)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_gpu_returns_the_same_bits(metric, kind):
    given = case(64, 5000, 96, kind=kind, most=40)
    on_gpu = [tensor.cuda() for tensor in given]
    expected = [*kernels.negatives_ahead(*given, metric=metric), *kernels.best_per_group(*given[:2], given[3], 6)]
    for codes in (None, "bfloat16"):
        prepared = kernels.prepare_gallery(on_gpu[1], low_precision=codes)
        found = [
            *kernels.negatives_ahead(on_gpu[0], prepared, *on_gpu[2:], metric=metric),
            *kernels.best_per_group(on_gpu[0], prepared, on_gpu[3], 6),
        ]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
