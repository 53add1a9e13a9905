#define WITH_CUDA 1
#include "launch.cuh"
#include "topk_block.h"

namespace {

constexpr int THREADS = 256;  // two blocks a multiprocessor at least: left to itself ptxas spills for more
constexpr int WARPS = 8;  // of a block whose warps work apart
constexpr int MANY = 1024;  // queries of a tile from which on a block takes QUERIES of them: still two blocks for each of
                            // a GPU's multiprocessors, of which the largest have some 130
using Block = OnDevice<THREADS>;

dim3 grid(int64_t queries, int64_t split) { return {static_cast<unsigned>(queries), static_cast<unsigned>(split)}; }

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 2) tile_kernel(TopK search, Tile tile, Candidates candidates,
                                                           int64_t Q) {
  __shared__ TopKShared<THREADS> shared;
  const int64_t q = tile.q0 + static_cast<int64_t>(blockIdx.x) * N;
  block_tile<Block, T, N>({}, search, tile, candidates.part(blockIdx.y, Q), q,
                          {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)}, shared);
}

__global__ void __launch_bounds__(THREADS, 2) finish_kernel(TopK search, Candidates candidates, int64_t Q) {
  __shared__ TopKShared<THREADS> shared;
  block_finish<Block>({}, search, candidates.part(blockIdx.y, Q), blockIdx.x, shared);
}

__global__ void __launch_bounds__(32 * WARPS) score_kernel(TopK search, Candidates candidates, int64_t width,
                                                         float* scores, int64_t* rows) {
  const int64_t q = blockIdx.x, list = blockIdx.y * static_cast<int64_t>(gridDim.x) + q;
  const int64_t out = (q * gridDim.y + blockIdx.y) * width;
  const int lane = threadIdx.x % 32;
  for (int64_t i = threadIdx.x / 32; i < width; i += WARPS) {
    const bool present = i < candidates.counts[list];
    const Candidate entry = present ? candidates.entries[list * candidates.capacity + i] : Candidate{};
    float score = -INFINITY;
    if (present) score = entry.low == entry.high ? entry.low : warp_score(search.pairs, q, entry.row, lane);
    if (lane == 0) {
      scores[out + i] = score;
      rows[out + i] = present ? entry.row : -1;
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

void topk_tile_cuda(const TopK& search, const Tile& tile, const Candidates& candidates, int64_t Q, int64_t split,
                    const Launch& launch) {
  const int64_t queries = tile.q1 - tile.q0;
  const bool many = queries >= MANY;
  const dim3 blocks = grid(many ? (queries + QUERIES - 1) / QUERIES : queries, split);
  launch_on(launch, [&](cudaStream_t stream) {
    if (many && tile.integers)
      tile_kernel<int32_t, QUERIES><<<blocks, THREADS, 0, stream>>>(search, tile, candidates, Q);
    else if (many)
      tile_kernel<float, QUERIES><<<blocks, THREADS, 0, stream>>>(search, tile, candidates, Q);
    else if (tile.integers)
      tile_kernel<int32_t, 1><<<blocks, THREADS, 0, stream>>>(search, tile, candidates, Q);
    else
      tile_kernel<float, 1><<<blocks, THREADS, 0, stream>>>(search, tile, candidates, Q);
  });
}

void topk_finish_cuda(const TopK& search, const Candidates& candidates, int64_t Q, int64_t split,
                      const Launch& launch) {
  launch_on(launch, [&](cudaStream_t stream) {
    finish_kernel<<<grid(Q, split), THREADS, 0, stream>>>(search, candidates, Q);
  });
}

void topk_score_cuda(const TopK& search, const Candidates& candidates, int64_t Q, int64_t split, int64_t width,
                     float* scores, int64_t* rows, const Launch& launch) {
  launch_on(launch, [&](cudaStream_t stream) {
    score_kernel<<<grid(Q, split), 32 * WARPS, 0, stream>>>(search, candidates, width, scores, rows);
  });
}
