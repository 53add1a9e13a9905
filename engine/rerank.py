"""k-reciprocal re-ranking (Zhong et al., CVPR 2017): neighbours that have each other as neighbours move up.

Everything is a sparse matrix over the n = Q + G images: time and memory grow with n k1, no (Q + G)² matrix is made. The
paper's distance d is squared Euclidean of unit features, divided by the image's largest; its equations are named below.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

import kernels


def rerank(
    queries: Tensor, gallery: Tensor, k: int, *, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> tuple[Tensor, Tensor]:
    """The k best gallery rows of every query by the re-ranked distance, (1 - weight) Jaccard + weight d (Eq. 12).

    queries, gallery  [Q, D], [G, D] float32 on one device; compared by cosine
    k1, k2            neighbours that make a set (Eq. 2), and that share theirs (Eq. 11)
    weight            lambda of Eq. 12

    Returns distances float32 [Q, k], ascending, and rows int64 [Q, k]; equal distances by lower row. ValueError where k
    exceeds G, or k1, k2 or weight make no sense.
    """
    Q, G = len(queries), len(gallery)
    if not 0 <= k <= G:
        raise ValueError(f"k: expected 0..{G}, the gallery's rows, got {k}")
    if not (1 <= k2 <= k1 and 0 <= weight <= 1):
        raise ValueError(f"k1, k2, weight: expected 1 <= k2 <= k1 and 0 <= weight <= 1, got {k1}, {k2}, {weight}")
    if not Q or not k:
        return queries.new_zeros(Q, k), torch.zeros(Q, k, dtype=torch.int64, device=queries.device)
    everyone = torch.cat([queries, gallery])
    prepared = kernels.prepare_gallery(everyone)
    nearest = kernels.topk(everyone, prepared, min(k1 + 1, Q + G))[1].cpu().numpy()
    farthest = _distance(-kernels.topk(-everyone, prepared, 1)[0][:, 0])
    wanted = _expanded(nearest, k1)
    distances = _distance(_pairs(everyone, prepared, wanted)) / np.repeat(farthest, np.diff(wanted.indptr))
    sets = sparse.csr_matrix((np.exp(-distances), wanted.indices, wanted.indptr), wanted.shape)  # Eq. 7
    sets = sparse.diags(1 / np.asarray(sets.sum(1))[:, 0]) @ sets
    if k2 > 1:
        sets = _neighbours(nearest[:, :k2]) @ sets / k2
    shared = _shared(sets[:Q].tocsr(), sets[Q:].tocsc())

    # Whoever shares nothing with the query has Jaccard 1, and comes behind all that are nearer: k rows suffice.
    among = kernels.prepare_gallery(gallery)
    cosines, nearby = kernels.topk(queries, among, k)
    scores, close = _distance(cosines), nearby.cpu().numpy()
    overlap = _distance(_pairs(queries, among, shared))
    distances = np.empty((Q, k), np.float32)
    rows = np.empty((Q, k), np.int64)
    for q in range(Q):
        part = slice(*shared.indptr[q : q + 2])
        alone = ~np.isin(close[q], shared.indices[part])
        row = np.concatenate([shared.indices[part], close[q, alone]])
        d = np.concatenate([overlap[part], scores[q, alone]]) / farthest[q]
        common = np.concatenate([shared.data[part], np.zeros(alone.sum())])
        final = ((1 - weight) * (1 - common / (2 - common)) + weight * d).astype(np.float32)  # Eq. 10, 12
        best = np.lexsort((row, final))[:k]
        distances[q], rows[q] = final[best], row[best]
    return tuple(torch.from_numpy(part).to(queries.device) for part in (distances, rows))  # type: ignore[return-value]


def _distance(cosines: Tensor) -> np.ndarray:
    return 2 - 2 * cosines.cpu().numpy().astype(np.float64)


def _neighbours(nearest: np.ndarray) -> sparse.csr_matrix:
    """[n, n] with a 1 for each listed neighbour."""
    n, k = nearest.shape
    return sparse.csr_matrix((np.ones(n * k), nearest.ravel(), np.arange(0, n * k + 1, k)), (n, n))


def _expanded(nearest: np.ndarray, k1: int) -> sparse.csr_matrix:
    """[n, n]: the sets R* of Eq. 5, with sorted indices."""
    own, half = (_neighbours(nearest[:, :k]) for k in (k1 + 1, round(k1 / 2) + 1))
    own, half = own.multiply(own.T).tocsr(), half.multiply(half.T).tocsr()  # Eq. 3: neighbours of each other
    common = own.multiply(own @ half.T).tocsr()  # of member c of a set and the set itself
    common.data = (common.data > 2 / 3 * np.asarray(half.sum(1))[common.indices, 0]).astype(np.float64)
    common.eliminate_zeros()
    result = (own + common @ half).tocsr()
    result.sort_indices()
    return result


def _pairs(queries: Tensor, gallery: kernels.Gallery, wanted: sparse.csr_matrix) -> Tensor:
    """[entries] cosines where `wanted` has entries."""
    listed = (torch.from_numpy(part.astype(np.int64)).to(queries.device) for part in (wanted.indptr, wanted.indices))
    return kernels.pair_scores(queries, gallery, *listed)


def _shared(queries: sparse.csr_matrix, gallery: sparse.csc_matrix) -> sparse.csr_matrix:
    """[Q, G] sums of the smaller weights (Eq. 9's numerator), by the gallery's columns: only common ones are met."""
    rows, sums, ends = [], [], [0]
    for q in range(queries.shape[0]):
        part = slice(*queries.indptr[q : q + 2])
        starts, stops = (gallery.indptr[queries.indices[part] + side] for side in (0, 1))
        counts = stops - starts
        place = np.repeat(stops - np.cumsum(counts), counts) + np.arange(counts.sum())
        smaller = np.minimum(gallery.data[place], np.repeat(queries.data[part], counts))
        row, which = np.unique(gallery.indices[place], return_inverse=True)
        rows.append(row)
        sums.append(np.bincount(which, smaller, len(row)))
        ends.append(ends[-1] + len(row))
    shape = queries.shape[0], gallery.shape[0]
    return sparse.csr_matrix((np.concatenate(sums), np.concatenate(rows), ends), shape)
