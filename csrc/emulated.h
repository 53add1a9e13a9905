// As the functions of topk.h and rank.h that end in _cpu, by the blocks that a GPU runs.
#pragma once
#include "rank.h"
#include "topk.h"

void topk_tile_emulated(const TopK& search, const Tile& tile, const Candidates& candidates, int64_t Q, int64_t split);
void topk_finish_emulated(const TopK& search, const Candidates* parts, int64_t count, int64_t q0, int64_t q1,
                          float* values, int64_t* rows);
void count_tile_emulated(const Counting& counting, const Tile& tile, int64_t* counts);
