// Where a pixel of a batch lies in its image. Kernels divide by sizes that the host knows, by multiplication.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MKCONVLSTM_IMAGES __host__ __device__
#else
#define MKCONVLSTM_IMAGES
#endif

namespace mkconvlstm::sm90 {

// For values and dividends below 2^31. 2^(shift - 31) is the least power of two that is at least the value; `factor` is
// 2^shift / value, rounded up by less than any dividend could make visible.
struct Divisor {
  int value;
  uint32_t factor;
  int shift;

  static Divisor of(int value) {
    int shift = 31;
    while ((int64_t{1} << (shift - 31)) < value) ++shift;
    return {value, static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value), shift};
  }

  MKCONVLSTM_IMAGES int quotient(int dividend) const {
    return static_cast<int>(static_cast<uint32_t>(dividend) * uint64_t{factor} >> shift);
  }
};

// A batch of images, one after another, line by line.
struct Images {
  Divisor height, width, pixels;

  struct Place {
    int y, x;
  };

  static Images of(int height, int width) {
    return {Divisor::of(height), Divisor::of(width), Divisor::of(height * width)};
  }

  MKCONVLSTM_IMAGES int image(int pixel) const { return pixels.quotient(pixel); }

  MKCONVLSTM_IMAGES Place place(int pixel) const {
    const int line = width.quotient(pixel);
    return {line - height.quotient(line) * height.value, pixel - line * width.value};
  }
};

}  // namespace mkconvlstm::sm90
