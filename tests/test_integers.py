"""Products in int16: exact for every instruction set, and used where they pay. That a search by them equals one in
float32: tests/test_topk.py."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
from test_topk import LEVELS, features, level  # noqa: F401

import kernels
from kernels import integers
from kernels._library import extension
from kernels.gallery import multiply_encoded, panels

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
    codes = integers.encode_queries(queries, scales[0])
    assert torch.equal(codes[:, :D].long(), left)
    assert not codes[:, D:].any()
    products = torch.full((Q + 1, G), -7, dtype=torch.int32)
    multiply_encoded(codes, rows, scales[1], products[:Q], panels(G, codes))
    assert torch.equal(products[:Q].long(), left @ right.T)
    assert (products[Q] == -7).all()


def test_they_serve_many_queries_where_they_are_faster(monkeypatch):
    many = integers.LEAST
    queries, rows = features(2 * many, 9000, 8)
    gallery, coded = kernels.prepare_gallery(rows), kernels.prepare_gallery(rows, low_precision="int8")
    monkeypatch.setattr(integers, "integers_are_faster", lambda: False)
    assert not integers.integers_pay(queries, gallery, "ip", many)
    monkeypatch.setattr(integers, "integers_are_faster", lambda: True)
    assert integers.integers_pay(queries, gallery, "ip", many)
    assert integers.integers_pay(queries, gallery, "cosine", many)
    assert not integers.integers_pay(queries, gallery, "l2", many)
    assert not integers.integers_pay(queries, gallery, "ip", many - 1)
    assert not integers.integers_pay(queries, coded, "ip", many)
    wide = torch.ones(many, 1 << 16)
    assert not integers.integers_pay(wide, kernels.prepare_gallery(wide[:1]), "ip", many)

    counts, encoded = [], search.encoded_operands
    monkeypatch.setattr(search, "encoded_operands", lambda *given: counts.append(len(given[0])) or encoded(*given))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kernels.topk(queries[: 2 * many - 2], rows[:50], 3)  # less for each thread
        for count in (many - 1, 2 * many - 2, 2 * many):  # a thread has all of them and a part of the gallery, or half
            kernels.topk(queries[:count], gallery, 3)
    finally:
        torch.set_num_threads(before)
    assert counts == [2 * many - 2, 2 * many]


def test_which_is_faster_is_measured(monkeypatch):
    """And a processor that multiplies wrongly does not count."""
    clock, takes, threads = [0.0], {"multiply_encoded": 1.0, "multiply": 2.0}, torch.get_num_threads()
    openmp, taken = ctypes.CDLL(torch._C.__file__), set()
    monkeypatch.setattr(integers.time, "perf_counter", lambda: clock[0])

    def timed(name, work):
        def timed(*given):
            clock[0] += takes[name]
            taken.update((openmp.omp_get_max_threads(), torch.get_num_threads()))  # torch, when asked, sets OpenMP's
            work(*given)

        monkeypatch.setattr(integers, name, timed)

    for name in takes:
        timed(name, getattr(integers, name))
    measure = integers.integers_are_faster.__wrapped__
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
