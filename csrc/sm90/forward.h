// The recurrence forward on Hopper: all steps in one launch.
// All pointers are device memory, owned by the caller, who keeps it alive until the stream has passed the kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../plan.h"
#include "../sequence_plan.h"
#include "images.h"

namespace mkconvlstm::sm90 {

// What is fetched and stored in boxes, of the images of the program's tiling. An element type T is float16 or bfloat16.
struct ForwardMaps {
  CUtensorMap state;  // T [2 * images, height, width, hidden]: h_t lies in half (t + 1) % 2; h_0 in the first
  // Of each group, unless it has no channels: pre-activations, with keep become gates. T [steps * images, 4, height,
  // width, channels].
  CUtensorMap gates[2];
};

struct GroupChannels {
  int first_hidden, channels;  // see ColumnGroup
};

// pixels = batch * height * width, in this order.
struct Forward {
  ForwardProgram program;
  GroupChannels groups[2];
  const char* packed;      // [tiles_n, stages_per_tile, kStageBytes]
  void* state;             // the maps' state
  void* h;                 // T [batch, steps, hidden, height, width]
  float* c;                // [keep ? steps : 1, pixels, hidden]
  int64_t h_step, c_step;  // elements from a step to the next one; c_step: none without keep
  const float* bias;       // [4 * hidden], gate-major, added to z; may be null
  const float* c_0;        // [pixels, hidden]; null: zeros
  uint32_t* counters;      // [2, tiles_m], zeros: how often a tile's group has been published
  int pixels, steps, hidden;
  Images images;  // of the batch
  int tiles_m, tiles_n;
  int period;         // of dealing tiles to blocks
  bool shares_cells;  // c_t is read by other blocks than those that wrote it
  bool has_h_0;       // without, the first step has no products
  bool keep;
  bool quads;  // lines begin, and images end, at multiples of four pixels
};

// Asynchronous; errors of the launch are left to cudaGetLastError. Only one such kernel may run at a time on a device's
// multiprocessors: the launch is cooperative.
void launch(const Forward& forward, const ForwardMaps& maps, DType dtype, int blocks, int shared_memory,
            cudaStream_t stream);

// weights: [4 * channels of the branch, hidden, kernel_height, kernel_width], 16-bit elements, one for each branch.
void pack(const ForwardPlan& plan, const SequenceProblem& problem, const void* const* weights, char* packed,
          cudaStream_t stream);

}  // namespace mkconvlstm::sm90
