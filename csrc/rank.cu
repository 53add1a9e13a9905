#include <cuda_runtime.h>

#define WITH_CUDA 1
#include "rank.h"

namespace {

__global__ void pair_scores_kernel(const float* queries, const float* gallery, const int64_t* offsets,
                                   const int64_t* positives, int64_t Q, int64_t D, int64_t P, int metric, float* out) {
  const int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (p < P) out[p] = canonical_score(queries + query_of(offsets, Q, p) * D, gallery + positives[p] * D, D, metric);
}

void check_cuda(cudaError_t status) { check(status == cudaSuccess, std::string("CUDA: ") + cudaGetErrorString(status)); }

}  // namespace

void pair_scores_cuda(const float* queries, const float* gallery, const int64_t* offsets, const int64_t* positives,
                      int64_t Q, int64_t D, int64_t P, int metric, int device, void* stream, float* out) {
  if (P == 0) return;
  int before = 0;
  check_cuda(cudaGetDevice(&before));
  check_cuda(cudaSetDevice(device));
  pair_scores_kernel<<<static_cast<unsigned>((P + 127) / 128), 128, 0, static_cast<cudaStream_t>(stream)>>>(
      queries, gallery, offsets, positives, Q, D, P, metric, out);
  const cudaError_t launched = cudaGetLastError();
  check_cuda(cudaSetDevice(before));
  check_cuda(launched);
}
