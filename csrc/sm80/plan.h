// Chooses how the tensor-core kernels are launched: a pure function of the problem and the device, no CUDA needed.
#pragma once

#include <cstdint>

#include "../step/problem.h"

namespace mkconvlstm::sm80 {

constexpr int kLargeTile = 128, kSmallTile = 64;  // pixels of a block

struct Limits {
  int multiprocessors = 132;
  int shared_memory = 232448;  // bytes, of one block
};

// A step's grid is [splits, blocks_y, blocks_x]: blocks that share out a tile's products, columns and pixels.
struct Pass {
  int block_pixels = 0;
  int64_t blocks_x = 0;
  int blocks_y = 0;
  int splits = 1;                     // the most that any tile has
  int share = 0;                      // see Tiling
  int band_slots = 0, band_rows = 0;  // see Tiling
  int shared_memory = 0;              // bytes
};

struct Plan : step::Columns {
  Pass forward, backward;
};

// element_bytes: 4 for float32, 2 for half types. An empty batch gets empty grids. Throws std::invalid_argument with
// the reason where the kernels cannot serve the problem.
Plan plan(const step::Problem& problem, int element_bytes, const Limits& limits);

}  // namespace mkconvlstm::sm80
