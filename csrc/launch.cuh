// Launching on the right device and stream, with the errors of a launch.
#pragma once
#include <cuda_runtime.h>

#include "cuda.h"

inline void check_cuda(cudaError_t status) {
  check(status == cudaSuccess, std::string("CUDA: ") + cudaGetErrorString(status));
}

// Calls launched(stream) with the device current, and puts the device back.
template <class Work>
void launch_on(const Launch& launch, Work launched) {
  int before = 0;
  check_cuda(cudaGetDevice(&before));
  check_cuda(cudaSetDevice(launch.device));
  launched(static_cast<cudaStream_t>(launch.stream));
  const cudaError_t status = cudaGetLastError();
  check_cuda(cudaSetDevice(before));
  check_cuda(status);
}
