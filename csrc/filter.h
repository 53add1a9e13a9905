// What a product of a matrix multiplication says about the canonical score of its pair: an interval that holds it.
//
//   low, high = s a P + b + c  -/+  (x e + y f + h)
//
// P is the product (float32, or int32 of quantised operands); a, b, e, f belong to the gallery row, s, c, x, y, h to the
// query. kernels/bounds.py computes them for every metric and precision, and proves the interval. A row or query for
// which nothing can be promised has e or x infinite: its interval is everything.
#pragma once
#include <cmath>

#include "score.h"

struct QueryBound {
  float s, c, x, y, h;
};

struct Bounds {
  const float *a, *b, *e, *f;     // by gallery row
  const QueryBound* of_query;
};

struct Candidate {
  float low, high;  // equal: the canonical score
  int32_t row;
};

// A rectangle of products [q1 - q0, g1 - g0].
struct Tile {
  const void* products;
  int integers;  // int32, else float32
  int64_t q0, q1, g0, g1;
};

struct RowBound {
  float a, b, e, f;
};

HOST_DEVICE ALWAYS_INLINE RowBound row_bound(const Bounds& bounds, int64_t g) {
  return {bounds.a[g], bounds.b[g], bounds.e[g], bounds.f[g]};
}

struct Interval {
  float low, high;
};

HOST_DEVICE ALWAYS_INLINE Interval interval(float product, const RowBound& g, const QueryBound& q) {
  const float key = product * g.a * q.s + (g.b + q.c);
  const float error = q.x * g.e + (q.y * g.f + q.h);
  const float low = key - error, high = key + error;
  if (!(low <= high)) return {-INFINITY, INFINITY};  // NaN
  return {low, high};
}

HOST_DEVICE ALWAYS_INLINE Candidate candidate(float product, const Bounds& bounds, const QueryBound& q, int64_t g) {
  const Interval found = interval(product, row_bound(bounds, g), q);
  return {found.low, found.high, static_cast<int32_t>(g)};
}

// Keys by which a query leaves gallery rows out: any of J equal ones.
struct Exclusion {
  const int64_t *query_keys, *gallery_keys;  // [Q, J], [G, J]
  int64_t J;

  HOST_DEVICE ALWAYS_INLINE bool operator()(int64_t q, int64_t g) const {
    for (int64_t j = 0; j < J; ++j)
      if (query_keys[q * J + j] == gallery_keys[g * J + j]) return true;
    return false;
  }
};
