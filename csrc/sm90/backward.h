// The recurrence backward on Hopper: all steps in one launch.
// All pointers are device memory, owned by the caller, who keeps it alive until the stream has passed the kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../plan.h"
#include "../sequence_plan.h"
#include "images.h"

namespace mkconvlstm::sm90 {

constexpr int kCounterStride = 32;  // 128 bytes: many blocks poll, and no two counters share a line

// One branch's gates. An element type T is float16 or bfloat16.
struct GatePart {
  void* gates;  // T [steps, pixels, 4 * channels], gate-major; become pre-activations' gradients; through their maps
  int channels;
  int first_hidden;
};

// Of each part, as of all images of the program's tiling and steps.
struct BackwardMaps {
  CUtensorMap boxes[2];    // gates' gradients, [steps * images, height, width, 4 * channels]
  CUtensorMap gates[2];    // the same memory, [steps * images, 4, height, width, channels]
  CUtensorMap cells, c_0;  // [steps * images or images, height, width, hidden]
};

// pixels = batch * height * width, in this order.
struct Backward {
  BackwardProgram program;
  GatePart parts[2];   // a second one without channels begins after all hidden channels
  const char* packed;  // [tiles_n, stages_per_tile, kStageBytes]
  const void* c;       // [steps, pixels, hidden], float or T; read through its map
  const float* c_0;    // [pixels, hidden], the same; null: zeros
  const void* dh;      // T [batch, steps, hidden, height * width] of the strides below; null: zeros
  int64_t dh_image, dh_step, dh_channel, dh_pixel;
  const float* dc_n;       // [pixels, hidden]; null: zeros
  const int64_t* lengths;  // [batch]: the steps after which dc_n enters; null: all
  float* dc;               // [pixels, hidden]: dc_0 in the end
  void* dh_0;              // T [pixels, hidden]; null: not wanted
  float4* partial;         // [items, 2 * chunks, consumers' threads]: sums of what a piece multiplies
  // Zeros, kCounterStride apart: how many there are, of all steps.
  uint32_t* summed;    // [tiles]: pieces' sums
  uint32_t* finished;  // [tiles_m]: shares of dz
  int steps, hidden;
  Images images;  // of the batch
  int tiles_m, tiles_n, items;
  int period;  // of dealing items to blocks
  bool c_is_half;
};

// Asynchronous; errors of the launch are left to cudaGetLastError. Cooperative, as forward's launch.
void launch(const Backward& backward, const BackwardMaps& maps, DType dtype, int blocks, int shared_memory,
            cudaStream_t stream);

// weights: [4 * channels of the branch, hidden, kernel_height, kernel_width], 16-bit elements, one for each branch.
void pack(const BackwardPlan& plan, const SequenceProblem& problem, const void* const* weights, char* packed,
          cudaStream_t stream);

}  // namespace mkconvlstm::sm90
