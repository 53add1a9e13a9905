// Counting and grouping as GPU threads do it; compiled for the GPU by rank.cu and for tests, emulated, by emulated.cpp.
#pragma once
#include "block.h"
#include "rank.h"

constexpr int LISTED = 1024;  // listed rows of a query that are counted together

struct CountShared {
  int32_t histogram[LISTED + 1];
};

// Adds, for one query, how many of the tile's rows come before each of its listed ones, whose thresholds ascend (of equal
// ones the row's number descends): so a row that comes before one listed row comes before all that are listed earlier,
// and is counted once, by how many these are.
template <class Block, class T>
HOST_DEVICE inline void block_count(const Block& block, const Counting& counting, const Tile& tile, int64_t q,
                                    int64_t* counts, CountShared& shared) {
  const Listed& listed = counting.listed;
  const int64_t width = tile.g1 - tile.g0, group = counting.query_group[q];
  const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * width;
  const QueryBound own = counting.bounds.of_query[q];
  for (int64_t first = listed.offsets[q]; first < listed.offsets[q + 1]; first += LISTED) {
    const int64_t left = listed.offsets[q + 1] - first;
    const int m = static_cast<int>(left < LISTED ? left : LISTED);
    const float* thresholds = listed.thresholds + first;
    block.each([&](int t) {
      for (int i = t; i <= m; i += Block::THREADS) shared.histogram[i] = 0;
    });
    block.each([&](int t) {
      for (int64_t i = t; i < width; i += Block::THREADS) {
        const Candidate entry = candidate(static_cast<float>(products[i]), counting.bounds, own, tile.g0 + i);
        if (entry.high < thresholds[0] || counting.gallery_group[entry.row] == group) continue;
        int passed = 0, end = m;  // thresholds below `low`
        while (passed < end) {
          const int middle = (passed + end) / 2;
          if (thresholds[middle] < entry.low) passed = middle + 1; else end = middle;
        }
        if (passed < m && thresholds[passed] <= entry.high) {
          const float score = entry.low == entry.high ? entry.low : counting.pairs.score<false>(q, entry.row);
          const int64_t row = counting.index_base + entry.row;
          while (passed < m && ahead(score, row, thresholds[passed], listed.index[first + passed])) ++passed;
        }
        if (passed > 0) block.add(&shared.histogram[passed], 1);
      }
    });
    block.each([&](int t) {
      for (int j = t; j < m; j += Block::THREADS) {
        int64_t sum = 0;
        for (int passed = j + 1; passed <= m; ++passed) sum += shared.histogram[passed];
        counts[first + j] += sum;
      }
    });
  }
}

// One query and one group: the columns from `start` on, as far as the group goes in this tile.
template <bool FUSED, class T>
HOST_DEVICE ALWAYS_INLINE int64_t group_segment(const Grouped& grouped, const Tile& tile, int64_t q, int64_t start,
                                         float* scores, int64_t* rows) {
  const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * (tile.g1 - tile.g0);
  const int64_t group = grouped.group[start];
  const auto bound = [&](int64_t at) {
    return candidate(static_cast<float>(products[at - tile.g0]), grouped.bounds, grouped.bounds.of_query[q], at);
  };
  float& best = scores[q * grouped.groups + group];
  int64_t& best_row = rows[q * grouped.groups + group];
  float floor = best;
  int64_t stop = start;
  for (; stop < tile.g1 && grouped.group[stop] == group; ++stop) {
    const float low = bound(stop).low;
    if (low > floor && !grouped.excluded(q, stop)) floor = low;
  }
  for (int64_t at = start; at < stop; ++at) {
    if (bound(at).high < floor || grouped.excluded(q, at)) continue;
    const float score = grouped.pairs.score<FUSED>(q, grouped.row[at]);
    if (best_row >= 0 && !ahead(score, grouped.row[at], best, best_row)) continue;
    best = score;
    best_row = grouped.row[at];
  }
  return stop;
}
