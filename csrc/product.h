// Products of rows in int16, exact in int32: a processor makes two such multiplications in the time of one of float32.
//
// A row is rounded to codes, round(value * inverse), with inverse = 32767 / its norm: kernels/bounds.py shows that no sum
// of products leaves int32, and what rounding can change.
#pragma once
#include <cstdint>

#include "score.h"

constexpr int MOST_COLUMNS = 32;  // gallery rows of a panel, at most: two of the widest vectors

// Codes [n, E] of rows [n, D] of `kind`; E: D rounded up to even, what is added is 0.
void encode_cpu(const void* rows, int kind, const float* inverse, int64_t n, int64_t D, int16_t* codes);

struct Product {
  const int16_t* queries;  // codes [Q, E]
  int64_t Q;
  const void* rows;  // [G, D] of `kind`, encoded on the way
  int kind;
  const float* inverse;  // [G]
  int64_t G, D;
  int16_t* scratch;   // [G rounded up to MOST_COLUMNS, E]
  int32_t* products;  // [Q, G]
};

// With the calling thread.
void product_cpu(const Product& product);
