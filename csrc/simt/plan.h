// Chooses how the SIMT kernels are launched: a pure function of the problem and the device, no CUDA needed.
#pragma once

#include <cstdint>
#include <vector>

namespace mkconvlstm::simt {

// One branch of the hidden transition.
struct BranchShape {
  int64_t channels = 0;  // hidden channels that it serves
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t dilation_height = 1, dilation_width = 1;

  int64_t taps() const { return kernel_height * kernel_width; }
};

struct Problem {
  int64_t batch = 0;
  int64_t height = 0;
  int64_t width = 0;
  std::vector<BranchShape> branches;
};

// One launch a step: the grid is [blocks_y, blocks_x], columns and pixels.
struct Pass {
  int pixels_per_thread = 0;  // 8, 4 or 2
  int64_t blocks_x = 0;
  int blocks_y = 0;
};

struct Plan {
  Pass forward, backward;
  std::vector<int> order;         // of the branches: those with most taps first, since their blocks take longest
  std::vector<int> first_blocks;  // forward, of each branch in that order, along y
};

// An empty batch gets empty grids. Throws std::invalid_argument with the reason where the kernels cannot serve the
// problem.
Plan plan(const Problem& problem, int multiprocessors);

}  // namespace mkconvlstm::simt
