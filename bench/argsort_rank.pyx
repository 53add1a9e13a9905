# cython: boundscheck=False, wraparound=False, cdivision=True
"""AP of every query of given rankings, as fast evaluators in use compute it: after an argsort, one compiled pass."""

import numpy as np


def average_precisions(const long long[:, :] order, const long long[:] query_id, const long long[:] query_camera,
                       const long long[:] gallery_id, const long long[:] gallery_camera):
    """order [Q, G]: gallery positions, best first. Same identity and camera is left out. NaN: no positive."""
    cdef long long q, i, g, hits, kept
    cdef double total
    result = np.full(order.shape[0], np.nan)
    cdef double[:] out = result
    for q in range(order.shape[0]):
        hits = kept = 0
        total = 0.0
        for i in range(order.shape[1]):
            g = order[q, i]
            if gallery_id[g] == query_id[q]:
                if gallery_camera[g] == query_camera[q]:
                    continue
                hits += 1
                total += hits / <double>(kept + 1)
            kept += 1
        if hits:
            out[q] = total / hits
    return result
