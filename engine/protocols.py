"""Who is searched for whom, what is relevant, what is junk, and the metrics that follow. Exact.

A protocol is one row of the table PROTOCOLS. It divides a data set into a `Trial` (queries, gallery, groups) and names
the rule that says which gallery images of the query's own group are junk: neither hit nor miss. The group is the
identity (in one protocol identity and outfit): every gallery image outside it is a negative, every one inside it that
is not junk is a positive. So AP, CMC and mINP follow from one number per positive: how many negatives come before it
(`metrics_from_counts`), and `score_trial` has `kernels` count them: nothing is sorted, no Q×G matrix is kept.

Order: descending score, equal ones by lower gallery position. AP = mean of the precision at each positive
(float64); mINP = positives / rank of the last one (Ye et al., TPAMI 2021); CMC by the first positive. Queries without a
positive leave the mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.data.index import Index
    from kernels import Gallery

RANKS = 50  # length of the CMC curve
INSTRUCT = 500  # where the released Instruct-ReID evaluator cuts a ranking
_NO_POSITIVE = "no query has a positive in the gallery; is the copy of the data set complete?"


class Trial(NamedTuple):
    """One division into Q queries and G gallery images.

    query, gallery              [Q], [G] int64 rows of the data set's Index
    group_query, group_gallery  [Q], [G] int64; every gallery image of another group is a negative
    query_caption               [Q] int64, which of its row's captions the query is; None where the image is the query
    """

    query: np.ndarray
    gallery: np.ndarray
    group_query: np.ndarray
    group_gallery: np.ndarray
    query_caption: np.ndarray | None = None


class Protocol(NamedTuple):
    """One row of PROTOCOLS.

    name, dataset  key here and in `metrics.json`; the data set it divides
    tasks          keys of engine.tasks.TASKS that it tests
    trial          (index, number of the draw) -> Trial; a pure function
    junk           the rule: (index, q, g), rows of the same group in arrays of one shape -> bool, True = junk
    relevance      the protocol in a sentence
    draws          trials whose mean is reported (galleries drawn at random); 1 = nothing is drawn
    deduplicate    CMC counts gallery identities, not images (mAP and mINP as ever)
    """

    name: str
    dataset: str
    tasks: tuple[str, ...]
    trial: Callable[[Index, int], Trial]
    junk: Callable[[Index, np.ndarray, np.ndarray], np.ndarray]
    relevance: str
    draws: int = 1
    deduplicate: bool = False

    def trials(self, index: Index, quick: bool = False) -> list[Trial]:
        """All trials (quick: the first). InputError where the copy of the data set has no query or no gallery image."""
        trials = [self.trial(index, number) for number in range(1 if quick else self.draws)]
        for role in ("query", "gallery"):
            if not all(len(getattr(trial, role)) for trial in trials):
                raise InputError(f"{self.name}: no {role} image in {index.root}; is the copy complete?")
        return trials


# Junk rules.


def nothing(index: Index, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Every image of the group is a positive."""
    return np.zeros(np.shape(g), bool)


