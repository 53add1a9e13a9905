// The work of one GPU thread block, written once: phases that all threads go through, with a barrier after each. On a GPU
// the threads run side by side; `Emulated` runs them in turn, so that tests and sanitizers see the same code on a CPU.
// What a thread hands to a later phase lies in memory that the block shares.
#pragma once
#include <cstdint>
#include <cstring>

#include "check.h"

template <int T>
struct Emulated {
  static constexpr int THREADS = T;
  template <class Phase>
  HOST_DEVICE void each(Phase phase) const {
    for (int thread = 0; thread < T; ++thread) phase(thread);
  }
  HOST_DEVICE void add(int32_t* to, int32_t value) const { *to += value; }
};

#ifdef __CUDACC__
template <int T>
struct OnDevice {
  static constexpr int THREADS = T;
  template <class Phase>
  __device__ void each(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  __device__ void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }
};
#endif

// Exclusive sums of counts [T] into counts itself; returns the total. spare [T].
template <class Block>
HOST_DEVICE inline int32_t scan(const Block& block, int32_t* counts, int32_t* spare) {
  constexpr int T = Block::THREADS;
  for (int distance = 1; distance < T; distance *= 2) {  // inclusive
    block.each([&](int t) { spare[t] = counts[t] + (t >= distance ? counts[t - distance] : 0); });
    block.each([&](int t) { counts[t] = spare[t]; });
  }
  const int32_t total = counts[T - 1];
  block.each([&](int t) { spare[t] = t > 0 ? counts[t - 1] : 0; });
  block.each([&](int t) { counts[t] = spare[t]; });
  return total;
}

// Bits that order as the numbers do (no NaN; -0 counts as 0).
HOST_DEVICE ALWAYS_INLINE uint32_t ordered(float value) {
  const float plain = value + 0.0f;
  uint32_t bits;
  memcpy(&bits, &plain, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

HOST_DEVICE ALWAYS_INLINE float unordered(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Selection {
  int32_t histogram[256];
  uint32_t prefix;
  int32_t rank;
};

// The k-th greatest of value(0 .. n - 1), 1 <= k <= n: byte by byte, from the highest.
template <class Block, class Value>
HOST_DEVICE inline float kth_greatest(const Block& block, int64_t n, int64_t k, Value value, Selection& shared) {
  block.each([&](int t) {
    if (t == 0) {
      shared.prefix = 0;
      shared.rank = static_cast<int32_t>(k);
    }
  });
  for (int shift = 24; shift >= 0; shift -= 8) {
    block.each([&](int t) {
      for (int i = t; i < 256; i += Block::THREADS) shared.histogram[i] = 0;
    });
    block.each([&](int t) {
      for (int64_t i = t; i < n; i += Block::THREADS) {
        const uint32_t key = ordered(value(i));
        if (shift == 24 || key >> (shift + 8) == shared.prefix) block.add(&shared.histogram[(key >> shift) & 255], 1);
      }
    });
    block.each([&](int t) {
      if (t != 0) return;
      int byte = 255;
      while (shared.histogram[byte] < shared.rank) shared.rank -= shared.histogram[byte--];
      shared.prefix = shared.prefix << 8 | static_cast<uint32_t>(byte);
    });
  }
  return unordered(shared.prefix);
}
