#include "topk.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "passing.h"

namespace {

constexpr int64_t CACHED = 1 << 20;  // bytes of gallery rows that are scored for all queries before the next ones

// A number that k of a list's n >= k lows are not below, and no more than k or equal ones are: by bisection of their bits,
// ordered as the numbers are, for counting is vectorised and selecting is not.
ALWAYS_INLINE float kth_low(const Candidate* list, int64_t n, int64_t k, std::vector<int32_t>& scratch) {
  const auto turned = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  scratch.resize(n);
  int32_t* keys = scratch.data();
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, &list[i].low, sizeof bits);
    keys[i] = turned(bits);
    least = std::min(least, keys[i]);
    most = std::max(most, keys[i]);
  }
  int64_t low = least, beyond = static_cast<int64_t>(most) + 1;
  while (beyond - low > 1) {
    const auto middle = static_cast<int32_t>(low + (beyond - low) / 2);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= middle;
    if (count < k) {
      beyond = middle;
      continue;
    }
    low = middle;
    if (count == k) break;
  }
  const int32_t bits = turned(static_cast<int32_t>(low));
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Whoever cannot be among the k best leaves; the order stays.
ALWAYS_INLINE int64_t drop_below(Candidate* list, int64_t n, float floor) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    list[kept] = list[i];
    kept += !(list[i].high < floor);
  }
  return kept;
}

// Makes room in a full list: first by the intervals alone; where these leave too many, by canonical scores, of which
// exactly k stay.
template <int N>
ALWAYS_INLINE int64_t compact(const TopK& search, int64_t q, Candidate* list, int64_t n, int64_t capacity, float& floor,
                              std::vector<int32_t>& scratch) {
  const int64_t k = search.k;
  floor = std::max(floor, kth_low(list, n, k, scratch));
  n = drop_below(list, n, floor);
  if (n <= k + (capacity - k) / 2) return n;
  for (int64_t i = 0; i < n; ++i)
    if (list[i].low != list[i].high) list[i].low = list[i].high = search.pairs.score<FUSED<N>>(q, list[i].row);
  const auto better = [](const Candidate& a, const Candidate& b) { return ahead(a.low, a.row, b.low, b.row); };
  std::nth_element(list, list + (k - 1), list + n, better);
  floor = std::max(floor, list[k - 1].low);
  std::sort(list, list + k, [](const Candidate& a, const Candidate& b) { return a.row < b.row; });
  return k;
}

template <int N, class T>
ALWAYS_INLINE void tile_of(const TopK& search, const Tile& tile, const Candidates& candidates) {
  const Bounds& bounds = search.bounds;
  const int64_t width = tile.g1 - tile.g0;
  std::vector<int32_t> scratch;
  for (int64_t q = tile.q0; q < tile.q1; ++q) {
    const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * width;
    const QueryBound own = bounds.of_query[q];
    Candidate* list = candidates.entries + q * candidates.capacity;
    int64_t n = candidates.counts[q];
    float floor = candidates.floors[q];
    for (int64_t start = 0; start < width; start += STRIDE) {
      const int64_t end = std::min<int64_t>(start + STRIDE, width);
      for (uint64_t pass = passing<N>(products, bounds, own, tile.g0, start, end, floor); pass; pass &= pass - 1) {
        const int64_t i = start + __builtin_ctzll(pass);
        const Candidate entry = candidate(static_cast<float>(products[i]), bounds, own, tile.g0 + i);
        if (entry.high < floor || search.excluded(q, entry.row)) continue;
        list[n++] = entry;
        if (n == candidates.capacity) n = compact<N>(search, q, list, n, candidates.capacity, floor, scratch);
      }
    }
    candidates.counts[q] = static_cast<int32_t>(n);
    candidates.floors[q] = floor;
  }
}

template <int N>
ALWAYS_INLINE void topk_tile_cpu_body(const TopK& search, const Tile& tile, const Candidates& candidates) {
  if (tile.integers)
    tile_of<N, int32_t>(search, tile, candidates);
  else
    tile_of<N, float>(search, tile, candidates);
}

