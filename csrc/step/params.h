// What kernels that compute one step a launch read and write. All pointers are memory of one GPU, owned by the caller
// until the stream has passed the kernels. "pixels" are those of all images of a step, [batch, height, width].
#pragma once

#include <cstdint>

#include "../gates.cuh"

namespace mkconvlstm::step {

// A block computes kBlockColumns columns of a convolution's output: forward the four gates of kBlockChannels hidden
// channels of one branch, backward the gradients of kBlockColumns hidden channels.
constexpr int kBlockColumns = 64;
constexpr int kBlockChannels = kBlockColumns / 4;

constexpr int kMaxBranches = 32;  // they travel as an argument of the kernel

// T is the type of gates, h and weights: double, float or a half type. Cells and peepholes have the type that the cell
// computes in.
template <typename T>
struct CellOf {
  using type = float;
};
template <>
struct CellOf<double> {
  using type = double;
};
template <typename T>
using Cell = typename CellOf<T>::type;

// One hidden branch.
template <typename T>
struct Branch {
  T* gates;          // [steps, pixels, 4 * channels], gate-major; overwritten
  const T* weights;  // packed as a family of kernels wants them; begins at a multiple of 16 bytes
  int kernel_height, kernel_width, dilation_height, dilation_width;
  int channels;
  int first_channel;     // its first among all hidden ones
  unsigned first_block;  // of the blocks that share out the columns forward
};

// What both passes share.
template <typename T>
struct Sequence {
  int64_t steps;
  uint32_t pixels, height, width;
  int hidden;  // channels of all branches
  int branch_count;
  Branch<T> branches[kMaxBranches];  // those with most taps first

  const Cell<T>* c_0;  // [pixels, hidden]; null for zeros
  Cell<T>* c;          // [steps, pixels, hidden]; forward writes it
  int64_t c_step;      // elements from one step of c to the next; 0 where only the last is kept

  Peepholes peepholes;
  const Cell<T>* peephole;   // [3, hidden, peephole_pixels], rows i f o; null without peepholes
  uint32_t peephole_pixels;  // 1, or height * width
};

// Gates: pre-activations, which become activated.
template <typename T>
struct Forward : Sequence<T> {
  bool keep_gates;      // else what the pre-activations become is unspecified
  int state_row;        // elements of a pixel in h_0 and state: hidden or more
  const T* h_0;         // [pixels, state_row]; null for zeros
  const Cell<T>* bias;  // [4, hidden], added to the pre-activations; may be null
  T* state;             // [2, pixels, state_row]: h_t in place t % 2, which the next step reads
  T* h;                 // [batch, steps, hidden, height, width]
};

// Gates: activated, become the gradients of the pre-activations.
template <typename T>
struct Backward : Sequence<T> {
  const T* dh;  // [batch, steps, hidden, height, width] of these strides; null for zeros
  int64_t dh_image, dh_step, dh_channel, dh_row, dh_column;
  const Cell<T>* dc_n;     // [pixels, hidden], gradient of the last cell state; null for zeros
  const int64_t* lengths;  // [batch]: the steps of each sequence; null where all have `steps`
  Cell<T>* dc;             // [pixels, hidden]: dL/dc_t as step t+1 sees it; becomes dc_0
  T* dh_0;                 // [pixels, hidden]; null where it is not wanted
};

// Whether step t has anything to convolve.
template <typename T>
MKCONVLSTM_INLINE bool convolves(const Forward<T>& forward, int64_t t) {
  return t > 0 || forward.h_0 != nullptr;
}

template <typename T>
MKCONVLSTM_INLINE bool convolves(const Backward<T>& backward, int64_t t) {
  return t + 1 < backward.steps;
}

// Calls launch(t) for every step in the order of the pass. Backward, step -1 is what leads to dh_0.
template <typename T, typename Launch>
void for_each_step(const Forward<T>& forward, Launch launch) {
  for (int64_t t = 0; t < forward.steps; ++t) launch(t);
}

template <typename T, typename Launch>
void for_each_step(const Backward<T>& backward, Launch launch) {
  const int64_t last = backward.dh_0 == nullptr ? 0 : -1;
  for (int64_t t = backward.steps - 1; t >= last; --t) launch(t);
}

}  // namespace mkconvlstm::step
