// Top-k as a thread block does it: one block owns its queries' lists, so nothing is lost, and the order of a list does not
// depend on timing. Compiled for the GPU by topk.cu and for tests, emulated, by emulated.cpp.
#pragma once
#include "block.h"
#include "topk.h"

constexpr int EACH = 4;     // columns that a thread looks at before the block meets
constexpr int QUERIES = 4;  // of a block, where there are many: a column's bounds (16 bytes) are read once for all

template <int T>
struct TopKShared {
  int32_t counts[T], spare[T], equal[T];
  Candidate staged[T];
  Selection selection;
  int32_t any[QUERIES];
  float floors[QUERIES];
  QueryBound of_query[QUERIES];
};

// Keeps the entries for which keep(entry, equals before it) holds, in order; equals(entry) tells which are counted.
template <class Block, class Equals, class Keep>
HOST_DEVICE inline int64_t partition(const Block& block, Candidate* list, int64_t n, Equals equals, Keep keep,
                                     TopKShared<Block::THREADS>& shared) {
  constexpr int T = Block::THREADS;
  int64_t kept = 0, equals_before = 0;
  for (int64_t base = 0; base < n; base += T) {
    block.each([&](int t) {
      if (base + t < n) shared.staged[t] = list[base + t];
      shared.equal[t] = base + t < n && equals(shared.staged[t]);
      shared.counts[t] = shared.equal[t];
    });
    const int32_t found = block.scan(shared.counts, shared.spare);
    block.each([&](int t) {
      const bool kept_too = base + t < n && keep(shared.staged[t], equals_before + shared.counts[t]);
      shared.equal[t] = kept_too;
    });
    block.each([&](int t) { shared.counts[t] = shared.equal[t]; });
    const int32_t passed = block.scan(shared.counts, shared.spare);
    block.each([&](int t) {
      if (shared.equal[t]) list[kept + shared.counts[t]] = shared.staged[t];
    });
    kept += passed;
    equals_before += found;
  }
  return kept;
}

// As compact() of topk.cpp; slot: the query's number in the block.
template <class Block>
HOST_DEVICE inline int64_t block_compact(const Block& block, const TopK& search, int64_t q, int slot, Candidate* list,
                                         int64_t n, int64_t room, TopKShared<Block::THREADS>& shared) {
  const int64_t k = search.k;
  const auto none = [](const Candidate&) { return false; };
  const auto lows = [&](int64_t i) { return list[i].low; };
  float limit = kth_greatest(block, n, k, lows, shared.selection, shared.counts, shared.spare);
  block.each([&](int t) {
    if (t == 0 && limit > shared.floors[slot]) shared.floors[slot] = limit;
  });
  const float floor = shared.floors[slot];
  n = partition(block, list, n, none, [&](const Candidate& entry, int64_t) { return !(entry.high < floor); }, shared);
  if (n <= k + room) return n;
  block.each([&](int t) {
    for (int64_t i = t; i < n; i += Block::THREADS)
      if (list[i].low != list[i].high) list[i].low = list[i].high = search.pairs.score<false>(q, list[i].row);
  });
  limit = kth_greatest(block, n, k, lows, shared.selection, shared.counts, shared.spare);
  const int64_t greater = k - shared.selection.rank;  // rows that score more; of the equal ones the lowest stay
  block.each([&](int t) {
    if (t == 0 && limit > shared.floors[slot]) shared.floors[slot] = limit;
  });
  return partition(
      block, list, n, [&](const Candidate& entry) { return entry.low == limit; },
      [&](const Candidate& entry, int64_t equals) {
        return entry.low > limit || (entry.low == limit && equals < k - greater);
      },
      shared);
}

