// The functions of topk.h and rank.h on device addresses. `stream` is a cudaStream_t; all return after launch.
#pragma once
#ifdef WITH_CUDA
#include "rank.h"
#include "topk.h"

struct Launch {
  int device;
  void* stream;
};

void norms_cuda(const void* rows, int kind, int64_t G, int64_t D, double* norms, const Launch& launch);
// candidates [split, Q, ..]: each part's lists are of their own share of every tile's columns.
void topk_tile_cuda(const TopK& search, const Tile& tile, const Candidates& candidates, int64_t Q, int64_t split,
                    const Launch& launch);
// All lists, cut to what may be among the k best.
void topk_finish_cuda(const TopK& search, const Candidates& candidates, int64_t Q, int64_t split, const Launch& launch);
// Their canonical scores [Q, split, width] (-inf past a list's end) and rows (-1 there).
void topk_score_cuda(const TopK& search, const Candidates& candidates, int64_t Q, int64_t split, int64_t width,
                     float* scores, int64_t* rows, const Launch& launch);
void pair_scores_cuda(const Pairs& pairs, const int64_t* offsets, const int64_t* positives, int64_t Q, int64_t P,
                      float* out, const Launch& launch);
void count_tile_cuda(const Counting& counting, const Tile& tile, int64_t* counts, const Launch& launch);
void group_tile_cuda(const Grouped& grouped, const Tile& tile, float* scores, int64_t* rows, const Launch& launch);
#endif
