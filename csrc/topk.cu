#define WITH_CUDA 1
#include "launch.cuh"
#include "topk_block.h"

namespace {

constexpr int THREADS = 256;  // two blocks a multiprocessor at least: left to itself ptxas spills for more
constexpr int WARPS = 8;  // of a block whose warps work apart
using Block = OnDevice<THREADS>;

template <class T>
__global__ void __launch_bounds__(THREADS, 2) tile_kernel(TopK search, Tile tile, Candidates candidates) {
  __shared__ TopKShared<THREADS> shared;
  block_tile<Block, T>({}, search, tile, candidates, tile.q0 + blockIdx.x, shared);
}

__global__ void __launch_bounds__(THREADS, 2) finish_kernel(TopK search, Candidates candidates) {
  __shared__ TopKShared<THREADS> shared;
  block_finish<Block>({}, search, candidates, blockIdx.x, shared);
}

__global__ void __launch_bounds__(32 * WARPS) score_kernel(TopK search, Candidates candidates, int64_t width,
                                                         float* scores, int64_t* rows) {
  const int64_t q = blockIdx.x;
  const int lane = threadIdx.x % 32;
  for (int64_t i = threadIdx.x / 32; i < width; i += WARPS) {
    const bool present = i < candidates.counts[q];
    const Candidate entry = present ? candidates.entries[q * candidates.capacity + i] : Candidate{};
    float score = -INFINITY;
    if (present) score = entry.low == entry.high ? entry.low : warp_score(search.pairs, q, entry.row, lane);
    if (lane == 0) {
      scores[q * width + i] = score;
      rows[q * width + i] = present ? entry.row : -1;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(32 * WARPS) norms_kernel(const T* rows, int64_t G, int64_t D, double* norms) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (g >= G) return;
  const int lane = threadIdx.x % 32;
  const double sum = warp_sum_of_terms<false>(rows + g * D, rows + g * D, D, lane);
  if (lane == 0) norms[g] = square_root(sum);
}

}  // namespace

void norms_cuda(const void* rows, int kind, int64_t G, int64_t D, double* norms, const Launch& launch) {
  if (G == 0) return;
  const auto blocks = static_cast<unsigned>((G + WARPS - 1) / WARPS);
  launch_on(launch, [&](cudaStream_t stream) {
    if (kind == FLOAT16)
      norms_kernel<<<blocks, 32 * WARPS, 0, stream>>>(static_cast<const Half*>(rows), G, D, norms);
    else if (kind == BFLOAT16)
      norms_kernel<<<blocks, 32 * WARPS, 0, stream>>>(static_cast<const BFloat16*>(rows), G, D, norms);
    else
      norms_kernel<<<blocks, 32 * WARPS, 0, stream>>>(static_cast<const float*>(rows), G, D, norms);
  });
}

void topk_tile_cuda(const TopK& search, const Tile& tile, const Candidates& candidates, const Launch& launch) {
  const auto blocks = static_cast<unsigned>(tile.q1 - tile.q0);
  launch_on(launch, [&](cudaStream_t stream) {
    if (tile.integers)
      tile_kernel<int32_t><<<blocks, THREADS, 0, stream>>>(search, tile, candidates);
    else
      tile_kernel<float><<<blocks, THREADS, 0, stream>>>(search, tile, candidates);
  });
}

void topk_finish_cuda(const TopK& search, const Candidates& candidates, int64_t Q, const Launch& launch) {
  launch_on(launch, [&](cudaStream_t stream) {
    finish_kernel<<<static_cast<unsigned>(Q), THREADS, 0, stream>>>(search, candidates);
  });
}

void topk_score_cuda(const TopK& search, const Candidates& candidates, int64_t Q, int64_t width, float* scores,
                     int64_t* rows, const Launch& launch) {
  launch_on(launch, [&](cudaStream_t stream) {
    score_kernel<<<static_cast<unsigned>(Q), 32 * WARPS, 0, stream>>>(search, candidates, width, scores, rows);
  });
}
