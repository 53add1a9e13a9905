#include "simd.h"

#include <algorithm>
#include <atomic>

namespace {

int supported() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (!__builtin_cpu_supports("fma")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2")) return 1;
#endif
  return 0;
}

std::atomic<int> limit{2};

}  // namespace

int simd_level() {
  static const int level = supported();
  return std::min(level, limit.load(std::memory_order_relaxed));
}

void limit_simd(int level) { limit = level; }
