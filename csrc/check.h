// What all sources share: argument checks (std::invalid_argument, which pybind11 turns into ValueError) and attributes.
#pragma once
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif
#ifdef __CUDA_ARCH__
#define ALWAYS_INLINE __forceinline__
#else
#define ALWAYS_INLINE inline __attribute__((always_inline))
#endif

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}
