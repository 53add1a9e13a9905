#include "rank.h"

#include <algorithm>

#include "passing.h"
#include "rank_block.h"

namespace {

constexpr int GATHERED = 1024;  // of those that may be ahead of something, counted together

template <int N>
ALWAYS_INLINE void pair_scores_cpu_body(const Pairs& pairs, const int64_t* offsets, const int64_t* positives, int64_t Q,
                                        int64_t begin, int64_t end, float* out) {
  if (begin == end) return;
  int64_t q = query_of(offsets, Q, begin);
  for (int64_t p = begin; p < end; ++p) {
    while (offsets[q + 1] <= p) ++q;
    out[p] = pairs.score<FUSED<N>>(q, positives[p]);
  }
}

// What may be ahead of some listed row of one query.
struct Gathered {
  float low[GATHERED + STRIDE], high[GATHERED + STRIDE];
  int32_t row[GATHERED + STRIDE];
  int64_t n = 0;
};

template <int N>
ALWAYS_INLINE void count(const Counting& counting, int64_t q, Gathered& gathered, int64_t* counts) {
  using V = Vector<N>;
  const Listed& listed = counting.listed;
  const int64_t n = gathered.n, whole = n - n % N;
  for (int64_t p = listed.offsets[q]; p < listed.offsets[q + 1]; ++p) {
    const float threshold = listed.thresholds[p];
    typename V::I sure = {}, possible = {};
    for (int64_t i = 0; i < whole; i += N) {
      sure -= V::load(gathered.low + i) > threshold;  // a true lane is -1
      possible -= V::load(gathered.high + i) >= threshold;
    }
    int64_t certain = V::sum(sure), candidates = V::sum(possible);
    for (int64_t i = whole; i < n; ++i) {
      certain += gathered.low[i] > threshold;
      candidates += gathered.high[i] >= threshold;
    }
    if (certain != candidates)
      for (int64_t i = 0; i < n; ++i) {
        float &low = gathered.low[i], &high = gathered.high[i];
        if (low > threshold || high < threshold) continue;
        if (low != high) low = high = counting.pairs.score<FUSED<N>>(q, gathered.row[i]);
        certain += ahead(low, counting.index_base + gathered.row[i], threshold, listed.index[p]);
      }
    counts[p] += certain;
  }
  gathered.n = 0;
}

template <int N, class T>
ALWAYS_INLINE void count_tile(const Counting& counting, const Tile& tile, int64_t* counts) {
  const Bounds& bounds = counting.bounds;
  const Listed& listed = counting.listed;
  const int64_t width = tile.g1 - tile.g0;
  Gathered gathered;
  for (int64_t q = tile.q0; q < tile.q1; ++q) {
    const int64_t begin = listed.offsets[q], end = listed.offsets[q + 1];
    if (begin == end) continue;
    const float lowest = *std::min_element(listed.thresholds + begin, listed.thresholds + end);
    const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * width;
    const QueryBound own = bounds.of_query[q];
    const int64_t group = counting.query_group[q];
    for (int64_t start = 0; start < width; start += STRIDE) {
      const int64_t stop = std::min<int64_t>(start + STRIDE, width);
      for (uint64_t pass = passing<N>(products, bounds, own, tile.g0, start, stop, lowest); pass; pass &= pass - 1) {
        const int64_t i = start + __builtin_ctzll(pass);
        const Candidate entry = candidate(static_cast<float>(products[i]), bounds, own, tile.g0 + i);
        gathered.low[gathered.n] = entry.low;
        gathered.high[gathered.n] = entry.high;
        gathered.row[gathered.n] = entry.row;
        gathered.n += counting.gallery_group[entry.row] != group;
      }
      if (gathered.n >= GATHERED) count<N>(counting, q, gathered, counts);
    }
    count<N>(counting, q, gathered, counts);
  }
}

template <int N>
ALWAYS_INLINE void count_tile_cpu_body(const Counting& counting, const Tile& tile, int64_t* counts) {
  if (tile.integers)
    count_tile<N, int32_t>(counting, tile, counts);
  else
    count_tile<N, float>(counting, tile, counts);
}

template <int N, class T>
ALWAYS_INLINE void group_tile(const Grouped& grouped, const Tile& tile, float* scores, int64_t* rows) {
  for (int64_t q = tile.q0; q < tile.q1; ++q)
    for (int64_t start = tile.g0; start < tile.g1;) start = group_segment<FUSED<N>, T>(grouped, tile, q, start, scores, rows);
}

template <int N>
ALWAYS_INLINE void group_tile_cpu_body(const Grouped& grouped, const Tile& tile, float* scores, int64_t* rows) {
  if (tile.integers)
    group_tile<N, int32_t>(grouped, tile, scores, rows);
  else
    group_tile<N, float>(grouped, tile, scores, rows);
}

}  // namespace

VECTORIZED(pair_scores_cpu,
           (const Pairs& pairs, const int64_t* offsets, const int64_t* positives, int64_t Q, int64_t begin, int64_t end,
            float* out),
           (pairs, offsets, positives, Q, begin, end, out))
VECTORIZED(count_tile_cpu, (const Counting& counting, const Tile& tile, int64_t* counts), (counting, tile, counts))
VECTORIZED(group_tile_cpu, (const Grouped& grouped, const Tile& tile, float* scores, int64_t* rows),
           (grouped, tile, scores, rows))
