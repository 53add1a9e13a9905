"""How a search chooses its products, and leading directions. That results do not depend on it: tests/test_topk.py."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_topk import PLANS, features, multiply_in

import kernels
from kernels import candidates, leading, narrow
from kernels.gallery import Gallery, row_norms

search = importlib.import_module("kernels.topk")
D = 64


def led(count: int, seed: int = 0, flat: bool = False) -> torch.Tensor:
    """Rows in which ten directions, none of them a feature, hold nearly all."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    generator.manual_seed(seed)
    size = torch.ones(D) if flat else torch.cat([torch.ones(10), torch.full((D - 10,), 1e-3)])
    return torch.randn(count, D, generator=generator) * size @ turn


@pytest.fixture(scope="module")
def rows():
    return led(9000)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Searches of any size are looked at, and a processor multiplies no faster in 16 bits."""
    monkeypatch.setitem(candidates.LEAST_WORK, "cpu", 0)
    monkeypatch.setattr(narrow, "narrow_is_faster", lambda device: False)


def plan(gallery: Gallery, queries: torch.Tensor, k: int = 5, metric: str = "cosine", rows: int = 1000):
    return candidates.plan(queries, row_norms("queries", queries), gallery, k, metric, rows)


def test_directions_are_found_once_enough_queries_have_come(rows):
    queries, gallery = led(50, 2), kernels.prepare_gallery(rows)
    price = candidates.price_of_directions(gallery)
    assert 100 < price < 150
    assert plan(gallery, queries[:30]) is None
    assert gallery.leading is None
    assert gallery.searched == 30
    for _ in range(4):
        found = plan(gallery, queries)
    assert found.dtype == torch.float32
    assert found.along is gallery.leading
    assert 10 <= len(found.along.directions) <= D // 4
    assert plan(gallery, queries).along is found.along
    assert plan(gallery, queries[:1], metric="ip").along is found.along


def test_few_queries_count_as_many_as_take_as_long(rows):
    gallery = kernels.prepare_gallery(rows)
    plan(gallery, led(1, 2))
    assert gallery.searched == candidates.FEW


def test_a_gallery_for_one_search_must_repay_more(rows):
    kept, once = kernels.prepare_gallery(rows), Gallery(rows, row_norms("rows", rows), None, None)
    assert candidates.price_of_directions(once) == candidates.ONCE * candidates.price_of_directions(kept)
    queries = led(150, 2)
    assert plan(kept, queries).along is not None
    assert plan(once, queries) is None
    assert plan(Gallery(rows, once.norms, None, None), led(2000, 2)).along is not None


def test_projecting_must_pay_as_well(rows, monkeypatch):
    monkeypatch.setattr(candidates, "price_of_directions", lambda gallery: 0)
    gallery, queries = kernels.prepare_gallery(rows), led(8, 2)
    assert plan(gallery, queries) is None
    assert 2 * 10 < gallery.due < 100
    looked = []
    monkeypatch.setattr(candidates, "directions_of", lambda rows: looked.append(1) or leading.directions_of(rows))
    while gallery.searched + 8 < gallery.due:
        assert plan(gallery, queries) is None
    assert not looked
    assert plan(gallery, queries).along is not None


def test_where_no_direction_leads_it_is_seldom_looked(monkeypatch):
    gallery, queries = kernels.prepare_gallery(led(9000, flat=True)), led(500, 2, flat=True)
    looked, flat = [], candidates.Trial.flat
    monkeypatch.setattr(candidates.Trial, "flat", lambda trial: looked.append(gallery.searched) or flat(trial))
    monkeypatch.setattr(candidates, "directions_of", lambda rows: pytest.fail("there are none"))
    for _ in range(20):
        assert plan(gallery, queries) is None
    assert looked == [500, 4000]


def test_directions_that_leave_too_much_are_not_used(monkeypatch):
    """One direction holds all but a hundredth, and what differs lies in the rest."""
    shift = torch.zeros(D)
    shift[3] = 10
    gallery = kernels.prepare_gallery(torch.randn(9000, D, generator=torch.Generator().manual_seed(0)) + shift)
    queries = torch.randn(2000, D, generator=torch.Generator().manual_seed(1)) + shift
    looked = []
    monkeypatch.setattr(candidates, "directions_of", lambda rows: looked.append(1) or leading.directions_of(rows))
    assert plan(gallery, queries) is None
    assert looked
    assert gallery.leading is None
    assert gallery.due == 16000


def test_queries_that_lie_elsewhere_are_multiplied_whole(rows):
    gallery, queries = kernels.prepare_gallery(rows), led(2000, 2)
    directions = plan(gallery, queries).along.directions
    across = torch.randn(2000, D, generator=torch.Generator().manual_seed(0))
    across -= (across.double() @ directions.T @ directions).float()
    assert plan(gallery, across) is None
    assert plan(gallery, queries).along is gallery.leading


def test_what_no_plan_is_made_for(rows, monkeypatch):
    queries = led(2000, 2)
    assert plan(kernels.prepare_gallery(rows), queries, metric="l2") is None
    assert plan(kernels.prepare_gallery(rows, low_precision="int8"), queries) is None
    assert plan(kernels.prepare_gallery(rows[:8191]), queries) is None
    assert plan(kernels.prepare_gallery(rows[:8192]), queries) is not None
    flat = torch.ones(1, 1 << 16)
    huge = Gallery(flat.expand(9000, -1), torch.ones(9000, dtype=torch.float64), None, None)
    assert candidates.plan(flat, torch.ones(1, dtype=torch.float64), huge, 5, "ip", 1) is None
    assert huge.searched == 0
    monkeypatch.setitem(candidates.LEAST_WORK, "cpu", 2000 * 9000 * D)
    assert plan(kernels.prepare_gallery(rows), queries) is not None
    assert plan(kernels.prepare_gallery(rows), queries[1:]) is None


def test_sixteen_bits_are_used_where_scores_lie_apart(monkeypatch):
    monkeypatch.setattr(narrow, "narrow_is_faster", lambda device: True)
    queries, rows = features(300, 9000, 8)
    found = plan(kernels.prepare_gallery(rows), queries)
    assert found.dtype == torch.int16
    assert found.along is None
    assert plan(kernels.prepare_gallery(rows), queries, rows=narrow.LEAST - 1) is None
    assert plan(kernels.prepare_gallery(rows + 100), queries + 100) is None
    both = plan(kernels.prepare_gallery(led(9000)), led(300, 2))
    assert both.dtype == torch.int16
    assert both.along is not None


def test_a_search_asks_for_its_strips(monkeypatch, rows):
    asked, before = [], torch.get_num_threads()
    monkeypatch.setattr(search, "plan", lambda *given: asked.append(given[-1]))
    gallery = kernels.prepare_gallery(rows)
    try:
        torch.set_num_threads(2)
        for count in (254, 256, 700):  # a thread has all of them and a part of the gallery, or half
            kernels.topk(led(count), gallery, 3)
    finally:
        torch.set_num_threads(before)
    assert asked == [254, 128, 350]


@pytest.mark.parametrize("kind", PLANS)
def test_a_crowd_is_counted(kind, monkeypatch):
    """What `crowd` says of a sample that is all there is, beside the intervals of every pair."""
    multiply_in(kind, monkeypatch)
    queries, rows = led(16, 2), led(700)
    if kind in ("int16", "float16"):
        queries, rows = (part + 3 for part in features(16, 700, D))
    queries[0], rows[0] = 0, 0
    for metric in ("cosine", "ip"):
        gallery, norms = kernels.prepare_gallery(rows), row_norms("queries", queries)
        chosen = search.plan(queries, norms, gallery, 1, metric, 1)
        if chosen.along is not None:  # few, so that some pass
            few = chosen.along.directions[:9]
            chosen = chosen._replace(along=leading.leading_of(rows, gallery.norms, few))
        given = candidates.planned(chosen, queries, norms, gallery, metric)
        s, c, x, y, h = given.query_bounds.double().T[:, :, None]
        a, b, e, f = (part.double() for part in given.gallery_bounds)
        codes = given.gallery if given.inverse is None else given.gallery * given.inverse[:, None]
        codes = codes.round() if chosen.dtype == torch.int16 else codes.to(chosen.dtype)
        keys = s * a * (given.queries[:, : codes.shape[1]].double() @ codes.double().T) + b + c
        errors = x * e + y * f + h
        trial = candidates.Trial(queries, norms, gallery, metric)
        for k in (1, 30, 700):
            floors = (keys - errors).topk(k, dim=1).values[:, -1:]
            passed = float((keys + errors >= floors).double().mean()) - k / 700
            found = trial.crowd(k, chosen.dtype, chosen.along)
            assert found == pytest.approx(passed, rel=0.1, abs=2e-3)
            assert k == 700 or found > 0.004


def test_bounds_are_kept_for_each_plan(rows):
    gallery, queries = kernels.prepare_gallery(rows), led(3, 2)
    norms, directions = row_norms("queries", queries), leading.directions_of(rows)
    found = []
    for count in (0, 5, 9):
        along = leading.leading_of(rows, gallery.norms, directions[:count]) if count else None
        plan = candidates.Plan(torch.int16, along)
        for metric in ("ip", "cosine"):
            first, again = (candidates.planned(plan, queries, norms, gallery, metric).gallery_bounds for _ in range(2))
            assert first is again
            found.append(float(first[3].sum() if metric == "ip" else (first[3] * gallery.norms).sum()))
    assert found[2] > found[4] > found[0] == 0
    assert found[1::2] == pytest.approx(found[::2], rel=1e-5)


@pytest.mark.parametrize("kind", ["leading", "leading int16"])
def test_directions_may_be_replaced(kind, rows, monkeypatch):
    """By others as many, as where two threads look for them: the bounds that are kept are of those searched along."""
    multiply_in(kind, monkeypatch)
    gallery, queries = kernels.prepare_gallery(rows), led(20, 5)
    expected = [kernels.topk(queries, gallery, 3, metric=metric) for metric in ("ip", "cosine")]
    others = torch.linalg.qr(torch.randn(D, D // 4, generator=torch.Generator().manual_seed(0)).double()).Q.T
    gallery.leading = leading.leading_of(rows, gallery.norms, others * leading.SHRUNK)
    found = [kernels.topk(queries, gallery, 3, metric=metric) for metric in ("ip", "cosine")]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(*parts) for parts in zip(one, other, strict=True))


def test_threads_that_search_at_first_look_once(rows, monkeypatch):
    looked, gallery, queries = [], kernels.prepare_gallery(rows), led(400, 2)
    meet = threading.Barrier(2)
    due = candidates._due
    monkeypatch.setattr(candidates, "directions_of", lambda rows: looked.append(1) or leading.directions_of(rows))

    def late(gallery):  # both ask before either looks
        found = due(gallery)
        if not candidates._looking.locked():
            meet.wait(10)
        return found

    monkeypatch.setattr(candidates, "_due", late)
    with ThreadPoolExecutor(2) as pool:
        found = [each.result() for each in [pool.submit(plan, gallery, queries) for _ in range(2)]]
    assert looked == [1]
    assert all(each.along is gallery.leading for each in found)


def test_autocast_changes_nothing(rows):
    queries, plain, autocast = led(400, 2), kernels.prepare_gallery(rows), kernels.prepare_gallery(rows)
    expected = kernels.topk(queries, plain, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernels.topk(queries, autocast, 5)
    assert torch.equal(autocast.leading.directions, plain.leading.directions)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_directions_lead(rows):
    directions = leading.directions_of(rows)
    assert directions.shape == (D // leading.SHARE, D)
    exact = torch.linalg.eigvalsh(rows.double().T @ rows.double()).flip(0)
    held = (rows.double() @ directions.T).square().sum(0)
    assert (held[:10] / exact[:10]).min() > 0.9
    assert held.diff()[:9].max() < 0.1 * held[0]
    assert 1 - 1e-8 < float(torch.linalg.svdvals(directions)[0]) < 1
    assert torch.equal(directions, leading.directions_of(rows))
    assert leading.directions_of(torch.zeros(5, 3)) is not None  # as good as any


def test_directions_that_are_not_orthonormal_are_refused(rows, monkeypatch):
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda given: SimpleNamespace(Q=qr(given).Q * (1 + 1e-9)))
    assert leading.directions_of(rows) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_along_directions(dtype, monkeypatch):
    monkeypatch.setattr(leading, "ROWS", 7)
    rows = led(100).to(dtype)
    rows[0] = 0
    directions = leading.directions_of(rows)
    found = leading.leading_of(rows, row_norms("rows", rows), directions)
    exact = rows.double() @ directions.T
    rest = (rows.double() - exact @ directions).norm(dim=1)
    assert torch.equal(found.rows, exact.float())
    assert (found.left >= rest * (1 - 1e-9)).all()
    assert (found.left <= rest + 2e-4 * rows.double().norm(dim=1)).all()


def test_a_gpus_memory_is_asked(monkeypatch):
    class There:
        is_cuda, device = True, "cuda"

    gallery = Gallery(torch.zeros(1000, 4), torch.zeros(1000), None, None)
    assert candidates._fits(gallery, 10)
    gallery.features, gallery.norms = There(), None
    monkeypatch.setattr(Gallery, "__len__", lambda gallery: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 1000 * 48, 1 << 40))
    assert candidates._fits(gallery, 10)
    assert not candidates._fits(gallery, 11)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_does_not_matter(default, rows, monkeypatch):
    queries = led(300, 2)
    expected = kernels.topk(queries, rows, 5)
    for faster in (False, True):
        monkeypatch.setattr(narrow, "narrow_is_faster", lambda device, faster=faster: faster)
        gallery, before = kernels.prepare_gallery(rows), torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            found = kernels.topk(queries, gallery, 5)
        finally:
            torch.set_default_dtype(before)
        assert gallery.leading is not None
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_search_by_its_own_choice_equals_one_without(monkeypatch):
    """Prepared and not, for more and more queries, with 16 bits and without."""
    rows, queries = led(9000, 3), led(200, 4)
    for faster in (False, True):
        monkeypatch.setattr(narrow, "narrow_is_faster", lambda device, faster=faster: faster)
        gallery, seen = kernels.prepare_gallery(rows), set()
        for k in (1, 100, 1000):
            with monkeypatch.context() as patch:
                patch.setattr(search, "plan", lambda *given: None)
                expected = kernels.topk(queries, rows, k)
            for given in (gallery, gallery, rows):
                found = kernels.topk(queries, given, k)
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            seen.add(gallery.leading is not None)
        assert seen == {True}
