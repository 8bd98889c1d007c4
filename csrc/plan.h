// Chooses how a kernel is launched: a pure function of the problem and the device's limits, no CUDA needed.
#pragma once

#include <cstdint>

namespace mkconvlstm {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };
enum class PeepholeShape { kNone, kChannel, kPixel };

// How one image's [channels, pixels] lie in memory, in every operand of a problem.
enum class Layout {
  kChannelsFirst,  // contiguous, pixels fastest
  kChannelsLast,   // contiguous, channels fastest
  kStrided,        // anything else, or operands that differ
};

int scalar_bytes(DType dtype);
int accumulate_bytes(DType dtype);  // of the cell state and the peepholes

struct DeviceLimits {
  int multiprocessors = 132;
  int max_threads_per_multiprocessor = 2048;
};

// One pointwise step: gates, cell state and hidden state of every element of [batch, channels, height, width].
struct GateStepProblem {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kChannelsFirst;
  PeepholeShape peephole = PeepholeShape::kNone;
  int max_vector_width = 16;  // elements that addresses and batch strides allow to be accessed at once
};

// The grid is [blocks_y, blocks_x]: images, and blocks that share one image. Both loop until all is covered.
struct GateStepPlan {
  int vector_width = 1;           // neighbouring elements that one thread takes at once
  int64_t vectors_per_image = 0;  // channels * pixels / vector_width
  int threads = 0;
  int blocks_x = 0;
  int blocks_y = 0;
  int64_t bytes_forward = 0;  // every operand of the pass moved once, the optional ones included
  int64_t bytes_backward = 0;
};

// Throws std::invalid_argument for negative sizes and for an image of 2^31 elements or more.
// An empty problem gets an empty grid.
GateStepPlan plan(const GateStepProblem& problem, const DeviceLimits& limits);

}  // namespace mkconvlstm