def same_camera(index: Index, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Market-1501's rule (Zheng et al., ICCV 2015): the group's images of the query's own camera are too easy."""
    return index.camera[q] == index.camera[g]


def same_camera_or_clothes(index: Index, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """LTCC, cloth-changing setting (Qian et al., ACCV 2020): only another camera and another outfit count."""
    return same_camera(index, q, g) | (index.clothes[q] == index.clothes[g])


def same_camera_or_other_clothes(index: Index, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """LTCC with the outfit kept: only another camera and the same outfit count."""
    return same_camera(index, q, g) | (index.clothes[q] != index.clothes[g])


# Trials.


def by_identity(index: Index, query: np.ndarray, gallery: np.ndarray) -> Trial:
    """Group = identity."""
    return Trial(query, gallery, index.pid[query].astype(np.int64), index.pid[gallery].astype(np.int64))


def as_distributed(index: Index, number: int = 0) -> Trial:
    """The data set's own query and gallery folders or lists."""
    return by_identity(index, index.select("query"), index.select("gallery"))


def between_cameras(*cameras: int) -> Callable[[Index, int], Trial]:
    """The data set's own query and gallery images of these cameras (VC-Clothes: Wan et al., CVPR workshops 2020)."""

    def trial(index: Index, number: int) -> Trial:
        query, gallery = index.select("query"), index.select("gallery")
        query, gallery = (rows[np.isin(index.camera[rows], cameras)] for rows in (query, gallery))
        return by_identity(index, query, gallery)

    return trial


def prcc(query_camera: int, gallery_camera: int, single_shot: bool) -> Callable[[Index, int], Trial]:
    """PRCC (Yang et al., TPAMI 2021): the test images of one camera against another's; 0, 1, 2 = A, B, C; no junk.

    single_shot: one random gallery image per identity. The authors name no generator, and the seeded draw in public use
    follows the file system's order; so the draw is ours: identities and file names ascending, one raw 64-bit word of
    numpy's Philox (key = number of the draw) per identity, scaled to its number of images.
    """

    def trial(index: Index, number: int) -> Trial:
        test = _ordered(index, index.select("test"))
        query, gallery = (test[index.camera[test] == camera] for camera in (query_camera, gallery_camera))
        if single_shot:
            images = [list(rows) for _, rows in groupby(gallery.tolist(), key=lambda row: index.pid[row])]
            words = np.random.Philox(key=number).random_raw(len(images)).tolist()
            drawn = [rows[word * len(rows) >> 64] for rows, word in zip(images, words, strict=True)]
            gallery = np.array(drawn, np.int64)
        return by_identity(index, query, gallery)

    return trial


def llcm(query: str, gallery: str, drawn: str) -> Callable[[Index, int], Trial]:
    """LLCM (Zhang & Wang, CVPR 2023): all test images of one modality; of the other, one per identity and camera.

    query, gallery, drawn: modalities; `drawn` is the sampled one, as in the authors' code: Python's `random` seeded
    with the number of the draw; identities ascending, cameras ascending (1 .. 9 visible; near-infrared has no camera
    3), `choice` among the sorted file names.

    "VIS to IR" was published in two ways. At first (the paper's table) every visible image was a query and the drawn
    near-infrared ones were the gallery: `llcm:vis2ir`. On 20 June 2023 the authors' test script exchanged the roles
    in this direction, *after* the draw: the drawn near-infrared images query a gallery of every visible image, so
    rank-1 rises and mAP falls (DEEN: from 62.5, 65.8 to 69.2, 55.5 in the table they corrected since):
    `llcm:vis2ir:2023-06`. The change left the script's "IR to VIS" as it was, so `llcm:ir2vis:2023-06` is the same
    protocol as `llcm:ir2vis`, named to stand beside the other.
    """

    def trial(index: Index, number: int) -> Trial:
        rows = {modality: _ordered(index, index.select("test", modality=modality)) for modality in (query, gallery)}
        generator = random.Random(number)
        files = groupby(rows[drawn].tolist(), key=lambda row: (index.pid[row], index.camera[row]))
        rows[drawn] = np.array([generator.choice(list(group)) for _, group in files], np.int64)
        return by_identity(index, rows[query], rows[gallery])

    return trial


def captions(index: Index, number: int) -> Trial:
    """CUHK-PEDES (Li et al., CVPR 2017): every caption of every test image against all test images."""
    test = index.select("test")
    counts = [len(index.captions(row)) for row in test]
    trial = by_identity(index, np.repeat(test, counts), test)
    return trial._replace(query_caption=np.array([number for count in counts for number in range(count)], np.int64))


def by_clothes(index: Index, number: int) -> Trial:
    """Group = identity and outfit; a COCAS+ Real2 query asks for the outfit of its template."""
    trial = as_distributed(index)
    query, gallery = ((index.pid[rows].astype(np.int64) << 32) + index.clothes[rows] + 1 for rows in trial[:2])
    return trial._replace(group_query=query, group_gallery=gallery)


def _ordered(index: Index, rows: np.ndarray) -> np.ndarray:
    """The rows by identity, camera, file name."""
    paths = index.table["path"].take(rows).to_pylist()
    order = sorted(range(len(rows)), key=lambda i: (index.pid[rows[i]], index.camera[rows[i]], paths[i]))
    return rows[np.array(order, np.int64)]


_CAMERA = "same identity, another camera; same identity and camera is junk"
_CAMERAS = _CAMERA + "; cameras {} and {} only"
_CHANGED = "same identity, another camera, another outfit; the identity's other images are junk"
_UNCHANGED = "same identity, another camera, same outfit; the identity's other images are junk"
_WANTED = "same identity in the wanted outfit, another camera; same identity, outfit and camera is junk"
_ALIKE = "same identity; nothing is junk"
_PRCC = "same identity; camera {} against camera {}, one drawn image per identity, mean of 10 draws"
_MULTI = "same identity; all images of camera C against all of camera A"
_LLCM = "same identity, another camera; junk: same camera number; {} against {}; mean of 10 draws; CMC over identities"
_VIS2IR = _LLCM.format("all visible images", "one near-infrared image per identity and camera")
_IR2VIS = _LLCM.format("all near-infrared images", "one visible image per identity and camera")
_SWAPPED = _LLCM.format("one near-infrared image per identity and camera", "all visible images")
_nir_finds_vis = llcm("nir", "vis", drawn="vis")

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("market1501", "market1501", ("trad",), as_distributed, same_camera, _CAMERA),
        Protocol("msmt17", "msmt17", ("trad",), as_distributed, same_camera, _CAMERA),
        Protocol("cuhk03", "cuhk03", ("trad",), as_distributed, same_camera, _CAMERA),
        Protocol("prcc:single", "prcc", ("cc",), prcc(2, 0, True), nothing, _PRCC.format("C", "A"), 10),
        Protocol("prcc:single:sc", "prcc", ("cc",), prcc(1, 0, True), nothing, _PRCC.format("B", "A"), 10),
        Protocol("prcc:single_ac", "prcc", ("cc",), prcc(0, 2, True), nothing, _PRCC.format("A", "C"), 10),
        Protocol("prcc:multi", "prcc", ("cc",), prcc(2, 0, False), nothing, _MULTI),
        Protocol("vc_clothes:general", "vc_clothes", ("cc",), as_distributed, same_camera, _CAMERA),
        Protocol("vc_clothes:sc", "vc_clothes", ("cc",), between_cameras(2, 3), same_camera, _CAMERAS.format(2, 3)),
        Protocol("vc_clothes:cc", "vc_clothes", ("cc",), between_cameras(3, 4), same_camera, _CAMERAS.format(3, 4)),
        Protocol("ltcc:general", "ltcc", ("cc",), as_distributed, same_camera, _CAMERA),
        Protocol("ltcc:cc", "ltcc", ("cc",), as_distributed, same_camera_or_clothes, _CHANGED),
        Protocol("ltcc:sc", "ltcc", ("cc",), as_distributed, same_camera_or_other_clothes, _UNCHANGED),
        Protocol("llcm:vis2ir", "llcm", ("vi",), llcm("vis", "nir", drawn="nir"), same_camera, _VIS2IR, 10, True),
        Protocol("llcm:ir2vis", "llcm", ("vi",), _nir_finds_vis, same_camera, _IR2VIS, 10, True),
        Protocol("llcm:vis2ir:2023-06", "llcm", ("vi",), llcm("nir", "vis", "nir"), same_camera, _SWAPPED, 10, True),
        Protocol("llcm:ir2vis:2023-06", "llcm", ("vi",), _nir_finds_vis, same_camera, _IR2VIS, 10, True),
        Protocol("cuhk_pedes", "cuhk_pedes", ("t2i",), captions, nothing, _ALIKE + "; best by cosine re-scored"),
        Protocol("cuhk_pedes:cosine", "cuhk_pedes", ("t2i",), captions, nothing, _ALIKE + "; by cosine alone"),
        Protocol("real2", "cocas", ("ctcc", "li"), as_distributed, nothing, _ALIKE),
        Protocol("real2:pid_clothes", "cocas", ("ctcc", "li"), by_clothes, same_camera, _WANTED),
    )
}


# Metrics.


class Metrics(NamedTuple):
    """One trial's result, fractions 0..1.

    mAP, mINP   means over the queries that have a positive
    cmc         [50] float64: share of them whose first positive has rank <= 1 .. 50 (constant past the gallery's end)
    queries     how many queries have a positive
    gallery     gallery images
    identities  distinct identities among all queries; 0 = not told
    """

    mAP: float
    mINP: float
    cmc: np.ndarray
    queries: int
    gallery: int = 0
    identities: int = 0


class Members(NamedTuple):
    """The gallery images of each query's own group. Query i's are entries offsets[i] .. offsets[i + 1].

    offsets    [Q + 1] int64
    positions  [M] int64 positions in trial.gallery, ascending within a query
    junk       [M] bool
    """

    offsets: np.ndarray
    positions: np.ndarray
    junk: np.ndarray

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets [Q + 1], positions [P]) of those that are not junk."""
        return np.append(0, np.cumsum(~self.junk))[self.offsets], self.positions[~self.junk]


def group_members(trial: Trial, index: Index, protocol: Protocol) -> Members:
    """Look up each query's group in the gallery and judge its images by the protocol's rule."""
    by_group = np.argsort(trial.group_gallery, kind="stable")
    groups = trial.group_gallery[by_group]
    first, end = (np.searchsorted(groups, trial.group_query, side) for side in ("left", "right"))
    offsets = np.append(0, np.cumsum(end - first))
    query = np.repeat(np.arange(len(trial.query)), end - first)
    positions = by_group[np.arange(offsets[-1]) - offsets[query] + first[query]]
    return Members(offsets, positions, protocol.junk(index, trial.query[query], trial.gallery[positions]))


def score_trial(
    trial: Trial,
    index: Index,
    protocol: Protocol,
    queries: Tensor,
    gallery: Tensor | Gallery,
    *,
    metric: str = "cosine",
    truncate: int | None = None,
) -> Metrics:
    """Metrics of one trial, by counting (`kernels.negatives_ahead`): no row is sorted, no Q×G matrix is kept.

    queries   [Q, D] features of trial.query, float32, float16 or bfloat16
    gallery   [G, D] those of trial.gallery, or what `kernels.prepare_gallery` made of them
    metric    "cosine", "ip" or "l2"
    truncate  None: the definitions above. INSTRUCT: the released Instruct-ReID evaluator, to compare with its figures:
              the ranking ends at this rank, counted before junk is removed, and AP is divided by the positives found up
              to there (0 if none), which raises mAP; CMC counts images. mINP is that of the whole ranking.
    Raises ValueError on wrong shapes and types and on rows that are not finite; InputError where no query has a
    positive.
    """
    members = group_members(trial, index, protocol)
    offsets, positives = members.positives()
    if not len(positives):
        raise InputError(_NO_POSITIVE)
    gallery = gallery if isinstance(gallery, kernels.Gallery) else kernels.prepare_gallery(gallery)
    group_query, group_gallery = (torch.from_numpy(group).to(queries.device) for group in trial[2:4])

    def rows(listed: np.ndarray) -> Tensor:
        return torch.from_numpy(listed).to(queries.device)

    scores = kernels.pair_scores(queries, gallery, rows(members.offsets), rows(members.positions), metric=metric)
    ahead = kernels.count_ahead(
        queries,
        gallery,
        group_query,
        group_gallery,
        rows(offsets),
        scores[rows(~members.junk)],
        rows(positives),
        metric=metric,
    )
    near = scores.cpu().numpy() * (-1 if metric == "l2" else 1)
    owner = np.repeat(np.arange(len(trial.query)), np.diff(members.offsets))
    order = np.lexsort((members.positions, -near, owner))  # every query's own group as it is ranked
    place = np.arange(len(order)) - members.offsets[owner]  # of each in that ranking
    counts = np.zeros(len(order), np.int64)
    counts[~members.junk] = ahead.cpu().numpy()
    hits = ~members.junk[order]
    firsts = None
    if protocol.deduplicate and truncate is None:
        best = order[hits][offsets[:-1][np.diff(offsets) > 0]]  # the first positive of every query that has one
        firsts = _people_ahead(trial, queries, gallery, metric, owner[best], near[best], members.positions[best])
    return _metrics(
        offsets,
        counts[order][hits],
        None if truncate is None else (counts[order] + place)[hits] < truncate,
        firsts,
        gallery=len(trial.gallery),
        identities=len(np.unique(index.pid[trial.query])),
    )


def _people_ahead(
    trial: Trial,
    queries: Tensor,
    gallery: Tensor | Gallery,
    metric: str,
    query: np.ndarray,
    score: np.ndarray,
    position: np.ndarray,
) -> np.ndarray:
    """For these queries: 1 + how many other groups have an image before the one with this score and position."""
    groups, own = np.unique(trial.group_gallery, return_inverse=True)
    asked = queries[torch.from_numpy(query).to(queries.device)]
    best = kernels.best_per_group(asked, gallery, torch.from_numpy(own).to(queries.device), len(groups), metric=metric)
    scores, rows = (part.cpu().numpy() for part in best)
    scores = -scores if metric == "l2" else scores
    ahead = (scores > score[:, None]) | ((scores == score[:, None]) & (rows < position[:, None]))
    return 1 + (ahead & (groups != trial.group_query[query, None])).sum(1)


def score_rescored(
    trial: Trial,
    index: Index,
    protocol: Protocol,
    queries: Tensor,
    gallery: Tensor | Gallery,
    best: np.ndarray,
    matching: np.ndarray,
    *,
    metric: str = "cosine",
    truncate: int | None = None,
) -> Metrics:
    """As `score_trial`, where every query's best are ordered anew; the others stay behind them, by `metric`.

    best      [Q, n] int64 gallery positions of the best (`kernels.topk`)
    matching  [Q, n] their new scores, greater = better; equal ones keep their order
    """
    members = group_members(trial, index, protocol)
    if members.junk.any():
        raise ValueError(f"protocol: expected one without junk, got {protocol.name}")
    rows = [torch.from_numpy(part).to(queries.device) for part in (members.offsets, members.positions)]
    groups = [torch.from_numpy(group).to(queries.device) for group in trial[2:4]]
    ahead = kernels.negatives_ahead(queries, gallery, *groups, *rows, metric=metric)[1].cpu().numpy()
    again = np.argsort(-matching, axis=1, kind="stable")
    head = np.take_along_axis(best, again, 1)
    misses = np.cumsum(trial.group_gallery[head] != trial.group_query[:, None], axis=1)
    query = np.repeat(np.arange(len(trial.query)), np.diff(members.offsets))
    for start in range(0, len(query), 4096):  # of [positives, n]
        part = slice(start, start + 4096)
        inside, place = np.nonzero(head[query[part]] == members.positions[part, None])
        ahead[start + inside] = misses[query[start + inside], place]
    order = np.lexsort((ahead, query))
    found = None
    if truncate is not None:
        found = ahead[order] + np.arange(len(order)) - members.offsets[query] < truncate
    identities = len(np.unique(index.pid[trial.query]))
    return _metrics(members.offsets, ahead[order], found, None, gallery=len(trial.gallery), identities=identities)


def metrics_from_counts(
    offsets: np.ndarray, ahead: np.ndarray, firsts: np.ndarray | None = None, *, gallery: int = 0, identities: int = 0
) -> Metrics:
    """Metrics from the number of negatives that come before each positive, in any order within a query.

    offsets, ahead  [Q + 1], [P] int64; offsets as in `Members.positives`
    firsts          [Q] int64: rank of the first positive where CMC counts identities; None where it counts images
    """
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    firsts = None if firsts is None else np.asarray(firsts)[np.diff(offsets) > 0]
    return _metrics(offsets, ahead[np.lexsort((ahead, query))], None, firsts, gallery=gallery, identities=identities)


def _metrics(
    offsets: np.ndarray,
    ahead: np.ndarray,
    found: np.ndarray | None,
    firsts: np.ndarray | None,
    *,
    gallery: int,
    identities: int,
) -> Metrics:
    """ahead [P]: negatives before each positive, ascending within a query. found [P]: before the ranking is cut;
    firsts: of the queries that have a positive. All queries at once."""
    count = np.diff(offsets)
    starts, count = offsets[:-1][count > 0], count[count > 0]
    if not len(starts):
        raise InputError(_NO_POSITIVE)
    hit = np.arange(len(ahead)) - np.repeat(starts, count) + 1  # 1, 2, .. within each query
    ranks = ahead + hit
    found = np.ones(len(ahead), bool) if found is None else found
    reached = np.add.reduceat(found.astype(np.int64), starts)
    precision = np.add.reduceat(np.where(found, hit / ranks, 0.0), starts) / np.maximum(reached, 1)
    if firsts is None:
        firsts = np.where(reached > 0, ranks[starts], RANKS + 1)
    return _mean(precision, count / ranks[starts + count - 1], firsts, gallery, identities)


def metrics_from_ranking(
    order: np.ndarray,
    matches: np.ndarray,
    junk: np.ndarray | None = None,
    *,
    identities: int = 0,
    truncate: int | None = None,
) -> Metrics:
    """Metrics of given rankings, such as a list whose head was re-scored.

    order          [Q, G] int64 gallery positions, best first
    matches, junk  [Q, G] bool in gallery order: relevant; left out (junk wins over match)
    truncate       as in `score_trial`
    """
    results = []
    for query, ranking in enumerate(order):
        places = np.arange(len(ranking)) if junk is None else np.flatnonzero(~junk[query, ranking])
        hits = matches[query, ranking[places]]
        ranks = np.flatnonzero(hits) + 1
        if len(ranks):
            reached = ranks if truncate is None else ranks[places[hits] < truncate]
            average = float(np.mean(np.arange(1, len(reached) + 1) / reached)) if len(reached) else 0.0
            results.append((average, len(ranks) / ranks[-1], reached[0] if len(reached) else RANKS + 1))
    if not results:
        raise InputError(_NO_POSITIVE)
    precision, penalty, first = (np.array(column) for column in zip(*results, strict=True))
    return _mean(precision, penalty, first, matches.shape[1], identities)


def mean_metrics(trials: Sequence[Metrics]) -> dict[str, float | int]:
    """Means over trials, named as in `metrics.json`; mAP_std: standard deviation of mAP over them (0 for one)."""
    cmc = np.mean([trial.cmc for trial in trials], axis=0)
    result: dict[str, float | int] = {
        "mAP": float(np.mean([trial.mAP for trial in trials])),
        "mINP": float(np.mean([trial.mINP for trial in trials])),
        **{f"rank{rank}": float(cmc[rank - 1]) for rank in (1, 5, 10)},
        "mAP_std": float(np.std([trial.mAP for trial in trials])),
    }
    for name in ("queries", "gallery", "identities"):
        result[name] = round(float(np.mean([getattr(trial, name) for trial in trials])))
    return result


def expected_random(trial: Trial, index: Index, protocol: Protocol) -> dict[str, float]:
    """What a ranking drawn uniformly at random scores on average: exact, from each query's R positives among n images.

    AP: (H_n + (R - 1) / (n - 1) · (n - H_n)) / n with the harmonic number H_n, for a positive is at rank k with
    probability R / n, and (k - 1)(R - 1) / (n - 1) others are then expected before it. INP: the sum of R / l · P(l)
    over the last positive's rank l, P(l) = C(l - 1, R - 1) / C(n, R). CMC: 1 - C(n - R, k) / C(n, k); rank5 and rank10
    are left out where CMC counts identities (rank1 is the same).
    """
    members = group_members(trial, index, protocol)
    positives = np.diff(members.positives()[0])
    if not positives.any():
        raise InputError(f"{protocol.name}, {index.root}: {_NO_POSITIVE}")
    images = len(trial.gallery) - (np.diff(members.offsets) - positives)
    pairs, counts = np.unique(np.stack([images, positives])[:, positives > 0], axis=1, return_counts=True)
    harmonic = np.cumsum(1 / np.arange(1, len(trial.gallery) + 1))
    total = dict.fromkeys(("mAP", "mINP", "rank1") + (() if protocol.deduplicate else ("rank5", "rank10")), 0.0)
    for n, R, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        H, last = harmonic[n - 1], np.arange(n, R - 1, -1)
        probability = R / n * np.cumprod(np.append(1.0, (last[1:] - R + 1) / last[1:]))
        values = {
            "mAP": (H + (R - 1) / max(n - 1, 1) * (n - H)) / n,
            "mINP": np.sum(probability * R / last),
        }
        for k in (1, 5, 10):
            drawn = np.arange(min(k, n))
            values[f"rank{k}"] = 1 - np.prod(np.maximum(n - R - drawn, 0) / (n - drawn))
        total = {name: value + count * values[name] for name, value in total.items()}
    return {name: float(value / counts.sum()) for name, value in total.items()}


def _mean(precision: np.ndarray, penalty: np.ndarray, first: np.ndarray, gallery: int, identities: int) -> Metrics:
    """From each query's AP, INP and rank of the first positive."""
    cmc = np.mean(first[:, None] <= np.arange(1, RANKS + 1), axis=0)
    return Metrics(float(precision.mean()), float(penalty.mean()), cmc, len(precision), gallery, identities)
