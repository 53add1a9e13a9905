"""kernels.topk against a sort of every score, computed apart in numpy; precisions, instruction sets, blocks."""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import candidates, leading, narrow
from kernels import gallery as module
from kernels._library import extension

search = importlib.import_module("kernels.topk")  # the package's attribute is the function
METRICS = ["cosine", "ip", "l2"]
LEVELS = range(3)  # plain, AVX2, AVX-512: as far as the processor goes


def lane_sum(terms: np.ndarray) -> np.ndarray:
    """[.., D] -> [..]: 32 running sums, added in pairs 16, 8, 4, 2, 1 apart, as csrc/score.h promises."""
    lanes = np.zeros((*terms.shape[:-1], 32))
    for i in range(terms.shape[-1]):
        lanes[..., i % 32] += terms[..., i]
    for apart in (16, 8, 4, 2, 1):
        lanes = lanes[..., :apart] + lanes[..., apart : 2 * apart]
    return lanes[..., 0]


def every_score(queries, gallery, metric: str) -> np.ndarray:
    """[Q, G] float32, greater = nearer."""
    q, g = (part.double().numpy() for part in (queries, gallery))
    with np.errstate(over="ignore"):  # a score may be beyond float32
        return _every_score(q, g, metric)


def _every_score(q: np.ndarray, g: np.ndarray, metric: str) -> np.ndarray:
    if metric == "l2":
        return -lane_sum((q[:, None] - g[None]) ** 2).astype(np.float32)
    dot = lane_sum(q[:, None] * g[None])
    if metric == "ip":
        return dot.astype(np.float32)
    norm = np.sqrt(lane_sum(q * q))[:, None] * np.sqrt(lane_sum(g * g))[None]
    return np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0).astype(np.float32)