template <int N>
ALWAYS_INLINE void topk_finish_cpu_body(const TopK& search, const Candidates* parts, int64_t count, int64_t q0,
                                        int64_t q1, float* values, int64_t* rows) {
  const int64_t k = search.k;
  std::vector<Candidate> all;
  std::vector<int32_t> scratch;
  for (int64_t q = q0; q < q1; ++q) {  // what no part alone could drop
    all.clear();
    for (int64_t p = 0; p < count; ++p) {
      const Candidate* list = parts[p].entries + q * parts[p].capacity;
      all.insert(all.end(), list, list + parts[p].counts[q]);
    }
    if (static_cast<int64_t>(all.size()) <= k) continue;
    const float floor = kth_low(all.data(), all.size(), k, scratch);
    for (int64_t p = 0; p < count; ++p)
      parts[p].counts[q] = static_cast<int32_t>(
          drop_below(parts[p].entries + q * parts[p].capacity, parts[p].counts[q], floor));
  }
  // A gallery row is read from memory once and meets all queries that want it.
  const int64_t bytes = search.pairs.D * (search.pairs.kind == FLOAT32 ? 4 : 2);
  const int64_t step = std::max<int64_t>(16, CACHED / std::max<int64_t>(1, bytes));
  std::vector<int32_t> next(q1 - q0);
  for (int64_t p = 0; p < count; ++p) {
    std::fill(next.begin(), next.end(), 0);
    int64_t last = -1;
    for (int64_t q = q0; q < q1; ++q)
      if (const int32_t n = parts[p].counts[q])
        last = std::max<int64_t>(last, parts[p].entries[q * parts[p].capacity + n - 1].row);
    for (int64_t end = step; end - step <= last; end += step)
      for (int64_t q = q0; q < q1; ++q) {
        Candidate* list = parts[p].entries + q * parts[p].capacity;
        int32_t& i = next[q - q0];
        for (; i < parts[p].counts[q] && list[i].row < end; ++i)
          if (list[i].low != list[i].high)
            list[i].low = list[i].high = search.pairs.score<FUSED<N>>(q, list[i].row);
      }
  }
  for (int64_t q = q0; q < q1; ++q) {
    all.clear();
    for (int64_t p = 0; p < count; ++p) {
      const Candidate* list = parts[p].entries + q * parts[p].capacity;
      all.insert(all.end(), list, list + parts[p].counts[q]);
    }
    const int64_t found = std::min<int64_t>(k, all.size());
    const auto better = [](const Candidate& a, const Candidate& b) { return ahead(a.low, a.row, b.low, b.row); };
    std::nth_element(all.begin(), all.begin() + found, all.end(), better);
    std::sort(all.begin(), all.begin() + found, better);
    for (int64_t i = 0; i < k; ++i) {
      values[q * k + i] = i < found ? all[i].low : -std::numeric_limits<float>::infinity();
      rows[q * k + i] = i < found ? all[i].row : -1;
    }
  }
}

template <int N, class T>
ALWAYS_INLINE void norms_of(const T* rows, int64_t G, int64_t D, double* norms) {
  for (int64_t g = 0; g < G; ++g) norms[g] = norm_of<FUSED<N>>(rows + g * D, D);
}

template <int N>
ALWAYS_INLINE void norms_cpu_body(const void* rows, int kind, int64_t G, int64_t D, double* norms) {
  if (kind == FLOAT16)
    norms_of<N>(static_cast<const Half*>(rows), G, D, norms);
  else if (kind == BFLOAT16)
    norms_of<N>(static_cast<const BFloat16*>(rows), G, D, norms);
  else
    norms_of<N>(static_cast<const float*>(rows), G, D, norms);
}

}  // namespace

VECTORIZED(topk_tile_cpu, (const TopK& search, const Tile& tile, const Candidates& candidates),
           (search, tile, candidates))
VECTORIZED(topk_finish_cpu,
           (const TopK& search, const Candidates* parts, int64_t count, int64_t q0, int64_t q1, float* values,
            int64_t* rows),
           (search, parts, count, q0, q1, values, rows))
VECTORIZED(norms_cpu, (const void* rows, int kind, int64_t G, int64_t D, double* norms), (rows, kind, G, D, norms))
