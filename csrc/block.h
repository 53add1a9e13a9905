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
  // Exclusive sums of counts [T] into counts itself; returns the total. spare [T].
  HOST_DEVICE int32_t scan(int32_t* counts, int32_t*) const {
    int32_t total = 0;
    for (int thread = 0; thread < T; ++thread) {
      const int32_t own = counts[thread];
      counts[thread] = total;
      total += own;
    }
    return total;
  }
};

#ifdef __CUDACC__
template <int T>
struct OnDevice {
  static constexpr int THREADS = T, WARPS = T / 32;
  template <class Phase>
  __device__ void each(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  __device__ void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }
  __device__ int32_t scan(int32_t* counts, int32_t* spare) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int32_t own = counts[thread];
    int32_t sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t before = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += before;
    }
    if (lane == 31) spare[warp] = sum;
    __syncthreads();
    int32_t before = 0, total = 0;
    for (int w = 0; w < WARPS; ++w) {
      total += spare[w];
      before += w < warp ? spare[w] : 0;
    }
    counts[thread] = before + sum - own;
    __syncthreads();
    return total;
  }
};
#endif

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

// The k-th greatest of value(0 .. n - 1), 1 <= k <= n: byte by byte, from the highest. counts, spare: [T], T divides 256.
template <class Block, class Value>
HOST_DEVICE inline float kth_greatest(const Block& block, int64_t n, int64_t k, Value value, Selection& shared,
                                      int32_t* counts, int32_t* spare) {
  constexpr int EACH_BINS = 256 / Block::THREADS;
  static_assert(EACH_BINS * Block::THREADS == 256, "a thread has as many bins as another");
  block.each([&](int t) {
    if (t == 0) {
      shared.prefix = 0;
      shared.rank = static_cast<int32_t>(k);
    }
  });
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t prefix = shared.prefix;
    const int32_t rank = shared.rank;  // read by all before the scan's barriers, written after them
    block.each([&](int t) {
      for (int i = t; i < 256; i += Block::THREADS) shared.histogram[i] = 0;
    });
    block.each([&](int t) {
      for (int64_t i = t; i < n; i += Block::THREADS) {
        const uint32_t key = ordered(value(i));
        if (shift == 24 || key >> (shift + 8) == prefix) block.add(&shared.histogram[(key >> shift) & 255], 1);
      }
    });
    block.each([&](int t) {  // from the highest bin
      counts[t] = 0;
      for (int i = t * EACH_BINS; i < (t + 1) * EACH_BINS; ++i) counts[t] += shared.histogram[255 - i];
    });
    block.scan(counts, spare);
    block.each([&](int t) {
      int32_t left = rank - counts[t];
      for (int i = t * EACH_BINS; left > 0 && i < (t + 1) * EACH_BINS; ++i) {
        const int32_t here = shared.histogram[255 - i];
        if (left <= here) {
          shared.prefix = prefix << 8 | static_cast<uint32_t>(255 - i);
          shared.rank = left;
        }
        left -= here;
      }
    });
  }
  return unordered(shared.prefix);
}
