// Scores of listed pairs, and how many gallery rows come before them: what AP, CMC and mINP need, without a sort.
#pragma once
#include "filter.h"

// Query of pair p: the last q with offsets[q] <= p.
HOST_DEVICE inline int64_t query_of(const int64_t* offsets, int64_t Q, int64_t p) {
  int64_t low = 0, high = Q;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle] <= p) low = middle; else high = middle;
  }
  return low;
}

// Canonical scores of pairs begin .. end of the P pairs (offsets [Q+1], positives [P]: CSR); out [P].
void pair_scores_cpu(const Pairs& pairs, const int64_t* offsets, const int64_t* positives, int64_t Q, int64_t begin,
                     int64_t end, float* out);

// Listed rows: query q's are offsets[q] .. offsets[q + 1], each with its score and its number in the whole gallery; scores
// ascend within a query, of equal ones the numbers descend.
struct Listed {
  const int64_t* offsets;
  const float* thresholds;
  const int64_t* index;
};

struct Counting {
  Pairs pairs;
  Bounds bounds;
  const int64_t *query_group, *gallery_group;
  Listed listed;
  int64_t index_base;  // number, in the whole gallery, of this part's row 0
};

// Adds to counts [P] how many of the tile's rows of another group come before each listed one.
void count_tile_cpu(const Counting& counting, const Tile& tile, int64_t* counts);

// The best admissible row of each group. The tile's columns are positions of a list sorted by group: `row` [G] and
// `group` [G] tell what stands there, and bounds and gallery keys go by position.
struct Grouped {
  Pairs pairs;
  Bounds bounds;
  Exclusion excluded;
  const int64_t *row, *group;
  int64_t groups;
};

// Merges the tile into scores [Q, groups] (-inf: none yet) and rows [Q, groups] (-1).
void group_tile_cpu(const Grouped& grouped, const Tile& tile, float* scores, int64_t* rows);
