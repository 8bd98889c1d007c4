// The discrete Fourier transform of overlapping tiles of images, float32, for convolutions with large kernels on CPUs.
// A spectrum holds about half of the side * side frequencies (u, v): as the pixels are real, those tell the rest.
#pragma once

#include <cstdint>

namespace mkconvlstm {

constexpr int kMaxSide = 32;

// Images [count, height, width, channels]; strides count elements, channels follow one another.
struct TiledImages {
  float* data;
  int64_t count, height, width, channels;
  int64_t image, row, column;  // strides
  int64_t step;                // pixels from one tile to the next, down and to the right
  int64_t rows, columns;       // tiles of an image

  int64_t tiles() const { return count * rows * columns; }
};

// [frequencies, 2, tiles, channels]: real and imaginary part; strides count elements, channels follow one another.
struct Spectrum {
  float* data;
  int64_t frequency, plane, tile;  // strides
  int side;                        // of a tile
};

// Products of the parts of two spectra, [frequencies, 2, 2, tiles, channels]: [a, b] holds part a of the first times
// part b of the second. Together they are the first spectrum times the conjugate of the second.
struct SpectrumProducts {
  const float* data;
  int64_t frequency, first, second, tile;  // strides
  int side;
};

int64_t count_frequencies(int side);

// Work comes in units of one tile and some channels; any of them may be done at the same time.
int64_t count_units(const TiledImages& images);

// The spectrum of side x side pixels, the first of which is `before` pixels up and left of the tile; pixels outside of
// the image, or `extent` pixels and more after the first, are zero.
void analyze(const TiledImages& images, int before, int extent, const Spectrum& spectrum, int64_t unit);

// The first step x step pixels of each tile, with bias [channels] added unless it is null; none outside of the image.
void synthesize(const SpectrumProducts& spectrum, const float* bias, const TiledImages& images, int64_t unit);

}  // namespace mkconvlstm
