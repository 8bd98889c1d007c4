// The problem that kernels of one step a launch solve, and how its columns are shared out: no CUDA needed.
#pragma once

#include <cstdint>
#include <vector>

namespace mkconvlstm::step {

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

  int64_t hidden() const;
  int64_t pixels() const { return batch * height * width; }
};

// Blocks along the columns of the convolutions' outputs.
struct Columns {
  std::vector<int> order;         // of the branches: those with most taps first, since their blocks take longest
  std::vector<int> first_blocks;  // forward, of each branch in that order
  int forward_blocks = 0;
  int backward_blocks = 0;
};

// Throws std::invalid_argument with the reason where no kernel of one step a launch can serve the problem.
Columns share_columns(const Problem& problem, int multiprocessors);

int64_t ceil_div(int64_t a, int64_t b);

}  // namespace mkconvlstm::step
