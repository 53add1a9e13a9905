// Argument checks of the bindings: they throw std::invalid_argument, which pybind11 turns into ValueError.
#pragma once
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}
