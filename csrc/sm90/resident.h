// The recurrence on Hopper where states are so small that each block keeps its weights in shared memory for all steps.
//
// A block owns 64 pixels of an image and 8 hidden channels. It multiplies the window of its pixels, those that any tap
// touches, with its weights: forward h with those of the channels' gates, backward dz with those of the channels.
// Backward, two blocks may form a cluster: each takes one half of the gates that are summed over, for the channels of
// both. h or dz goes from block to block through an exchange buffer in global memory.
// All pointers are device memory, owned by the caller, who keeps it alive until the stream has passed the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../plan.h"
#include "resident_shape.h"

namespace mkconvlstm::sm90 {

// Every byte of an exchange buffer before it is written: no kernel writes a NaN of such bytes.
constexpr int kAbsentByte = 0xff;

// Of one branch: T [steps, pixels, 4 * channels], gate-major, and T [4 * channels, hidden, kernel_height,
// kernel_width]. An element type T is float16 or bfloat16.
struct ResidentOperands {
  void* gates;
  const void* weights;
};

struct ResidentForward {
  ResidentProblem problem;
  ResidentOperands branches[kMostBranches];  // gates: pre-activations; with keep they become the activated gates
  void* exchange;                            // T [steps, pixels, hidden], absent: every h_t on its way
  const float* bias;                         // [4 * hidden], gate-major, added to the pre-activations; may be null
  const void* h_0;                           // T [pixels, hidden]; null: zeros
  const float* c_0;                          // [pixels, hidden]; null: zeros
  void* h;                                   // T [batch, steps, hidden, height, width]
  float* c;                                  // [keep ? steps : 1, pixels, hidden]
  int steps;
  bool keep;
};

struct ResidentBackward {
  ResidentProblem problem;
  ResidentOperands branches[kMostBranches];  // activated gates; become the gradients of the pre-activations
  void* exchange;                            // T [steps, pixels, 4 * hidden], gates fastest, absent: every dz_t
  const void* c;                             // [steps, pixels, hidden], float or T
  const float* c_0;                          // [pixels, hidden]; null: zeros
  const void* dh;                            // T [batch, steps, hidden, height * width] of these strides; null: zeros
  int64_t dh_image, dh_step, dh_channel, dh_pixel;
  const float* dc_n;       // [pixels, hidden]; null: zeros
  const int64_t* lengths;  // [batch]: the steps after which dc_n enters; null: all
  float* dc;               // [pixels, hidden]: dc_0 in the end
  void* dh_0;              // T [pixels, hidden]; null: not wanted
  float* dbias;            // [pixels, 4 * hidden]: the sums of dz over all steps; null: not wanted
  int steps;
  bool c_is_half;
};

// Asynchronous; errors of the launch are left to cudaGetLastError. Cooperative: all blocks run at once.
void launch(const ResidentForward& forward, DType dtype, int blocks, int shared_memory, cudaStream_t stream);
void launch(const ResidentBackward& backward, DType dtype, int blocks, int shared_memory, cudaStream_t stream);

}  // namespace mkconvlstm::sm90
