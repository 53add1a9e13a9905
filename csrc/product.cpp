#include "product.h"

#include <algorithm>
#include <vector>

#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace {

constexpr int ROWS = 4;         // queries of a block of products that is summed in registers
constexpr int64_t CACHED = 96;  // queries whose codes stay in the cache while a panel meets them

struct Separate {};  // multiplies, then adds
struct Fused {};     // in one: AVX512-VNNI

// In each lane: sum + x[0] y[0] + x[1] y[1], with the int16 pair x in all lanes and a pair y in each.
inline void add_products(Separate, Types<4>::I& sum, int32_t x, Types<4>::I y) {
#if defined(__x86_64__) && defined(__GNUC__)
  sum = sum + reinterpret_cast<Types<4>::I>(_mm_madd_epi16(_mm_set1_epi32(x), reinterpret_cast<__m128i>(y)));
#else
  for (int i = 0; i < 4; ++i)
    sum[i] += static_cast<int16_t>(x & 0xffff) * static_cast<int16_t>(y[i] & 0xffff) + (x >> 16) * (y[i] >> 16);
#endif
}
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) inline void add_products(Separate, Types<8>::I& sum, int32_t x, Types<8>::I y) {
  sum = sum + reinterpret_cast<Types<8>::I>(_mm256_madd_epi16(_mm256_set1_epi32(x), reinterpret_cast<__m256i>(y)));
}
__attribute__((target(AVX512))) inline void add_products(Separate, Types<16>::I& sum, int32_t x, Types<16>::I y) {
  sum = sum + reinterpret_cast<Types<16>::I>(_mm512_madd_epi16(_mm512_set1_epi32(x), reinterpret_cast<__m512i>(y)));
}
__attribute__((target(AVX512 ",avx512vnni"))) inline void add_products(Fused, Types<16>::I& sum, int32_t x,
                                                                       Types<16>::I y) {
  sum = reinterpret_cast<Types<16>::I>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(x),
                                                           reinterpret_cast<__m512i>(y)));
}
#endif

// Adding 3 * 2^22 rounds to the nearest whole number, which then stands in the low bits.
template <class T>
ALWAYS_INLINE void encode_row(const T* row, float inverse, int64_t D, int16_t* codes) {
  for (int64_t i = 0; i < D; ++i) codes[i] = static_cast<int16_t>(bits_of(widen(row[i]) * inverse + 0x3p22f));
}

template <int N>
ALWAYS_INLINE void encode_cpu_body(const void* rows, int kind, const float* inverse, int64_t n, int64_t D,
                                   int16_t* codes) {
  const int64_t E = D + D % 2;
  for (int64_t g = 0; g < n; ++g, codes += E) {
    if (D % 2) codes[D] = 0;
    if (kind == FLOAT16)
      encode_row(static_cast<const Half*>(rows) + g * D, inverse[g], D, codes);
    else if (kind == BFLOAT16)
      encode_row(static_cast<const BFloat16*>(rows) + g * D, inverse[g], D, codes);
    else
      encode_row(static_cast<const float*>(rows) + g * D, inverse[g], D, codes);
  }
}

// out [ROWS, 2 N]: ROWS queries by a panel [pairs, 2 N] of pairs of codes.
template <int N, class Adding>
ALWAYS_INLINE void block(const int16_t* const* queries, const int32_t* panel, int64_t pairs, int32_t* const* out) {
  using I = typename Types<N>::I;
  I s00{}, s01{}, s10{}, s11{}, s20{}, s21{}, s30{}, s31{};  // an array would not stay in registers
  for (int64_t p = 0; p < pairs; ++p) {
    I left, right;
    __builtin_memcpy(&left, panel + p * 2 * N, sizeof left);
    __builtin_memcpy(&right, panel + p * 2 * N + N, sizeof right);
    int32_t x[ROWS];
    for (int r = 0; r < ROWS; ++r) __builtin_memcpy(&x[r], queries[r] + 2 * p, sizeof x[r]);
    add_products(Adding(), s00, x[0], left), add_products(Adding(), s01, x[0], right);
    add_products(Adding(), s10, x[1], left), add_products(Adding(), s11, x[1], right);
    add_products(Adding(), s20, x[2], left), add_products(Adding(), s21, x[2], right);
    add_products(Adding(), s30, x[3], left), add_products(Adding(), s31, x[3], right);
  }
  const I sums[ROWS][2] = {{s00, s01}, {s10, s11}, {s20, s21}, {s30, s31}};
  for (int r = 0; r < ROWS; ++r) __builtin_memcpy(out[r], sums[r], sizeof sums[r]);
}

template <int N, class Adding>
ALWAYS_INLINE void multiply(const Product& given) {
  constexpr int COLUMNS = 2 * N;
  static_assert(COLUMNS <= MOST_COLUMNS, "the scratch is too small");
  const auto [queries, Q, rows, kind, inverse, G, D, scratch, products] = given;
  const int64_t E = D + D % 2, bytes = D * (kind == FLOAT32 ? 4 : 2);
  std::vector<int16_t> codes(E);
  for (int64_t g = 0; g < G + COLUMNS - 1 - (G - 1) % COLUMNS; ++g) {
    if (g < G)
      encode_cpu_body<N>(static_cast<const char*>(rows) + g * bytes, kind, inverse + g, 1, D, codes.data());
    else
      std::fill(codes.begin(), codes.end(), 0);
    int16_t* panel = scratch + (g - g % COLUMNS) * E + g % COLUMNS * 2;
    for (int64_t i = 0; i < E; i += 2) __builtin_memcpy(panel + i * COLUMNS, &codes[i], 2 * sizeof(int16_t));
  }
  int32_t beyond[ROWS][COLUMNS];  // the last panel's columns, not all of which are there
  for (int64_t first = 0; first < Q; first += CACHED)
    for (int64_t g = 0; g < G; g += COLUMNS)
      for (int64_t q = first; q < std::min(first + CACHED, Q); q += ROWS) {
        const bool whole = g + COLUMNS <= G;
        const int16_t* own[ROWS];
        int32_t* out[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          const int64_t row = std::min(q + r, Q - 1);  // beyond the last query: the last one again
          own[r] = queries + row * E;
          out[r] = whole ? products + row * G + g : beyond[r];
        }
        block<N, Adding>(own, reinterpret_cast<const int32_t*>(scratch + g * E), E / 2, out);
        for (int r = 0; !whole && r < ROWS; ++r)
          std::copy(beyond[r], beyond[r] + (G - g), products + std::min(q + r, Q - 1) * G + g);
      }
}

template <int N>
ALWAYS_INLINE void separate_product_body(const Product& product) {
  multiply<N, Separate>(product);
}
VECTORIZED(separate_product, (const Product& product), (product))

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target(AVX512 ",avx512vnni"))) void fused_product(const Product& product) {
  multiply<16, Fused>(product);
}

bool fuses() {
  static const bool supported = __builtin_cpu_supports("avx512vnni");
  return supported && simd_level() == 2;
}
#endif

}  // namespace

VECTORIZED(encode_cpu, (const void* rows, int kind, const float* inverse, int64_t n, int64_t D, int16_t* codes),
           (rows, kind, inverse, n, D, codes))

void product_cpu(const Product& product) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (fuses()) return fused_product(product);
#endif
  separate_product(product);
}
