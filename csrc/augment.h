// One picture -> one augmented, normalised image, in one pass over memory: crop, resize, shift, flip, choose channels,
// change colours, normalise, erase.
#pragma once
#include <cstdint>

// pixels [height, width, 4] uint8, red, green, blue and a byte that is not read.
struct Picture {
  const uint8_t* pixels;
  int64_t height, width;
};

// A row of kernels.augment_parameters.
struct Augmentation {
  float left, top, right, bottom;        // box, fractions
  float flip;                            // 0 or 1
  float down, across;                    // whole pixels that the window moves
  float erase_top, erase_left, erase_height, erase_width;  // fractions of the result
  float channels[3];
  float colours[12];                     // 3 x 4: matrix and offset
  float coloured;                        // 0: colours are left as they are
};

// out [3, height, width] float32.
struct Canvas {
  float* out;
  int64_t height, width;
  const float *scale, *bias;  // [3]: out = colour * scale + bias
};

void augment_cpu(const Picture& picture, const Augmentation& how, const Canvas& canvas);
