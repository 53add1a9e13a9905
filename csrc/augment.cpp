#include "augment.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <emmintrin.h>
#endif

namespace {

using F4 = Types<4>::F;

constexpr int64_t ALIGN = 16;  // columns of a plane are rounded up to the longest vector

// Which source positions make each result position: position o is the sum of weights[o * count + k] * source[first[o] + k].
// Weights beyond the source are zero.
struct Taps {
  int64_t count = 0, source = 0;
  std::vector<int32_t> first;
  std::vector<float> weights;

  // Triangle of radius max(1, in / out) source pixels about the centre, cut at the borders, sum 1.
  void make(int64_t in, int64_t out) {
    if (in == source && out == static_cast<int64_t>(first.size())) return;
    source = in;
    const double scale = static_cast<double>(in) / out, radius = std::max(1.0, scale);
    const int64_t most = static_cast<int64_t>(std::ceil(2 * radius)) + 1;
    first.resize(out);
    weights.assign(out * most, 0.0f);
    count = 1;
    for (int64_t o = 0; o < out; ++o) {
      const double centre = (o + 0.5) * scale;
      int64_t begin = std::max<int64_t>(0, static_cast<int64_t>(std::floor(centre - radius + 0.5)));
      const int64_t end = std::min(in, static_cast<int64_t>(std::floor(centre + radius + 0.5)));
      auto weight = [&](int64_t i) { return std::max(0.0, 1 - std::abs((i + 0.5 - centre) / radius)); };
      while (begin < end - 1 && weight(begin) == 0) ++begin;
      double sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += weight(i);
      for (int64_t i = begin; i < end; ++i) {
        const float part = static_cast<float>(weight(i) / sum);
        weights[o * most + i - begin] = part;
        if (part != 0) count = std::max(count, i - begin + 1);
      }
      first[o] = static_cast<int32_t>(begin);
    }
    for (int64_t o = 1; o < out; ++o)  // `most` was a guess: close the gaps
      std::copy_n(&weights[o * most], count, &weights[o * count]);
    weights.resize(out * count);
  }
};

struct Box {
  int64_t x0, x1, y0, y1;
};

struct Scratch {
  Taps across, down;
  std::vector<int32_t> place;  // result column -> where its taps begin in `row`: taps in the order of the result
  std::vector<float> part;     // their weights; none beyond the picture
  std::vector<float> row;      // one source row, 4 floats a pixel, then zeros
  std::vector<float> planes;   // the last rows that were resized across, 3 x padded width each
  std::vector<const float*> taps;  // of a result row, among them
};

#if defined(__x86_64__) && defined(__GNUC__)
ALWAYS_INLINE F4 pixel(const uint8_t* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, 4);
  const __m128i zero = _mm_setzero_si128();
  return _mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), zero), zero));
}
ALWAYS_INLINE void transpose(F4 v[4]) { _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]); }
#else
ALWAYS_INLINE F4 pixel(const uint8_t* from) {
  return F4{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
}
ALWAYS_INLINE void transpose(F4 v[4]) {
  F4 t[4];
  for (int i = 0; i < 4; ++i) t[i] = F4{v[0][i], v[1][i], v[2][i], v[3][i]};
  for (int i = 0; i < 4; ++i) v[i] = t[i];
}
#endif

// One row of the box, resized across: planes [3, padded] in the result's order of columns and channels.
template <int COUNT>
ALWAYS_INLINE void across(const Picture& picture, const Box& box, int64_t y, const int chosen[3], int64_t padded,
                          Scratch& s, float* planes) {
  const int64_t count = COUNT ? COUNT : s.across.count;
  const uint8_t* from = picture.pixels + ((box.y0 + y) * picture.width + box.x0) * 4;
  for (int64_t x = 0; x < box.x1 - box.x0; ++x) {
    const F4 value = pixel(from + x * 4);
    __builtin_memcpy(&s.row[x * 4], &value, sizeof value);
  }
  for (int64_t x = 0; x < padded; x += 4) {
    F4 colours[4];
    for (int i = 0; i < 4; ++i) {
      const float *taps = &s.row[s.place[x + i]], *weights = &s.part[(x + i) * count];
      colours[i] = F4{};
      for (int64_t k = 0; k < count; ++k) {
        F4 value;
        __builtin_memcpy(&value, taps + k * 4, sizeof value);
        colours[i] += value * weights[k];
      }
    }
    transpose(colours);
    for (int c = 0; c < 3; ++c) __builtin_memcpy(planes + c * padded + x, &colours[chosen[c]], sizeof(F4));
  }
}

// One row of the result from `count` rows of planes.
template <int N, int COUNT>
ALWAYS_INLINE void down(const Augmentation& how, const Canvas& canvas, int64_t padded, const float* const* planes,
                        const float* weights, int64_t count, float* out) {
  using V = Vector<N>;
  using F = typename V::F;
  const int64_t w = canvas.width, plane = canvas.height * w;
  for (int64_t x = 0; x < w; x += N) {
    F colour[3];
    for (int c = 0; c < 3; ++c) {
      colour[c] = F{};
      for (int64_t k = 0; k < (COUNT ? COUNT : count); ++k)
        colour[c] += V::load(planes[k] + c * padded + x) * weights[k];
    }
    F value[3] = {colour[0], colour[1], colour[2]};
    if (how.coloured != 0)
      for (int c = 0; c < 3; ++c) {
        const float* m = how.colours + 4 * c;
        value[c] = colour[0] * m[0] + colour[1] * m[1] + colour[2] * m[2] + m[3];
        value[c] = value[c] < 0.0f ? F{} : value[c];
        value[c] = value[c] > 255.0f ? F{} + 255.0f : value[c];
      }
    for (int c = 0; c < 3; ++c) {
      const F result = value[c] * canvas.scale[c] + canvas.bias[c];
      float* to = out + c * plane + x;
      if (w - x >= N)
        __builtin_memcpy(to, &result, sizeof result);
      else
        for (int64_t i = 0; i < w - x; ++i) to[i] = result[i];
    }
  }
}

// Whole pixels, as DALI's erase counts them.
ALWAYS_INLINE int64_t part(float fraction, int64_t size) {
  return std::clamp<int64_t>(static_cast<int64_t>(std::floor(fraction * size)), 0, size);
}

template <int N>
ALWAYS_INLINE void augment_body(const Picture& picture, const Augmentation& how, const Canvas& canvas, const Box& box,
                                int64_t padded, Scratch& s) {
  const int64_t h = canvas.height, w = canvas.width, move = static_cast<int64_t>(how.down), count = s.down.count;
  const int64_t rows = box.y1 - box.y0;
  const int64_t e0 = part(how.erase_top, h), e1 = part(how.erase_top + how.erase_height, h);
  const int64_t f0 = part(how.erase_left, w), f1 = part(how.erase_left + how.erase_width, w);
  const int chosen[3] = {static_cast<int>(how.channels[0]), static_cast<int>(how.channels[1]),
                         static_cast<int>(how.channels[2])};
  int64_t known = 0;  // rows before this one were resized across, or are not needed any more
  for (int64_t y = 0; y < h; ++y) {
    float* out = canvas.out + y * w;
    const bool inside = y + move >= 0 && y + move < h;
    const int64_t first = inside ? s.down.first[y + move] : 0, used = inside ? std::min(count, rows - first) : 0;
    for (known = std::max(known, first); known < first + used; ++known) {
      float* planes = &s.planes[known % count * 3 * padded];
      if (s.across.count == 2)
        across<2>(picture, box, known, chosen, padded, s, planes);
      else
        across<0>(picture, box, known, chosen, padded, s, planes);
    }
    for (int64_t k = 0; k < used; ++k) s.taps[k] = &s.planes[(first + k) % count * 3 * padded];
    const float* weights = inside ? &s.down.weights[(y + move) * count] : nullptr;
    if (used == 2)
      down<N, 2>(how, canvas, padded, s.taps.data(), weights, used, out);
    else
      down<N, 0>(how, canvas, padded, s.taps.data(), weights, used, out);
    if (y >= e0 && y < e1)
      for (int c = 0; c < 3; ++c)
        std::fill(out + c * h * w + f0, out + c * h * w + std::max(f0, f1), 0.0f);
  }
}

VECTORIZED(augment, (const Picture& picture, const Augmentation& how, const Canvas& canvas, const Box& box,
                     int64_t padded, Scratch& s), (picture, how, canvas, box, padded, s))

}  // namespace