// Adds to one query's list, of n entries, what of the columns start .. start + T EACH, below end, passes; returns the
// entries then.
template <class Block, class T>
HOST_DEVICE inline int64_t append(const Block& block, const TopK& search, const Tile& tile, const Candidates& candidates,
                                  int64_t q, int slot, int start, int end, int64_t n,
                                  TopKShared<Block::THREADS>& shared) {
  const int64_t width = tile.g1 - tile.g0;
  const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * width;
  Candidate* list = candidates.entries + q * candidates.capacity;
  // passing(i, entry): whether column i's row may be among the best, and is admissible
  const auto passing = [&](int i, Candidate& entry) {
    if (i >= end) return false;
    entry = candidate(static_cast<float>(products[i]), search.bounds, shared.of_query[slot], tile.g0 + i);
    return !(entry.high < shared.floors[slot]) && !search.excluded(q, entry.row);
  };
  for (;;) {
    block.each([&](int t) {
      int32_t count = 0;
      Candidate entry;
      for (int v = 0; v < EACH; ++v) count += passing(start + t * EACH + v, entry);
      shared.counts[t] = count;
    });
    const int32_t total = block.scan(shared.counts, shared.spare);
    if (n + total <= candidates.capacity) {
      block.each([&](int t) {
        int64_t at = n + shared.counts[t];
        Candidate entry;
        for (int v = 0; v < EACH; ++v)
          if (passing(start + t * EACH + v, entry)) list[at++] = entry;
      });
      return n + total;
    }
    // then look again: the floor has risen
    n = block_compact(block, search, q, slot, list, n, (candidates.capacity - search.k) / 2, shared);
  }
}

struct Share {  // of a tile's columns
  int number, of;
};

// Adds what this share of the products of up to N queries, from q on, lets pass. capacity >= k + 2 T EACH.
template <class Block, class T, int N>
HOST_DEVICE inline void block_tile(const Block& block, const TopK& search, const Tile& tile,
                                   const Candidates& candidates, int64_t q, Share share,
                                   TopKShared<Block::THREADS>& shared) {
  const int64_t width = tile.g1 - tile.g0;
  const int end = static_cast<int>(width * (share.number + 1) / share.of);
  const int count = static_cast<int>(tile.q1 - q < N ? tile.q1 - q : N);
  const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * width;
  block.each([&](int t) {
    if (t >= count) return;
    shared.floors[t] = candidates.floors[q + t];
    shared.of_query[t] = search.bounds.of_query[q + t];
  });
  for (int start = static_cast<int>(width * share.number / share.of); start < end; start += Block::THREADS * EACH) {
    block.each([&](int t) {
      if (t < N) shared.any[t] = 0;
    });
    block.each([&](int t) {
      for (int v = 0; v < EACH; ++v) {
        const int i = start + v * Block::THREADS + t;
        if (i >= end) continue;
        const RowBound row = row_bound(search.bounds, tile.g0 + i);
        for (int j = 0; j < N; ++j)
          if (j < count) {
            const auto product = static_cast<float>(products[j * width + i]);
            if (!(interval(product, row, shared.of_query[j]).high < shared.floors[j])) shared.any[j] = 1;
          }
      }
    });
    for (int j = 0; j < count; ++j)
      if (shared.any[j]) {
        const int64_t n = append<Block, T>(block, search, tile, candidates, q + j, j, start, end,
                                           candidates.counts[q + j], shared);
        block.each([&](int t) {
          if (t == 0) candidates.counts[q + j] = static_cast<int32_t>(n);
        });
      }
  }
  block.each([&](int t) {
    if (t < count) candidates.floors[q + t] = shared.floors[t];
  });
}

// Leaves in one query's list what may be among the k best; the caller scores and sorts it.
template <class Block>
HOST_DEVICE inline void block_finish(const Block& block, const TopK& search, const Candidates& candidates, int64_t q,
                                     TopKShared<Block::THREADS>& shared) {
  int64_t n = candidates.counts[q];
  if (n <= search.k) return;
  block.each([&](int t) {
    if (t == 0) shared.floors[0] = candidates.floors[q];
  });
  n = block_compact(block, search, q, 0, candidates.entries + q * candidates.capacity, n, n, shared);
  block.each([&](int t) {
    if (t == 0) candidates.counts[q] = static_cast<int32_t>(n);
  });
}