def sorted_out(queries, gallery, k, metric, query_keys=None, gallery_keys=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What topk returns, by sorting every query's admissible rows."""
    scores = every_score(queries, gallery, metric)
    worst = -np.inf if metric != "l2" else np.inf
    values = np.full((len(queries), k), worst, np.float32)
    rows = np.full((len(queries), k), -1)
    for q in range(len(queries)):
        kept = np.arange(len(gallery))
        if query_keys is not None:
            columns = zip(query_keys[q].reshape(-1), gallery_keys.reshape(len(gallery), -1).T, strict=True)
            kept = kept[~np.any([column.numpy() == key.item() for key, column in columns], axis=0)]
        best = kept[np.lexsort((kept, -scores[q, kept]))][:k]
        values[q, : len(best)] = -scores[q, best] if metric == "l2" else scores[q, best]
        rows[q, : len(best)] = best
    return torch.from_numpy(values), torch.from_numpy(rows)


def same(found, expected) -> bool:
    return torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.fixture
def level():
    """Sets how far the instruction set may go, and puts it back."""
    yield extension().limit_simd
    extension().limit_simd(2)


@pytest.fixture
def emulated(monkeypatch):
    """The blocks that a GPU runs, emulated, in the place of the CPU's own form; lists have a GPU block's room."""
    for name in ("topk_tile", "topk_finish", "count_tile"):
        monkeypatch.setattr(extension(), f"{name}_cpu", getattr(extension(), f"{name}_emulated"))


NARROW = {"int16": torch.int16, "float16": torch.float16}
PLANS = [*NARROW, "leading", "leading int16", "leading float16"]


@functools.cache
def any_directions(D: int) -> torch.Tensor:
    """Of random rows; finding each gallery's own takes long where features are many."""
    return leading.directions_of(torch.randn(2 * D, D, generator=torch.Generator().manual_seed(2)))


def multiply_in(kind: str | None, patch: pytest.MonkeyPatch) -> None:
    """Searches multiply by one of PLANS, whatever is faster, however few the queries and near the scores are; otherwise
    as they are asked to."""
    words = (kind or "").split()
    dtype = NARROW.get(words[-1] if words else "", torch.float32)

    def plan(queries, norms, gallery, k, metric, rows):
        if kind not in PLANS or metric == "l2" or gallery.codes is not None or 0 in gallery.shape:
            return None
        if "leading" in words and gallery.leading is None:
            D = gallery.shape[1]
            directions = any_directions(D) if D > 256 else leading.directions_of(gallery.features)
            gallery.leading = leading.leading_of(gallery.features, gallery.norms, directions)
        return candidates.Plan(dtype, gallery.leading if "leading" in words else None)

    patch.setattr(search, "plan", plan)
    if dtype != torch.float32:
        patch.setattr(narrow, "narrow_type", lambda device: dtype)


@pytest.fixture(params=["float32", "int16", "float16", "leading", "leading int16"])
def multiplied(request, monkeypatch):
    """How a search multiplies."""
    multiply_in(request.param, monkeypatch)
    return request.param


def features(Q, G, D, kind="normal", seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "whole":  # products and sums are exact in any order, and many scores are equal
        return (torch.randint(-2, 3, (n, D), generator=generator).float() for n in (Q, G))
    queries, gallery = torch.randn(Q, D, generator=generator), torch.randn(G, D, generator=generator)
    if kind == "near":  # scores that float32 cannot tell apart, float64 can
        gallery = gallery[:1] + 2.0**-20 * gallery
    if kind == "repeated":
        gallery = gallery[torch.randint(0, min(7, G), (G,), generator=generator)]
    if kind == "sorted":
        gallery = gallery[(gallery @ queries[0]).argsort()]
    if kind == "led":  # three quarters of the features hardly matter
        falling = 0.1 ** torch.arange(D).float().clamp(max=30)
        queries, gallery = queries * falling, gallery * falling
    if kind == "equal":
        gallery = gallery[:1].expand(G, D).contiguous()
    if kind == "wild":  # norms from 1e-30 to 1e30, and zero
        gallery *= 10.0 ** torch.randint(-30, 31, (G, 1), generator=generator)
        queries *= 10.0 ** torch.randint(-30, 31, (Q, 1), generator=generator)
        gallery[:3], queries[:1] = 0, 0
    return queries, gallery


KINDS = ["normal", "whole", "near", "repeated", "sorted", "led", "equal", "wild"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_a_sort(metric, kind, multiplied):
    for Q, G, D, k in ((5, 3000, 20, 7), (3, 1500, 70, 600)):
        queries, gallery = features(Q, G, D, kind)
        assert same(kernels.topk(queries, gallery, k, metric=metric), sorted_out(queries, gallery, k, metric))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_gpus_blocks_equal_a_sort(metric, kind, emulated, monkeypatch):
    """The last block has fewer queries; a tile's columns in one share, and in shares with lists of their own."""
    for (Q, G, D, k), split, kinds in (
        ((5, 9000, 20, 7), 1, None),
        ((5, 9000, 20, 7), 1, "float16"),
        ((5, 9000, 20, 7), 3, None),
        ((3, 9000, 33, 1500), 2, None),
    ):
        multiply_in(kinds, monkeypatch)
        monkeypatch.setattr(search, "split_of", lambda queries, device, split=split: split)
        queries, gallery = features(Q, G, D, kind)
        assert same(kernels.topk(queries, gallery, k, metric=metric), sorted_out(queries, gallery, k, metric))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_galleries(metric, dtype, multiplied):
    queries, gallery = features(6, 2500, 40)
    gallery[7] = torch.finfo(dtype).smallest_normal / 4  # below what is normal
    gallery, asked = gallery.to(dtype), queries.to(dtype)
    for each in (queries, asked):
        assert same(kernels.topk(each, gallery, 9, metric=metric), sorted_out(each, gallery, 9, metric))


@pytest.mark.parametrize("codes", ["int8", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_changes_nothing(kind, codes):
    for metric in METRICS:
        for dtype in (torch.float32, torch.float16) if kind != "wild" else (torch.float32,):
            queries, gallery = features(5, 2500, 70, kind)
            gallery = gallery.to(dtype)
            prepared = kernels.prepare_gallery(gallery, low_precision=codes)
            assert prepared.codes is not None
            found = kernels.topk(queries, prepared, 11, metric=metric)
            assert same(found, sorted_out(queries, gallery, 11, metric))


@pytest.mark.parametrize("which", LEVELS)
def test_instruction_sets_agree(which, level, multiplied):
    level(which)
    if extension().simd_level() < which:
        pytest.skip("not on this processor")
    for metric in METRICS:
        queries, gallery = features(9, 3000, 97)
        for codes in (None, "int8"):
            prepared = kernels.prepare_gallery(gallery, low_precision=codes)
            found = kernels.topk(queries, prepared, 20, metric=metric)
            assert same(found, sorted_out(queries, gallery, 20, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_references(metric):
    queries, gallery = features(5, 300, 70)
    keys = torch.arange(5) % 3, torch.arange(300) % 3
    found = kernels.topk_reference(queries, gallery, 9, metric=metric, query_keys=keys[0], gallery_keys=keys[1])
    assert same(found, sorted_out(queries, gallery, 9, metric, *keys))


def test_excluded_by_any_key(multiplied):
    queries, gallery = features(20, 3000, 16)
    generator = torch.Generator().manual_seed(1)
    query_keys = torch.randint(0, 4, (20, 2), generator=generator)
    gallery_keys = torch.randint(0, 4, (3000, 2), generator=generator)
    expected = sorted_out(queries, gallery, 30, "cosine", query_keys, gallery_keys)
    found = kernels.topk(queries, gallery, 30, query_keys=query_keys, gallery_keys=gallery_keys)
    assert same(found, expected)
    prepared = kernels.prepare_gallery(gallery, keys=gallery_keys)
    assert same(kernels.topk(queries, prepared, 30, query_keys=query_keys), expected)
    one = kernels.topk(queries, gallery, 30, query_keys=query_keys[:, 1], gallery_keys=gallery_keys[:, 1])
    assert same(one, sorted_out(queries, gallery, 30, "cosine", query_keys[:, 1:], gallery_keys[:, 1:]))
    assert not same(one, expected)


def test_all_excluded_but_one(emulated):
    _all_excluded_but_one()


def test_all_excluded_but_one_on_the_cpu(multiplied):
    _all_excluded_but_one()


def _all_excluded_but_one():
    queries, gallery = features(4, 5000, 8, "sorted")
    keys = torch.zeros(5000, dtype=torch.int64)
    keys[[17, 4321, 0, 4999]] = torch.tensor([1, 2, 3, 4])
    for metric, worst in (("ip", -torch.inf), ("l2", torch.inf)):
        values, rows = kernels.topk(
            queries, gallery, 3, metric=metric, query_keys=torch.zeros(4, dtype=torch.int64), gallery_keys=keys
        )
        expected = sorted_out(queries, gallery, 3, metric, torch.zeros(4, 1, dtype=torch.int64), keys[:, None])
        assert same((values, rows), expected)
        alone = kernels.topk(
            queries[:1], gallery, 3, metric=metric,
            query_keys=torch.zeros(1, dtype=torch.int64), gallery_keys=(torch.arange(5000) == 99).long(),
        )  # fmt: skip
        assert alone[1].tolist() == [[99, -1, -1]]
        assert alone[0][0, 1:].tolist() == [worst, worst]


@pytest.mark.parametrize(("Q", "G", "D"), [(0, 5, 3), (4, 0, 3), (0, 0, 3), (3, 5, 1), (3, 40, 1536), (3, 5, 0)])
def test_sizes_at_the_edge(Q, G, D, multiplied):
    queries, gallery = features(Q, G, D)
    for metric in METRICS:
        for k in (0, 1, 8):
            found = kernels.topk(queries, gallery, k, metric=metric)
            assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.int64)
            assert same(found, sorted_out(queries, gallery, k, metric))
            for codes in ("int8", "bfloat16"):
                prepared = kernels.prepare_gallery(gallery, low_precision=codes)
                assert same(kernels.topk(queries, prepared, k, metric=metric), found)


def test_strides_do_not_matter(multiplied):
    queries, gallery = features(6, 900, 20)
    expected = kernels.topk(queries, gallery, 5)
    wide = torch.zeros(900, 40)
    wide[:, ::2] = gallery
    assert same(kernels.topk(queries.T.contiguous().T, wide[:, ::2], 5), expected)


@pytest.mark.parametrize("Q", [64, 700])
def test_a_product_takes_one_thread(Q, monkeypatch):
    """Two side by side: products that divide themselves would be four threads on two cores."""
    multiply_in(None, monkeypatch)
    taken, multiply, before = [], module.multiply, torch.get_num_threads()
    openmp = ctypes.CDLL(torch._C.__file__)  # where the library that torch loaded is found

    def observed(*given):
        # OpenMP first, for torch, when it is asked, sets it to its own number
        taken.append((threading.get_ident(), openmp.omp_get_max_threads(), torch.get_num_threads()))
        multiply(*given)

    monkeypatch.setattr(module, "multiply", observed)
    try:
        torch.set_num_threads(2)
        kernels.topk(*features(Q, 9500, 12), 5)
        with ThreadPoolExecutor(1) as later:  # a new thread's number is what was last set anywhere
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threading.get_ident() not in {thread for thread, *_ in taken}
    assert {count for _, *counts in taken for count in counts} == {1}


@pytest.mark.parametrize("kind", ["normal", "equal", "sorted"])
@pytest.mark.parametrize("Q", [1, 64, 700])
def test_threads_and_blocks_do_not_matter(Q, kind, monkeypatch, multiplied):
    """Few queries divide the gallery among the threads, many are divided themselves."""
    queries, gallery = features(Q, 9500, 12, kind)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.topk(queries, gallery, 40))
            assert torch.get_num_threads() == threads
        monkeypatch.setattr(module, "ROWS", 50)
        monkeypatch.setattr(module, "COLUMNS", 97)
        results.append(kernels.topk(queries, gallery, 40))
    finally:
        torch.set_num_threads(before)
    assert all(same(result, results[0]) for result in results)
    assert same([part[:3] for part in results[0]], sorted_out(queries[:3], gallery, 40, "cosine"))


def test_torchs_precision_is_set_and_put_back(monkeypatch):
    """TF32 and bfloat16 would break the bounds of float32, sums in float16 those of float16."""
    queries, gallery = features(8, 300, 20)
    seen, multiply = [], module.multiply

    def now() -> list:
        one, other = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
        return [one.fp32_precision, other.fp32_precision, other.allow_fp16_accumulation]

    def spy(*given):
        seen.append(now())
        multiply(*given)

    monkeypatch.setattr(module, "multiply", spy)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    before = now()
    try:
        kernels.topk(queries, gallery, 3)
        assert now() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert seen
    assert all(each == ["ieee", "ieee", False] for each in seen)
    assert not any(one == other for one, other in zip(before, seen[0], strict=True))


def test_more_queries_than_are_held_at_a_time(monkeypatch):
    from kernels.topk import topk

    queries, gallery = features(100, 500, 8)
    expected = sorted_out(queries, gallery, 4, "ip")
    monkeypatch.setitem(topk.__globals__, "QUERIES", 33)
    assert same(kernels.topk(queries, gallery, 4, metric="ip"), expected)


@given(
    seed=st.integers(0, 2**32 - 1),
    Q=st.integers(1, 6),
    G=st.integers(1, 200),
    D=st.integers(1, 40),
    k=st.integers(0, 220),
    metric=st.sampled_from(METRICS),
    kind=st.sampled_from(KINDS),
    keyed=st.booleans(),
    codes=st.sampled_from([None, "int8", "bfloat16", *PLANS]),
)
@settings(max_examples=200, deadline=None)
def test_anything_equals_a_sort(seed, Q, G, D, k, metric, kind, keyed, codes):
    queries, gallery = features(Q, G, D, kind, seed)
    keys = ()
    if keyed:
        generator = torch.Generator().manual_seed(seed)
        keys = tuple(torch.randint(0, 3, (n, 2), generator=generator) for n in (Q, G))
    stored = codes if codes not in PLANS else None
    prepared = kernels.prepare_gallery(gallery, keys=keys[1] if keyed else None, low_precision=stored)
    with pytest.MonkeyPatch.context() as patch:
        multiply_in(codes, patch)
        found = kernels.topk(queries, prepared, k, metric=metric, query_keys=keys[0] if keyed else None)
    assert same(found, sorted_out(queries, gallery, k, metric, *keys))


@pytest.mark.parametrize("D", [1, 31, 768])
@pytest.mark.parametrize("codes", [None, "int8", "bfloat16", *PLANS])
@pytest.mark.parametrize("metric", METRICS)
def test_the_promised_interval_holds_and_is_not_empty(metric, codes, D, monkeypatch):
    """kernels/bounds.py: |s a P + b + c - score| <= x e + y f + h, for products summed in several orders."""
    generator = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(40, D, generator=generator), torch.randn(60, D, generator=generator)
    queries *= 10 ** (2 * torch.randn(40, 1, generator=generator))
    rows *= 10 ** (2 * torch.randn(60, 1, generator=generator))
    if codes in PLANS and metric == "l2":
        pytest.skip("float32")
    multiply_in(codes, monkeypatch)
    short = codes is not None and codes.split()[-1] in NARROW
    rows[:20, 1:], queries[:10, 1:] = 0, 0  # one great feature: a great code
    if D > 1:  # all that int16 leaves out, of both, points the same way: codes end in .49
        code = 32767 // (D - 1) ** 0.5 - 1 + 0.49
        queries[10] = rows[20] = torch.tensor([((32767 / code) ** 2 - (D - 1)) ** 0.5] + [1.0] * (D - 1))
        queries[11] = rows[21] = torch.full((D,), 1 + 0.999 * 2.0**-11)  # and of float16
    prepared = kernels.prepare_gallery(rows, low_precision=codes if codes not in PLANS else None)
    norms = module.row_norms("queries", queries)
    chosen = search.plan(queries, norms, prepared, 1, metric, 1)
    if chosen is not None and chosen.along is not None and D > 1:  # all that is left out, of both, points the same way
        left = rows[22] - (rows[22].double() @ chosen.along.directions.T @ chosen.along.directions).float()
        queries[12] = rows[22] = left
        prepared, norms = kernels.prepare_gallery(rows), module.row_norms("queries", queries)
        prepared.leading = leading.leading_of(prepared.features, prepared.norms, chosen.along.directions)
        chosen = search.plan(queries, norms, prepared, 1, metric, 1)
    if chosen is None:
        given = module.operands(queries, norms, prepared, metric)
    else:
        given = candidates.planned(chosen, queries, norms, prepared, metric)
    s, c, x, y, h = given.query_bounds.double().T[:, :, None]
    a, b, e, f = (part.double() for part in given.gallery_bounds)
    exact = torch.from_numpy(every_score(queries, rows, metric)).double()
    left, right = given.queries.float(), given.gallery.float()
    L = right.shape[1]
    orders = [torch.arange(L), torch.arange(L).flip(0), torch.randperm(L, generator=generator)]
    if short:
        right = right * given.inverse[:, None]
        right = right.round().double() if "int16" in codes else right.half().float()
        left, orders = left.to(right.dtype), orders[: 1 if "int16" in codes else 3]
    for order in orders:
        products = torch.zeros(40, 60, dtype=left.dtype)
        for i in order.tolist():
            products += left[:, i, None] * right[None, :, i]
        error = (s * a * products.double() + b + c - exact).abs()
        bound = x * e + y * f + h
        assert (error <= bound).all()
        if D > 1 and codes != "bfloat16":  # whose slack is for other hardware
            assert (error / bound).max() > 0.002
        if D > 1 and codes in PLANS:
            assert (error / bound).max() > 0.6


def test_rows_that_are_not_finite_are_named():
    queries, gallery = features(3, 50, 8)
    gallery[7, 2], gallery[31, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"gallery: expected finite numbers, got NaN or inf in 2 rows: 7, 31"):
        kernels.topk(queries, gallery, 3)
    with pytest.raises(ValueError, match=r"gallery: .* 7, 31"):
        kernels.prepare_gallery(gallery)
    queries[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"queries: .* in 1 rows: 1$"):
        kernels.topk(queries, gallery[:7], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": -1}, "k: expected a whole number"),
        ({"k": 2.0}, "k: expected a whole number"),
        ({"metric": "cos"}, "metric: expected one of 'cosine'"),
        ({"queries": torch.zeros(3, 7)}, r"queries: expected shape \[Q, D\]"),
        ({"queries": torch.zeros(3, 8, dtype=torch.float64)}, "queries: expected torch.float32"),
        ({"gallery": torch.zeros(8)}, r"gallery: expected shape \[G, D\]"),
        ({"gallery": torch.zeros(9, 8, dtype=torch.int8)}, "gallery: expected torch.float32"),
        ({"query_keys": torch.zeros(3, dtype=torch.int64)}, "gallery_keys: expected"),
        ({"gallery_keys": torch.zeros(9, dtype=torch.int64)}, "query_keys: expected"),
        (
            {"query_keys": torch.zeros(3, 2, dtype=torch.int64), "gallery_keys": torch.zeros(9, 1, dtype=torch.int64)},
            "query_keys: expected 1 columns, got 2",
        ),
        (
            {"query_keys": torch.zeros(3, dtype=torch.int32), "gallery_keys": torch.zeros(9, dtype=torch.int64)},
            "query_keys: expected torch.int64",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"queries": torch.zeros(3, 8), "gallery": torch.zeros(9, 8), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        kernels.topk(**given)


def test_a_name_is_a_function_whatever_was_imported():
    import kernels.topk

    assert callable(kernels.topk)
    assert callable(kernels.pair_scores)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("Q", "ks"), [(1, [100]), (70, [1, 100, 5000]), (1501, [100])])
def test_the_gpu_returns_the_same_bits(metric, kind, Q, ks, monkeypatch):
    """One query by many blocks, some by several each, and several by one block."""
    queries, gallery = features(Q, 9000, 96, kind)
    keys = torch.arange(Q) % 5, torch.arange(9000) % 50
    for k in ks:
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if kind != "wild" else (torch.float32,):
            rows = gallery.to(dtype)
            expected = kernels.topk(queries, rows, k, metric=metric, query_keys=keys[0], gallery_keys=keys[1])
            for codes in (None, "bfloat16"):
                prepared = kernels.prepare_gallery(rows.cuda(), keys=keys[1].cuda(), low_precision=codes)
                for how in (None, "float16", "leading float16"):
                    multiply_in(how, monkeypatch)
                    found = kernels.topk(queries.cuda(), prepared, k, metric=metric, query_keys=keys[0].cuda())
                    assert same([part.cpu() for part in found], expected)
