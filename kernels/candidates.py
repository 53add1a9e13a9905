"""By which products a search finds its candidates: in float32 or in 16 bits (kernels/narrow.py), of all features or
along the gallery's leading directions (kernels/leading.py).

All give the same results (kernels/bounds.py). They differ in what a product takes, and in how many rows their errors
let pass, which are then scored: a sample of queries and rows tells before each search.
"""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import leading
from kernels.bounds import MOST_FEATURES, Short, U, gallery_bounds, left_out, product_error, query_bounds, scales
from kernels.gallery import Gallery, Operands, backend
from kernels.leading import Leading, directions_of, leading_of, sample_of
from kernels.narrow import encode_queries, inverse, narrow_pays, narrow_type

SAMPLE = 16, 2048  # queries and rows: of so many pairs torch does not divide the work among threads
LEAST_WORK = {"cpu": 1 << 29, "cuda": 1 << 35}  # multiplications of a search, below which a sample takes too much of it
FEW = 8  # queries that take as long as one: a gallery must be read
SHARES = 16, 12, 8, 6, leading.SHARE  # of the features, that are tried as leading ones
USUAL = 100  # the k best for which directions are chosen, at least
FLAT = 4  # times what the mean square of a cosine is where no direction leads
# What a search takes, in parts of multiplying all features in float32; measured on a CPU, but for float16.
TAKES = {torch.float32: 1.0, torch.int16: 0.65, torch.float16: 0.15}
SCORE = 70.0  # scoring all rows
ITERATE = {"cpu": 4.0, "cuda": 2000.0}  # finding directions, in D³ multiplications: a GPU multiplies in less time
GAIN = 0.8  # the part of its time that a search along directions must be expected to take, at most
PATIENCE = 3  # how often queries must have paid for looking for directions, which may be in vain
ONCE = 2  # how often more where a gallery was not prepared
AGAIN = 8  # so many times the queries until they are looked for again

_looking = threading.Lock()


class Plan(NamedTuple):
    """How a search multiplies: in which type, and along which directions, or all features."""

    dtype: torch.dtype = torch.float32
    along: Leading | None = None


def plan(queries: Tensor, norms: Tensor, gallery: Gallery, k: int, metric: str, rows: int) -> Plan | None:
    """How to find the k best of queries [Q, D] float32 with norms [Q] float64, `rows` of them at a time. None: by
    float32 products of all features, or by the gallery's own codes."""
    Q, G, D, device = len(queries), *gallery.shape, queries.device
    if metric == "l2" or gallery.codes is not None or not 0 < D < MOST_FEATURES or backend(queries) is None:
        return None
    counted = max(Q, FEW)
    if counted * G * D < LEAST_WORK[device.type] or len(gallery) < 4 * SAMPLE[1]:
        return None
    gallery.searched += counted
    look = _due(gallery)
    dtype = narrow_type(device) if narrow_pays(device, rows) else torch.float32
    if dtype == torch.float32 and not look and gallery.leading is None:
        return None
    trial = Trial(queries, norms, gallery, metric)
    takes = trial.takes(k, dtype)
    if takes > 1:
        takes, dtype = 1.0, torch.float32
    with _looking if look else contextlib.nullcontext():
        if look and _due(gallery):
            _look(trial, max(k, USUAL), dtype)
    known = gallery.leading
    if known is not None and trial.takes(k, dtype, trial.of(known)) > GAIN * takes:
        known = None
    return None if dtype == torch.float32 and known is None else Plan(dtype, known)


def _due(gallery: Gallery) -> bool:
    return gallery.leading is None and gallery.searched >= max(gallery.due, price_of_directions(gallery))


def price_of_directions(gallery: Gallery) -> float:
    """How many queries' products with the gallery its directions take, and to project it onto the fewest."""
    G, D = gallery.shape
    sample = max(leading.SAMPLE, 2 * D)
    price = D * (2 * sample + ITERATE[gallery.features.device.type] * D) / G + 2 * D / SHARES[0]
    return PATIENCE * (price if gallery.kept else ONCE * price)


