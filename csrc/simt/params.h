// What the SIMT kernels read and write. All pointers are memory of one GPU, owned by the caller until the stream has
// passed the kernels. "pixels" are those of all images of a step, [batch, height, width]; "padded" says that zeros were
// added up to a multiple of a block's size. Scalar is float or double.
#pragma once

#include <cstdint>

#include "../gates.cuh"

namespace mkconvlstm::simt {

// A block of kThreads computes kPixelGroups * (pixels of a thread) pixels by kBlockColumns columns of a convolution's
// output; a thread kColumns columns, which follow one another in packed weights.
constexpr int kThreads = 128;
constexpr int kColumns = 4;
constexpr int kLanes = 16;
constexpr int kBlockColumns = kLanes * kColumns;
constexpr int kPixelGroups = kThreads / kLanes;
constexpr int kPackedDepth = 16;  // a convolution's input channels are padded to a multiple of it

constexpr int kMaxBranches = 32;  // they travel as an argument of the kernel

// One hidden branch.
template <typename Scalar>
struct Branch {
  Scalar* gates;          // [steps, pixels, 4 * channels], gate-major; overwritten
  const Scalar* weights;  // see Forward and Backward; begins at a multiple of 16 bytes
  int kernel_height, kernel_width, dilation_height, dilation_width;
  int channels;
  int first_channel;     // its first among all hidden ones
  unsigned first_block;  // of the blocks that share out the columns forward
};

// What both passes share.
template <typename Scalar>
struct Sequence {
  int64_t steps;
  uint32_t pixels, height, width;
  int hidden;  // channels of all branches
  int branch_count;
  Branch<Scalar> branches[kMaxBranches];  // those with most taps first

  const Scalar* c_0;  // [pixels, hidden]; null for zeros
  Scalar* c;          // [steps, pixels, hidden]; forward writes it
  int64_t c_step;     // elements from one step of c to the next; 0 where only the last is kept

  Peepholes peepholes;
  const Scalar* peephole;    // [3, hidden, peephole_pixels], rows i f o; null without peepholes
  uint32_t peephole_pixels;  // 1, or height * width
};

// branch.weights [taps, hidden padded, channels padded, 4]. Gates: pre-activations, which become activated.
template <typename Scalar>
struct Forward : Sequence<Scalar> {
  bool keep_gates;     // else what the pre-activations become is unspecified
  const Scalar* h_0;   // [pixels, hidden]; null for zeros
  const Scalar* bias;  // [4, hidden], added to the pre-activations; may be null
  Scalar* state;       // [2, pixels, hidden]: h_t in place t % 2, which the next step reads
  Scalar* h;           // [batch, steps, hidden, height, width]
};

// branch.weights [taps in reverse, 4 * channels padded, blocks of columns, kLanes, kColumns]: column [lane, k] of a
// block is its hidden channel k * kLanes + lane. Gates: activated, become the gradients of the pre-activations.
template <typename Scalar>
struct Backward : Sequence<Scalar> {
  const Scalar* dh;  // [batch, steps, hidden, height, width] of these strides; null for zeros
  int64_t dh_image, dh_step, dh_channel, dh_row, dh_column;
  const Scalar* dc_n;      // [pixels, hidden], gradient of the last cell state; null for zeros
  const int64_t* lengths;  // [batch]: the steps of each sequence; null where all have `steps`
  Scalar* dc;              // [pixels, hidden]: dL/dc_t as step t+1 sees it; becomes dc_0
  Scalar* dh_0;            // [pixels, hidden]; null where it is not wanted
};

}  // namespace mkconvlstm::simt
