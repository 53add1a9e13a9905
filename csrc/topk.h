// The k best gallery rows of every query: products pass a filter, what may be among the best is kept as candidates,
// and only those are scored canonically.
#pragma once
#include "filter.h"

// Candidates of Q queries among a part of the gallery; rows ascend in each list.
struct Candidates {
  Candidate* entries;  // [Q, capacity]
  int32_t* counts;     // [Q]
  float* floors;       // [Q]: k rows that score this at least are known
  int64_t capacity;    // > k

  // The next of several such in a row, [parts, Q, ...].
  HOST_DEVICE Candidates part(int64_t p, int64_t Q) const {
    return {entries + p * Q * capacity, counts + p * Q, floors + p * Q, capacity};
  }
};

struct TopK {
  Pairs pairs;
  Bounds bounds;
  Exclusion excluded;
  int64_t k;
};

// Adds what the tile's products let pass. On a CPU: with the calling thread.
void topk_tile_cpu(const TopK& search, const Tile& tile, const Candidates& candidates);

// For queries q0 .. q1: merges `parts` lists of candidates (of ascending parts of the gallery) and writes values
// [Q, k] (-inf where fewer than k rows are admissible) and rows [Q, k] (-1 there).
void topk_finish_cpu(const TopK& search, const Candidates* parts, int64_t count, int64_t q0, int64_t q1, float* values,
                     int64_t* rows);

// Norms of G rows.
void norms_cpu(const void* rows, int kind, int64_t G, int64_t D, double* norms);
