// Scores behind exact ranking: float64 sums of the stored values in a fixed order, rounded once to float32.
// The same template runs on the CPU and in CUDA, so every device returns the same bits.
#pragma once
#include <cstdint>

#include "check.h"

enum Metric : int { COSINE = 0, INNER_PRODUCT = 1, SQUARED_L2 = 2 };

// Multiply and add are rounded apart on every device (no fused multiply-add), else the bits would differ.
HOST_DEVICE inline double multiply_add(double a, double b, double sum) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(__dmul_rn(a, b), sum);
#else
  return a * b + sum;
#endif
}

HOST_DEVICE inline double square_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// query, row: D contiguous float32. COSINE of a zero vector is 0.
HOST_DEVICE inline float canonical_score(const float* query, const float* row, int64_t D, int metric) {
  double dot = 0, qq = 0, rr = 0;
  for (int64_t i = 0; i < D; ++i) {
    const double q = query[i], r = row[i];
    if (metric == SQUARED_L2) {
      dot = multiply_add(q - r, q - r, dot);
    } else {
      dot = multiply_add(q, r, dot);
      if (metric == COSINE) {
        qq = multiply_add(q, q, qq);
        rr = multiply_add(r, r, rr);
      }
    }
  }
  if (metric != COSINE) return static_cast<float>(dot);
  const double norm = square_root(qq) * square_root(rr);
  return norm > 0 ? static_cast<float>(dot / norm) : 0.0f;
}

// Query of pair p: the last q with offsets[q] <= p.
HOST_DEVICE inline int64_t query_of(const int64_t* offsets, int64_t Q, int64_t p) {
  int64_t low = 0, high = Q;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle] <= p) low = middle; else high = middle;
  }
  return low;
}

// queries [Q, D], gallery [G, D] row-major float32; offsets [Q+1], positives [P] int64 (CSR); out [P] float32.
void pair_scores_cpu(const float* queries, const float* gallery, const int64_t* offsets, const int64_t* positives,
                     int64_t Q, int64_t D, int64_t P, int metric, int threads, float* out);
#ifdef WITH_CUDA
// The same on device addresses; stream is a cudaStream_t. Returns after launch.
void pair_scores_cuda(const float* queries, const float* gallery, const int64_t* offsets, const int64_t* positives,
                      int64_t Q, int64_t D, int64_t P, int metric, int device, void* stream, float* out);
#endif
