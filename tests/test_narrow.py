"""Products in 16 bits: int16's exact for every instruction set; used where they are faster. That a search by them
equals one in float32: tests/test_topk.py."""

from __future__ import annotations

import ctypes
import functools
import importlib

import pytest
import torch
from test_topk import LEVELS, NARROW, features, level, multiply_in  # noqa: F401

from kernels import narrow
from kernels._library import extension
from kernels.bounds import product_error, scales
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


@pytest.mark.parametrize("dtype", NARROW.values())
def test_the_codes_of_what_is_wild_are_none(dtype):
    norms = torch.tensor([0, 1e-30, 1, 1e30], dtype=torch.float64)
    assert (scales(norms, dtype) > 0).tolist() == [False, False, True, False]
    assert (narrow.inverse(scales(norms, dtype)) > 0).tolist() == [False, False, True, False]


def test_float16_codes_use_its_range_and_divide_exactly():
    norms = torch.tensor([1e-12, 0.3, 1, 1.9999999, 2, 3e17, 1e18], dtype=torch.float64)
    scale = scales(norms, torch.float16)
    assert (torch.frexp(scale)[0] == 0.5).all()
    assert ((norms / scale >= 2**14) & (norms / scale < 2**15)).all()
    assert (narrow.inverse(scale) * scale == 1).all()


def test_small_numbers_beside_great_ones_in_float16():
    """Below 2^-14 of a code float16 has fewer bits, and none below 2^-25: the bound of what is lost holds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 700, generator=generator) * 2.0 ** -torch.randint(0, 60, (50, 700), generator=generator)
    norms = row_norms("rows", rows)
    scale = scales(norms, torch.float16)
    codes = narrow.encode_queries(rows, narrow.inverse(scale), torch.float16).double() * scale[:, None]
    lost = (codes - rows.double()).norm(dim=1) / norms
    assert (lost <= product_error(700, torch.float16) / 2).all()
    assert (lost > 0.1 * product_error(700, torch.float16) / 2).any()


def test_many_queries_are_multiplied_where_it_is_faster(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for faster in (True, False):
        monkeypatch.setattr(narrow, "narrow_is_faster", lambda device, faster=faster: faster)
        for device, least in ((cpu, narrow.LEAST), (gpu, narrow.DEVICE_LEAST)):
            assert not narrow.narrow_pays(device, least - 1)
            assert narrow.narrow_pays(device, least) == faster
    assert narrow.narrow_type(cpu) == torch.int16
    assert narrow.narrow_type(gpu) == torch.float16


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
