// Top-k as a thread block does it: one block owns one query's list, so nothing is lost, and the order of a list does not
// depend on timing. Compiled for the GPU by topk.cu and for tests, emulated, by emulated.cpp.
#pragma once
#include "block.h"
#include "topk.h"

constexpr int EACH = 4;  // products that a thread looks at before the block meets

template <int T>
struct TopKShared {
  int32_t counts[T], spare[T], equal[T];
  Candidate staged[T];
  Selection selection;
  int32_t any;
  float floor;
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
    const int32_t found = scan(block, shared.counts, shared.spare);
    block.each([&](int t) {
      const bool kept_too = base + t < n && keep(shared.staged[t], equals_before + shared.counts[t]);
      shared.equal[t] = kept_too;
    });
    block.each([&](int t) { shared.counts[t] = shared.equal[t]; });
    const int32_t passed = scan(block, shared.counts, shared.spare);
    block.each([&](int t) {
      if (shared.equal[t]) list[kept + shared.counts[t]] = shared.staged[t];
    });
    kept += passed;
    equals_before += found;
  }
  return kept;
}

// As compact() of topk.cpp.
template <class Block>
HOST_DEVICE inline int64_t block_compact(const Block& block, const TopK& search, int64_t q, Candidate* list, int64_t n,
                                         int64_t room, TopKShared<Block::THREADS>& shared) {
  const int64_t k = search.k;
  const auto none = [](const Candidate&) { return false; };
  float limit = kth_greatest(block, n, k, [&](int64_t i) { return list[i].low; }, shared.selection);
  block.each([&](int t) {
    if (t == 0 && limit > shared.floor) shared.floor = limit;
  });
  const float floor = shared.floor;
  n = partition(block, list, n, none, [&](const Candidate& entry, int64_t) { return !(entry.high < floor); }, shared);
  if (n <= k + room) return n;
  block.each([&](int t) {
    for (int64_t i = t; i < n; i += Block::THREADS)
      if (list[i].low != list[i].high) list[i].low = list[i].high = search.pairs.score<false>(q, list[i].row);
  });
  limit = kth_greatest(block, n, k, [&](int64_t i) { return list[i].low; }, shared.selection);
  const int64_t greater = k - shared.selection.rank;  // rows that score more; of the equal ones the lowest stay
  block.each([&](int t) {
    if (t == 0 && limit > shared.floor) shared.floor = limit;
  });
  return partition(
      block, list, n, [&](const Candidate& entry) { return entry.low == limit; },
      [&](const Candidate& entry, int64_t equals) {
        return entry.low > limit || (entry.low == limit && equals < k - greater);
      },
      shared);
}

// Adds what one query's products let pass. capacity >= k + 2 T EACH.
template <class Block, class T>
HOST_DEVICE inline void block_tile(const Block& block, const TopK& search, const Tile& tile,
                                   const Candidates& candidates, int64_t q, TopKShared<Block::THREADS>& shared) {
  const int64_t width = tile.g1 - tile.g0, step = Block::THREADS * EACH;
  const T* products = static_cast<const T*>(tile.products) + (q - tile.q0) * width;
  const QueryBound own = search.bounds.of_query[q];
  Candidate* list = candidates.entries + q * candidates.capacity;
  int64_t n = candidates.counts[q];
  block.each([&](int t) {
    if (t == 0) shared.floor = candidates.floors[q];
  });
  // passing(i, entry): whether column i's row may be among the best, and is admissible
  const auto passing = [&](int64_t i, Candidate& entry) {
    if (i >= width) return false;
    entry = candidate(static_cast<float>(products[i]), search.bounds, own, tile.g0 + i);
    return !(entry.high < shared.floor) && !search.excluded(q, entry.row);
  };
  for (int64_t start = 0; start < width;) {
    block.each([&](int t) {
      if (t == 0) shared.any = 0;
    });
    block.each([&](int t) {
      int32_t count = 0;
      Candidate entry;
      for (int v = 0; v < EACH; ++v) count += passing(start + t * EACH + v, entry);
      shared.counts[t] = count;
      if (count) shared.any = 1;
    });
    if (shared.any) {
      const int32_t total = scan(block, shared.counts, shared.spare);
      if (n + total > candidates.capacity) {  // then look again: the floor has risen
        n = block_compact(block, search, q, list, n, (candidates.capacity - search.k) / 2, shared);
        continue;
      }
      block.each([&](int t) {
        int64_t at = n + shared.counts[t];
        Candidate entry;
        for (int v = 0; v < EACH; ++v)
          if (passing(start + t * EACH + v, entry)) list[at++] = entry;
      });
      n += total;
    }
    start += step;
  }
  block.each([&](int t) {
    if (t != 0) return;
    candidates.counts[q] = static_cast<int32_t>(n);
    candidates.floors[q] = shared.floor;
  });
}

// Leaves in one query's list what may be among the k best; the caller scores and sorts it.
template <class Block>
HOST_DEVICE inline void block_finish(const Block& block, const TopK& search, const Candidates& candidates, int64_t q,
                                     TopKShared<Block::THREADS>& shared) {
  int64_t n = candidates.counts[q];
  if (n <= search.k) return;
  block.each([&](int t) {
    if (t == 0) shared.floor = candidates.floors[q];
  });
  n = block_compact(block, search, q, candidates.entries + q * candidates.capacity, n, n, shared);
  block.each([&](int t) {
    if (t == 0) candidates.counts[q] = static_cast<int32_t>(n);
  });
}
