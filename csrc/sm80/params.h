// The tiles of the portable tensor-core kernels, how shared memory is divided, and how weights are packed. T is float,
// which is multiplied as TF32, or a half type.
//
// branch.weights [blocks of kBlockColumns columns, slices, taps, kBlockColumns, slice]: for every column its weights of
// a slice of the convolution's channels, padded with zeros. Forward, the columns of a block are [4, kBlockChannels],
// gate-major; backward, hidden channels, and taps are in reverse.
#pragma once

#include "../step/params.h"

namespace mkconvlstm::sm80 {

using step::Backward;
using step::Branch;
using step::Forward;
using step::kBlockChannels;
using step::kBlockColumns;
using step::Sequence;

constexpr int kThreads = 128;
constexpr int kStages = 4;      // products of a tap and a slice of channels that are there or on their way
constexpr int kRowBytes = 128;  // a slice of channels of one pixel, or of one column of weights
constexpr int kChunkBytes = 16;
constexpr int kWeightBytes = kBlockColumns * kRowBytes;  // of one tap and slice

template <typename T>
constexpr int kSlice = kRowBytes / sizeof(T);  // channels

// Taps of one row of a kernel share what they read: a band of the pixels that follow one another in memory, at most
// kMaxHalo more than a tile has. A longer row takes several bands.
constexpr int kMaxHalo = 16;

MKCONVLSTM_INLINE int taps_per_band(int kernel_width, int dilation) {
  const int most = kMaxHalo / dilation + 1;
  return kernel_width < most ? kernel_width : most;
}

// A product in the ring of stages.
struct Product {
  int dy, dx;  // of its tap, in pixels
  int row;     // of the bands: what the tile's first pixel reads
};

// Shared memory, in bytes: a row of zeros, the ring of products, bands, the ring of weights. When all products are
// summed up, the sums lie over bands and weights.
constexpr int kZerosBegin = 0;
constexpr int kProductsBegin = kRowBytes;
constexpr int kBandsBegin = 2 * kRowBytes;
static_assert(kStages * sizeof(Product) <= kBandsBegin - kProductsBegin, "products must fit before the bands");
constexpr int kSumsRow = kBlockColumns + 1;  // floats of a pixel; odd, so that pixels lie in different banks

// Cells of a thread whose operands are on their way from memory at once, after the products.
constexpr int kBatch = 8;

// Pixels of a block that finishes a step where blocks have shared out the products of a tile.
constexpr int kFinishPixels = 16;

// How one pass is tiled.
struct Tiling {
  int band_slots;
  int band_rows;         // of one slot, a multiple of 8, after which the swizzle repeats
  int share;             // about as many of a tile's products go to one block
  int64_t partial_rows;  // pixels of all tiles
  float* partial_sums;   // [blocks of a tile, partial_rows, columns of all blocks]; null where no tile is shared out
};

// Blocks that share out so many products.
MKCONVLSTM_INLINE int64_t split_count(int64_t products, int64_t share) {
  const int64_t nearest = (2 * products + share) / (2 * share);
  return nearest < 1 ? 1 : nearest;
}

}  // namespace mkconvlstm::sm80
