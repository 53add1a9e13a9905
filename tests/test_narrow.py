"""Products in 16 bits: int16's exact for every instruction set; used where they pay. That a search by them equals one
in float32: tests/test_topk.py."""

from __future__ import annotations

import ctypes
import functools
import importlib

import pytest
import torch
from test_topk import LEVELS, NARROW, features, level, multiply_in  # noqa: F401

import kernels
from kernels import narrow
from kernels._library import extension
from kernels.bounds import narrow_codes
from kernels.gallery import multiply_encoded, row_norms, scratch_for

search = importlib.import_module("kernels.topk")


@pytest.mark.parametrize("which", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("Q", "G", "D"), [(1, 1, 1), (7, 33, 64), (97, 70, 5), (5, 257, 33), (130, 31, 200)])
def test_products_are_exact(Q, G, D, dtype, which, level):  # noqa: F811
    """Whole and part panels and blocks; the greatest codes there are, alone in a row and all along it."""
    level(which)
    if extension().simd_level() < which:
        pytest.skip("not on this processor")
    queries, rows = features(Q, G, D)
    queries[-1], rows[0] = -1, 1
    rows[-1] = torch.tensor([-3] + [0] * (D - 1))
    rows = rows.to(dtype)
    scales = [(32767 / part.double().norm(dim=1)).float() for part in (queries, rows)]
    left, right = (
        (part.float() * scale[:, None]).round().long() for part, scale in zip((queries, rows), scales, strict=True)
    )
    assert right.abs().max() == 32767
    codes = narrow.encode_queries(queries, scales[0], torch.int16)
    assert torch.equal(codes[:, :D].long(), left)
    assert not codes[:, D:].any()
    products = torch.full((Q + 1, G), -7, dtype=torch.int32)
    multiply_encoded(codes, rows, scales[1], products[:Q], scratch_for(codes, G, D))
    assert torch.equal(products[:Q].long(), left @ right.T)
    assert (products[Q] == -7).all()


def test_they_serve_many_queries_where_they_are_faster(monkeypatch):
    many = narrow.LEAST
    queries, rows = features(2 * many, 9000, 8)
    gallery, coded = kernels.prepare_gallery(rows), kernels.prepare_gallery(rows, low_precision="int8")

    def pay(queries=queries, gallery=gallery, metric="ip", count=many, k=3) -> bool:
        return narrow.narrow_pays(queries, queries.double().norm(dim=1), gallery, k, metric, count)

    monkeypatch.setattr(narrow, "narrow_is_faster", lambda device: False)
    assert not pay()
    monkeypatch.setattr(narrow, "narrow_is_faster", lambda device: True)
    assert pay()
    assert pay(metric="cosine")
    assert not pay(metric="l2")
    assert not pay(count=many - 1)
    assert not pay(gallery=coded)
    assert not pay(gallery=kernels.prepare_gallery(rows[:8000]))
    assert not pay(queries=queries + 100, gallery=kernels.prepare_gallery(rows + 100), metric="cosine")
    flat = torch.ones(1, 1 << 16)
    with monkeypatch.context() as patch:
        patch.setattr(narrow, "crowd", lambda *given: 0)
        assert not pay(flat.expand(many, -1), kernels.Gallery(flat.expand(9000, -1), torch.ones(9000), None, None))

    counts, encoded = [], search.narrow_operands
    monkeypatch.setattr(search, "narrow_operands", lambda *given: counts.append(len(given[0])) or encoded(*given))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for count in (many - 1, 2 * many - 2, 2 * many):  # a thread has all of them and a part of the gallery, or half
            kernels.topk(queries[:count], gallery, 3)
        monkeypatch.setattr(search, "parts_of", lambda *given: 1)
        kernels.topk(queries[: 2 * many - 2], gallery, 3)  # less for each thread
    finally:
        torch.set_num_threads(before)
    assert counts == [2 * many - 2, 2 * many]


