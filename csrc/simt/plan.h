// Chooses how the SIMT kernels are launched: a pure function of the problem and the device, no CUDA needed.
#pragma once

#include <cstdint>

#include "../step/problem.h"

namespace mkconvlstm::simt {

// One launch a step: the grid is [blocks_y, blocks_x], columns and pixels.
struct Pass {
  int pixels_per_thread = 0;  // 8, 4 or 2
  int64_t blocks_x = 0;
  int blocks_y = 0;
};

struct Plan : step::Columns {
  Pass forward, backward;
};

// An empty batch gets empty grids. Throws std::invalid_argument with the reason where the kernels cannot serve the
// problem.
Plan plan(const step::Problem& problem, int multiprocessors);

}  // namespace mkconvlstm::simt
