#define WITH_CUDA 1
#include "launch.cuh"
#include "rank_block.h"

namespace {

constexpr int THREADS = 256;  // two blocks a multiprocessor at least: left to itself ptxas spills for more
constexpr int WARPS = 8;  // of a block whose warps work apart
using Block = OnDevice<THREADS>;

__global__ void __launch_bounds__(32 * WARPS) pair_scores_kernel(Pairs pairs, const int64_t* offsets,
                                                               const int64_t* positives, int64_t Q, int64_t P,
                                                               float* out) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (p >= P) return;
  const int lane = threadIdx.x % 32;
  const float score = warp_score(pairs, query_of(offsets, Q, p), positives[p], lane);
  if (lane == 0) out[p] = score;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) count_kernel(Counting counting, Tile tile, int64_t* counts) {
  __shared__ CountShared shared;
  block_count<Block, T>({}, counting, tile, tile.q0 + blockIdx.x, counts, shared);
}

// A thread for each query and column; those at a group's first column do its work.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) group_kernel(Grouped grouped, Tile tile, float* scores, int64_t* rows) {
  const int64_t q = tile.q0 + blockIdx.x;
  for (int64_t at = tile.g0 + threadIdx.x; at < tile.g1; at += THREADS)
    if (at == tile.g0 || grouped.group[at] != grouped.group[at - 1])
      group_segment<true, T>(grouped, tile, q, at, scores, rows);
}

}  // namespace

void pair_scores_cuda(const Pairs& pairs, const int64_t* offsets, const int64_t* positives, int64_t Q, int64_t P,
                      float* out, const Launch& launch) {
  if (P == 0) return;
  launch_on(launch, [&](cudaStream_t stream) {
    pair_scores_kernel<<<static_cast<unsigned>((P + WARPS - 1) / WARPS), 32 * WARPS, 0, stream>>>(pairs, offsets,
                                                                                                 positives, Q, P, out);
  });
}

void count_tile_cuda(const Counting& counting, const Tile& tile, int64_t* counts, const Launch& launch) {
  const auto blocks = static_cast<unsigned>(tile.q1 - tile.q0);
  launch_on(launch, [&](cudaStream_t stream) {
    if (tile.integers)
      count_kernel<int32_t><<<blocks, THREADS, 0, stream>>>(counting, tile, counts);
    else
      count_kernel<float><<<blocks, THREADS, 0, stream>>>(counting, tile, counts);
  });
}

void group_tile_cuda(const Grouped& grouped, const Tile& tile, float* scores, int64_t* rows, const Launch& launch) {
  const auto blocks = static_cast<unsigned>(tile.q1 - tile.q0);
  launch_on(launch, [&](cudaStream_t stream) {
    if (tile.integers)
      group_kernel<int32_t><<<blocks, THREADS, 0, stream>>>(grouped, tile, scores, rows);
    else
      group_kernel<float><<<blocks, THREADS, 0, stream>>>(grouped, tile, scores, rows);
  });
}
