// Plans the recurrence on Hopper: tiles, the order of their products, shared memory. Arithmetic only, no CUDA needed.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "sm90/program.h"

namespace mkconvlstm {

// One branch of the hidden transition.
struct BranchShape {
  int64_t kernel_height = 1;
  int64_t kernel_width = 1;
  int64_t channels = 0;  // hidden channels that it serves, F_r
};

struct SequenceProblem {
  int64_t batch = 0;
  int64_t height = 0;
  int64_t width = 0;
  std::vector<BranchShape> branches;

  int64_t hidden() const;
};

// Throws std::invalid_argument with the reason where no kernel for Hopper serves the problem.
void check_served(const SequenceProblem& problem);

struct HopperLimits {
  int multiprocessors = 132;
  int shared_memory = 232448;  // bytes, of one block
};

// Half of the output columns: hidden channels that one kernel size serves. The first group has the smaller kernel; a
// single branch is cut in two groups.
struct ColumnGroup {
  int branch = 0;
  int first_in_branch = 0;
  int first_hidden = 0;  // the same channel among all hidden channels
  int channels = 0;
  int kernel_height = 1;
  int kernel_width = 1;
};

constexpr int kMaxTaps = 128;

// One position of the second group's kernel.
struct Tap {
  int dy, dx;
};

// How the items of a step, in pairs, are dealt to pairs of blocks: pair i of step t, number t * period + i, to number %
// pairs.
struct Dealing {
  int pairs = 0;
  int period = 0;

  int blocks() const { return sm90::kPair * pairs; }
  bool rotates() const { return pairs > 0 && period % pairs != 0; }  // an item's block is another at each step
};

struct ForwardPlan {
  sm90::ForwardProgram program{};
  std::vector<Tap> taps;  // those of both groups first
  std::array<ColumnGroup, 2> groups{};
  int tiles_m = 0;  // tiles of pixels, in pairs
  int tiles_n = 0;  // tiles of kGroupColumns / 4 channels of each group
  Dealing dealing;  // of tiles, those of the same channels one after another
  int shared_memory = 0;
  // First stage of a box in a tile's stream of weights: taps of both groups, one a stage; taps of the second, two.
  std::array<int, sm90::kMaxBoxes> both_stage{};
  std::array<int, sm90::kMaxBoxes> second_stage{};

  int64_t packed_bytes() const;
};

// A tile's sum over all gates and taps is cut into the program's pieces, one an item; all pieces of a tile come after
// those of the tile before, tiles of the same pixels one after another.
struct BackwardPlan {
  sm90::BackwardProgram program{};
  int tiles_m = 0;  // tiles of pixels, in pairs
  int tiles_n = 0;  // tiles of hidden channels
  Dealing dealing;  // of items
  int shared_memory = 0;

  int items() const { return tiles_m * tiles_n * program.piece_count; }
  int64_t packed_bytes() const;   // of the weights
  int64_t partial_bytes() const;  // of the sums of all items
};

// Both throw std::invalid_argument with the reason where the kernels cannot serve the problem.
ForwardPlan plan_forward(const SequenceProblem& problem, const HopperLimits& limits);
// pieces: how many a tile is cut into; 0: as many as are thought best.
BackwardPlan plan_backward(const SequenceProblem& problem, const HopperLimits& limits, int pieces = 0);

}  // namespace mkconvlstm
