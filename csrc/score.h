// The canonical score of a pair: sums in float64 of the stored values, in one order everywhere, rounded once to float32.
//
// The order: feature i belongs to lane i mod 32; a lane adds its features in ascending order; lanes are added in pairs
// 16 apart, then 8, 4, 2, 1. A CPU adds lanes side by side in its vector registers, a GPU gives one to each thread of a
// warp, and all return the same bits. A product of two stored values is exact in float64.
#pragma once
#include <cstdint>
#include <cstring>

#include "check.h"

enum Metric : int { COSINE = 0, INNER_PRODUCT = 1, SQUARED_L2 = 2 };
enum Kind : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };  // of a gallery's values; queries are float32

constexpr int LANES = 32;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

HOST_DEVICE ALWAYS_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HOST_DEVICE ALWAYS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

HOST_DEVICE ALWAYS_INLINE float widen(float value) { return value; }
HOST_DEVICE ALWAYS_INLINE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
HOST_DEVICE ALWAYS_INLINE float widen(Half value) {  // finite ones
  const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const float normal = float_of(((magnitude << 13) + (112u << 23)) | sign);
  const float subnormal = (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(static_cast<int32_t>(magnitude));
  return magnitude < 0x400u ? subnormal : normal;
}

HOST_DEVICE ALWAYS_INLINE double square_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// sum + q r, or sum + (q - r)^2. The product of two stored values is exact, so that it may be fused with the addition
// (FUSED) or not; the square is rounded, on every device.
template <bool DISTANCE, bool FUSED, class A, class B>
HOST_DEVICE ALWAYS_INLINE double add_term(A query, B row, double sum) {
  const double q = widen(query), r = widen(row);
#ifdef __CUDA_ARCH__
  return DISTANCE ? __dadd_rn(__dmul_rn(q - r, q - r), sum) : __fma_rn(q, r, sum);
#else
  return DISTANCE ? (q - r) * (q - r) + sum : FUSED ? __builtin_fma(q, r, sum) : q * r + sum;
#endif
}

// Sum of the terms of D features by a thread that has no registers for all lanes: one lane after another, in the order in
// which their sums meet (0, 16, 8, 24, ..: numbers with their bits reversed), so that five are held at most.
template <bool DISTANCE, class A, class B>
HOST_DEVICE ALWAYS_INLINE double narrow_sum_of_terms(const A* query, const B* row, int64_t D) {
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
  for (int n = 0; n < LANES; ++n) {
    const int lane = (n & 1) << 4 | (n & 2) << 2 | (n & 4) | (n & 8) >> 2 | (n & 16) >> 4;
    double sum = 0;
    for (int64_t i = lane; i < D; i += LANES) sum = add_term<DISTANCE, false>(query[i], row[i], sum);
    if (!(n & 1)) { s0 = sum; continue; }
    sum = s0 + sum;
    if (!(n & 2)) { s1 = sum; continue; }
    sum = s1 + sum;
    if (!(n & 4)) { s2 = sum; continue; }
    sum = s2 + sum;
    if (!(n & 8)) { s3 = sum; continue; }
    sum = s3 + sum;
    if (!(n & 16)) { s4 = sum; continue; }
    return s4 + sum;
  }
  return 0;
}

// Sum of the terms of D features.
template <bool DISTANCE, bool FUSED, class A, class B>
HOST_DEVICE ALWAYS_INLINE double sum_of_terms(const A* query, const B* row, int64_t D) {
#ifdef __CUDA_ARCH__
  return narrow_sum_of_terms<DISTANCE>(query, row, D);
#else
  double lane[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= D; i += LANES)
    for (int l = 0; l < LANES; ++l) lane[l] = add_term<DISTANCE, FUSED>(query[i + l], row[i + l], lane[l]);
  for (int l = 0; i + l < D; ++l) lane[l] = add_term<DISTANCE, FUSED>(query[i + l], row[i + l], lane[l]);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
#endif
}

template <bool FUSED, class T>
HOST_DEVICE ALWAYS_INLINE double norm_of(const T* row, int64_t D) {
  return square_root(sum_of_terms<false, FUSED>(row, row, D));
}

// From the sum and, for COSINE, the norms; greater is nearer, so a distance comes back negative. COSINE of a zero
// vector is 0.
HOST_DEVICE ALWAYS_INLINE float finish_score(double sum, int metric, double query_norm, double row_norm) {
  const double norm = query_norm * row_norm;
  const double score = metric == SQUARED_L2 ? -sum : metric == INNER_PRODUCT ? sum : norm > 0 ? sum / norm : 0.0;
  return static_cast<float>(score) + 0.0f;  // never -0
}

// A search's queries, gallery and norms.
struct Pairs {
  const float* queries;       // [Q, D]
  const void* gallery;        // [G, D] of `kind`
  const double* query_norms;  // [Q]
  const double* gallery_norms;  // [G]
  int64_t D;
  int kind, metric;

  template <bool FUSED, class T>
  HOST_DEVICE ALWAYS_INLINE float score_as(int64_t q, int64_t g) const {
    const float* query = queries + q * D;
    const T* row = static_cast<const T*>(gallery) + g * D;
    const double sum = metric == SQUARED_L2 ? sum_of_terms<true, FUSED>(query, row, D)
                                            : sum_of_terms<false, FUSED>(query, row, D);
    return finish_score(sum, metric, query_norms[q], gallery_norms[g]);
  }

  template <bool FUSED>
  HOST_DEVICE ALWAYS_INLINE float score(int64_t q, int64_t g) const {
    if (kind == FLOAT16) return score_as<FUSED, Half>(q, g);
    if (kind == BFLOAT16) return score_as<FUSED, BFloat16>(q, g);
    return score_as<FUSED, float>(q, g);
  }
};

// Whether one score and row come before another in a ranking: greater score first, of equal ones the lower row.
HOST_DEVICE ALWAYS_INLINE bool ahead(float score, int64_t row, float other_score, int64_t other_row) {
  return score > other_score || (score == other_score && row < other_row);
}

#ifdef __CUDACC__
// sum_of_terms by a warp, each thread a lane; every thread gets the sum.
template <bool DISTANCE, class A, class B>
__device__ inline double warp_sum_of_terms(const A* query, const B* row, int64_t D, int lane) {
  double sum = 0;
  for (int64_t i = lane; i < D; i += LANES) sum = add_term<DISTANCE, true>(query[i], row[i], sum);
  for (int half = LANES / 2; half > 0; half /= 2) sum = __dadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, half));
  return sum;
}

template <class T>
__device__ inline float warp_score_as(const Pairs& pairs, int64_t q, int64_t g, int lane) {
  const float* query = pairs.queries + q * pairs.D;
  const T* row = static_cast<const T*>(pairs.gallery) + g * pairs.D;
  const double sum = pairs.metric == SQUARED_L2 ? warp_sum_of_terms<true>(query, row, pairs.D, lane)
                                                : warp_sum_of_terms<false>(query, row, pairs.D, lane);
  return finish_score(sum, pairs.metric, pairs.query_norms[q], pairs.gallery_norms[g]);
}

// pairs.score(q, g) by a warp.
__device__ inline float warp_score(const Pairs& pairs, int64_t q, int64_t g, int lane) {
  if (pairs.kind == FLOAT16) return warp_score_as<Half>(pairs, q, g, lane);
  if (pairs.kind == BFLOAT16) return warp_score_as<BFloat16>(pairs, q, g, lane);
  return warp_score_as<float>(pairs, q, g, lane);
}
#endif
