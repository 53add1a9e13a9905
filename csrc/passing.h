// The filter of a CPU: which of up to 64 products may belong to scores that reach a floor.
#pragma once
#include "filter.h"
#include "simd.h"

constexpr int STRIDE = 64;

// Bit i: whether product start + i (below end, of row g0 + start + i) may reach the floor.
template <int N, class T>
ALWAYS_INLINE uint64_t passing(const T* products, const Bounds& bounds, const QueryBound& q, int64_t g0, int64_t start,
                               int64_t end, float floor) {
  using V = Vector<N>;
  uint64_t pass = 0;
  if (end - start == STRIDE) {
    for (int i = 0; i < STRIDE; i += N) {
      const int64_t g = g0 + start + i;
      const auto key = V::load(products + start + i) * V::load(bounds.a + g) * q.s + (V::load(bounds.b + g) + q.c);
      const auto error = q.x * V::load(bounds.e + g) + (q.y * V::load(bounds.f + g) + q.h);
      pass |= bits(~(key + error < floor)) << i;
    }
  } else {
    for (int64_t i = start; i < end; ++i)
      pass |= static_cast<uint64_t>(!(candidate(static_cast<float>(products[i]), bounds, q, g0 + i).high < floor))
              << (i - start);
  }
  return pass;
}
