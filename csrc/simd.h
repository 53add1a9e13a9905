// One body for several instruction sets, chosen when the program runs.
//
// A body is an always-inlined template over the number of float32 values of a vector; VECTORIZED makes a function of it
// that runs the widest form this processor has (plain, AVX2, AVX-512), or what limit_simd() allows.
#pragma once
#include <cstdint>

#include "check.h"

#define AVX512 "fma,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512"

template <int N>
struct Types;  // g++ 12 wants the sizes as numbers
template <>
struct Types<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
};
template <>
struct Types<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
};
template <>
struct Types<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
};

template <int N>
struct Vector : Types<N> {
  using typename Types<N>::F;
  using typename Types<N>::I;

  static ALWAYS_INLINE F load(const float* from) {
    F value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
  static ALWAYS_INLINE F load(const int32_t* from) {
    I value;
    __builtin_memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, F);
  }
  static ALWAYS_INLINE int32_t sum(I value) {
    int32_t total = 0;
    for (int i = 0; i < N; ++i) total += value[i];
    return total;
  }
};

// Bit i: whether lane i of the mask is set.
inline uint64_t bits(Types<4>::I mask) {
#if defined(__x86_64__) && defined(__GNUC__)
  return static_cast<uint32_t>(__builtin_ia32_movmskps(reinterpret_cast<Types<4>::F>(mask)));
#else
  uint64_t all = 0;
  for (int i = 0; i < 4; ++i) all |= static_cast<uint64_t>(mask[i] & 1) << i;
  return all;
#endif
}
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) inline uint64_t bits(Types<8>::I mask) {
  return static_cast<uint32_t>(__builtin_ia32_movmskps256(reinterpret_cast<Types<8>::F>(mask)));
}
__attribute__((target(AVX512))) inline uint64_t bits(Types<16>::I mask) {
  return static_cast<uint16_t>(__builtin_ia32_cvtd2mask512(mask));
}
#endif

// Whether the instruction set of vectors of N multiplies and adds in one.
template <int N>
constexpr bool FUSED = N > 4;

int simd_level();              // 0 plain, 1 AVX2, 2 AVX-512
void limit_simd(int level);    // for tests: use no more than this

#if defined(__x86_64__) && defined(__GNUC__)
#define VECTORIZED(name, parameters, arguments)                                                                 \
  __attribute__((target(AVX512))) static void name##_512                                                        \
      parameters { name##_body<16> arguments; }                                                                 \
  __attribute__((target("avx2,fma"))) static void name##_256 parameters { name##_body<8> arguments; }               \
  static void name##_plain parameters { name##_body<4> arguments; }                                             \
  void name parameters {                                                                                        \
    (simd_level() == 2 ? name##_512 : simd_level() == 1 ? name##_256 : name##_plain) arguments;                 \
  }
#else
#define VECTORIZED(name, parameters, arguments) \
  void name parameters { name##_body<4> arguments; }
#endif