@pytest.mark.parametrize("kind", NARROW)
def test_a_crowd_is_counted(kind, monkeypatch):
    """What `crowd` says of a sample that is all there is, beside the intervals of every pair."""
    multiply_in(kind, monkeypatch)
    queries, rows = features(20, 700, 64)
    rows += 6
    queries += 6
    queries[0], rows[0] = 0, 0
    for metric in ("cosine", "ip"):
        gallery, norms = kernels.prepare_gallery(rows), row_norms("queries", queries)
        given = narrow.narrow_operands(queries, norms, gallery, metric)
        s, c, x, y, h = given.query_bounds.double().T[:, :, None]
        a, b, e, f = (part.double() for part in given.gallery_bounds)
        codes = rows * given.inverse[:, None]
        codes = codes.round() if kind == "int16" else codes.half()
        keys = s * a * (given.queries.double() @ codes.double().T) + b + c
        errors = x * e + y * f + h
        for k in (1, 30, 700):
            floors = (keys - errors).topk(k, dim=1).values[:, -1:]
            passed = float((keys + errors >= floors).double().mean()) - k / 700
            found = narrow.crowd(queries, norms, gallery, k, metric)
            assert found == pytest.approx(passed, rel=0.1, abs=2e-3)
            assert k == 700 or found > 0.04


@pytest.mark.parametrize("dtype", NARROW.values())
def test_the_codes_of_what_is_wild_are_none(dtype):
    norms = torch.tensor([0, 1e-30, 1, 1e30], dtype=torch.float64)
    assert (narrow_codes(torch.ones(4, 1), norms, dtype).scale > 0).tolist() == [False, False, True, False]


def test_float16_codes_use_its_range_and_divide_exactly():
    norms = torch.tensor([1e-12, 0.3, 1, 1.9999999, 2, 3e17, 1e18], dtype=torch.float64)
    codes = narrow_codes(torch.ones(7, 1), norms, torch.float16)
    assert (torch.frexp(codes.scale)[0] == 0.5).all()
    assert ((norms / codes.scale >= 2**14) & (norms / codes.scale < 2**15)).all()
    assert (narrow.inverse(codes.scale) * codes.scale == 1).all()


def test_small_numbers_beside_great_ones_in_float16():
    """Below 2^-14 of a code float16 has fewer bits, and none below 2^-25: the bound of what is lost holds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 700, generator=generator) * 2.0 ** -torch.randint(0, 60, (50, 700), generator=generator)
    norms = row_norms("rows", rows)
    codes = narrow_codes(rows, norms, torch.float16)
    given = narrow.encode_queries(rows, narrow.inverse(codes.scale), torch.float16).double() * codes.scale[:, None]
    lost = (given - rows.double()).norm(dim=1)
    assert (lost <= codes.residual).all()
    assert (given.norm(dim=1) <= codes.norm).all()
    assert (lost > 0.1 * codes.residual).any()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_does_not_matter(default):
    queries, rows = features(300, 9000, 16)
    gallery = kernels.prepare_gallery(rows)
    expected = kernels.topk(queries, gallery, 5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert narrow.narrow_is_faster.__wrapped__(torch.device("cpu")) in (False, True)
        found = kernels.topk(queries, gallery, 5)
        assert narrow.crowd(queries, row_norms("queries", queries), gallery, 5, "ip") < 0.01
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", NARROW)
def test_which_is_faster_is_measured(kind, monkeypatch):
    """And a processor that multiplies wrongly does not count."""
    multiply_in(kind, monkeypatch)
    clock, takes, threads = [0.0], {"multiply_encoded": 1.0, "multiply": 2.0}, torch.get_num_threads()
    openmp, taken = ctypes.CDLL(torch._C.__file__), set()
    monkeypatch.setattr(narrow.time, "perf_counter", lambda: clock[0])

    def timed(name, work):
        def timed(*given):
            clock[0] += takes[name]
            taken.update((openmp.omp_get_max_threads(), torch.get_num_threads()))  # torch, when asked, sets OpenMP's
            work(*given)

        monkeypatch.setattr(narrow, name, timed)

    for name in takes:
        timed(name, getattr(narrow, name))
    measure = functools.partial(narrow.narrow_is_faster.__wrapped__, torch.device("cpu"))
    torch.set_num_threads(2)
    try:
        assert measure()
        takes["multiply"] = 0.5
        assert not measure()
        takes["multiply"] = 2.0
        timed("multiply_encoded", lambda *given: None)
        assert not measure()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert taken == {1}