def _look(trial: Trial, k: int, dtype: torch.dtype) -> None:
    """Gives the gallery its leading directions where they pay, and else says after how many queries to look again."""
    gallery = trial.gallery
    gallery.due = AGAIN * gallery.searched
    directions = None if trial.flat() else directions_of(gallery.features)
    if directions is None:
        return
    options = []
    exact = trial.rows.double() @ directions.T
    for count in sorted({-(-gallery.shape[1] // share) for share in SHARES}):
        part = exact[:, :count]
        sample = Leading(directions[:count], part.float(), left_out(trial.m, part))
        options.append((trial.takes(k, dtype, sample), count))
    now, (least, count) = trial.takes(k, dtype), min(options)
    if least > GAIN * now or not _fits(gallery, count):
        return
    price = 2 * count / (now - least) * (1 if gallery.kept else ONCE)  # of projecting the gallery, in float64
    if gallery.searched < price:
        gallery.due = price
    else:
        gallery.leading = leading_of(gallery.features, gallery.norms, directions[:count])


def _fits(gallery: Gallery, count: int) -> bool:
    """Do so many directions take little of the memory that a GPU has free?"""
    if not gallery.features.is_cuda:
        return True
    return len(gallery) * (4 * count + 8) <= torch.cuda.mem_get_info(gallery.features.device)[0] // 4


class Trial:
    """A search of a sample of the gallery by a sample of the queries; metric "cosine" or "ip"."""

    def __init__(self, queries: Tensor, norms: Tensor, gallery: Gallery, metric: str):
        self.gallery, self.metric = gallery, metric
        asked, self.picked = (
            sample_of(count, most, queries.device)
            for most, count in zip(SAMPLE, (len(queries), len(gallery)), strict=True)
        )
        self.queries, self.rows = queries[asked], gallery.features[self.picked].float()
        self.n, self.m = norms[asked], gallery.norms[self.picked]
        self.norm = self.n[:, None] * self.m
        self.products = (self.queries @ self.rows.T).double()

    def flat(self) -> bool:
        """Does no direction lead? Then the mean square of a cosine is 1 / D, or little more."""
        cosines = torch.where(self.norm > 0, self.products / self.norm, 0)
        return float(cosines.square().mean()) * self.gallery.shape[1] < FLAT

    def of(self, known: Leading) -> Leading:
        """The sample's part of the gallery's."""
        return Leading(known.directions, known.rows[self.picked], known.left[self.picked])

    def takes(self, k: int, dtype: torch.dtype, along: Leading | None = None) -> float:
        """What the search is expected to take; along: the sample's directions."""
        share = 1.0 if along is None else len(along.directions) / self.gallery.shape[1]
        if dtype == torch.float32 and along is None:
            return share  # hardly a row passes that is not among the k best
        return TAKES[dtype] * share + SCORE * self.crowd(k, dtype, along)

    def crowd(self, k: int, dtype: torch.dtype, along: Leading | None = None) -> float:
        """The part of the rows, 0 to 1, that errors let pass beside the k best of a query; along: as there."""
        products, error = self.products, self.norm * product_error(self.gallery.shape[1], dtype)
        if along is not None:
            ours = leading_of(self.queries, self.n, along.directions)
            products, error = (ours.rows @ along.rows.T).double(), error + ours.left[:, None] * along.left
        if self.metric == "cosine":
            error, products = (torch.where(self.norm > 0, part / self.norm, 0) for part in (error, products))
        best = min(len(self.m), -(-k * len(self.m) // len(self.gallery)))
        floors = (products - error).topk(best, dim=1).values[:, -1:]
        return float((~(products + error < floors)).double().mean()) - best / len(self.m)


def planned(chosen: Plan, queries: Tensor, norms: Tensor, gallery: Gallery, metric: str) -> Operands:
    """As `operands`, by a plan: queries [Q, D] float32 with norms [Q] float64; metric "cosine" or "ip"."""
    dtype, along, D = chosen.dtype, chosen.along, queries.shape[1]
    if along is None:
        own, rows, error = queries, gallery.features, product_error(D, dtype)
        left, left_theirs, kept = torch.zeros_like(norms), torch.zeros_like(gallery.norms), gallery.made
    else:
        ours = leading_of(queries, norms, along.directions)
        own, rows, error = ours.rows, along.rows, product_error(len(along.directions), dtype) + 4 * U
        left, left_theirs, kept = ours.left, along.left, along.bounds
    if (metric, dtype) not in kept:
        theirs = Short(scales(gallery.norms, dtype), left_theirs, error)
        kept[metric, dtype] = gallery_bounds(gallery.norms, D, metric, theirs), inverse(theirs.scale)
    bounds, factors = kept[metric, dtype]
    short = Short(scales(norms, dtype), left, error)
    if dtype == torch.float32:
        return Operands(own, rows, query_bounds(norms, D, metric, short), bounds)
    codes = encode_queries(own, inverse(short.scale), dtype)
    return Operands(codes, rows, query_bounds(norms, D, metric, short), bounds, factors)