void augment_cpu(const Picture& picture, const Augmentation& how, const Canvas& canvas) {
  thread_local Scratch s;
  auto span = [](float from, float to, int64_t size, int64_t& begin, int64_t& end) {
    begin = std::clamp<int64_t>(std::lround(from * size), 0, size - 1);
    end = std::clamp<int64_t>(std::lround(to * size), begin + 1, size);
  };
  Box box;
  span(how.left, how.right, picture.width, box.x0, box.x1);
  span(how.top, how.bottom, picture.height, box.y0, box.y1);
  const int64_t w = canvas.width, padded = (w + ALIGN - 1) / ALIGN * ALIGN;
  s.across.make(box.x1 - box.x0, w);
  s.down.make(box.y1 - box.y0, canvas.height);
  const int64_t count = s.across.count;
  s.place.assign(padded, 0);
  s.part.assign(padded * count, 0.0f);
  for (int64_t x = 0; x < w; ++x) {
    const int64_t column = (how.flip != 0 ? w - 1 - x : x) + static_cast<int64_t>(how.across);
    if (column < 0 || column >= w) continue;  // beyond the picture: no weights, black
    s.place[x] = s.across.first[column] * 4;
    std::copy_n(&s.across.weights[column * count], count, &s.part[x * count]);
  }
  s.row.assign((box.x1 - box.x0 + count) * 4, 0.0f);
  s.planes.resize(s.down.count * 3 * padded);
  s.taps.resize(s.down.count);
  augment(picture, how, canvas, box, padded, s);
}
