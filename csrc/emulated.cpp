// The GPU's blocks, emulated: for tests.
#include "emulated.h"

#include "rank_block.h"
#include "topk_block.h"

namespace {

using Block = Emulated<32>;

}  // namespace

void topk_tile_emulated(const TopK& search, const Tile& tile, const Candidates& candidates, int64_t Q, int64_t split) {
  TopKShared<Block::THREADS> shared;
  for (int p = 0; p < split; ++p) {
    const Share share{p, static_cast<int>(split)};
    for (int64_t q = tile.q0; q < tile.q1; q += QUERIES)
      if (tile.integers)
        block_tile<Block, int32_t, QUERIES>({}, search, tile, candidates.part(p, Q), q, share, shared);
      else
        block_tile<Block, float, QUERIES>({}, search, tile, candidates.part(p, Q), q, share, shared);
  }
}

void topk_finish_emulated(const TopK& search, const Candidates* parts, int64_t count, int64_t q0, int64_t q1,
                          float* values, int64_t* rows) {
  TopKShared<Block::THREADS> shared;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t q = q0; q < q1; ++q) block_finish<Block>({}, search, parts[p], q, shared);
  topk_finish_cpu(search, parts, count, q0, q1, values, rows);  // in the place of the GPU's scoring and sorting
}

void count_tile_emulated(const Counting& counting, const Tile& tile, int64_t* counts) {
  CountShared shared;
  for (int64_t q = tile.q0; q < tile.q1; ++q)
    if (tile.integers)
      block_count<Block, int32_t>({}, counting, tile, q, counts, shared);
    else
      block_count<Block, float>({}, counting, tile, q, counts, shared);
}
