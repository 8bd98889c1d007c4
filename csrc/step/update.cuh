// What a step does with its convolutions' sums, for one hidden channel at one pixel, whatever made the sums.
#pragma once

#include <cstdint>

#include "params.h"

namespace mkconvlstm::step {

// Which branch a block computes forward: blocks of columns are shared out in the order of the branches.
template <typename T>
__device__ const Branch<T>& branch_of_block(const Sequence<T>& s) {
  int r = 0;
  while (r + 1 < s.branch_count && blockIdx.y >= s.branches[r + 1].first_block) ++r;
  return s.branches[r];
}

template <typename T>
__device__ const Branch<T>& branch_of_channel(const Sequence<T>& s, int channel) {
  int r = 0;
  while (channel < s.branches[r].first_channel || channel >= s.branches[r].first_channel + s.branches[r].channels) ++r;
  return s.branches[r];
}

// What step t's convolutions see, where it convolves.
template <typename T>
__device__ const T* previous_h(const Forward<T>& p, int64_t t) {
  return t > 0 ? p.state + (t - 1) % 2 * p.pixels * p.state_row : p.h_0;
}

// The peephole weights of one hidden channel at one pixel.
template <typename T>
__device__ PeepholeWeights<Cell<T>> peephole_weights(const Sequence<T>& s, int channel, uint32_t pixel) {
  if (s.peepholes == Peepholes::kNone) return {};
  const int64_t row = int64_t{s.hidden} * s.peephole_pixels;
  const uint32_t in_image = s.peephole_pixels == 1 ? 0 : pixel % s.peephole_pixels;
  const Cell<T>* w = s.peephole + int64_t{channel} * s.peephole_pixels + in_image;
  return {w[0], w[row], w[2 * row]};
}

// Where h_t of a hidden channel at a pixel belongs.
template <typename T>
__device__ T* output_h(const Forward<T>& p, int64_t t, int channel, uint32_t pixel) {
  const uint32_t image_pixels = p.height * p.width;
  const int64_t image = pixel / image_pixels;
  return p.h + ((image * p.steps + t) * p.hidden + channel) * image_pixels + pixel % image_pixels;
}

// What is added to a hidden channel's pre-activations.
template <typename T>
__device__ Gates<Cell<T>> gate_bias(const Forward<T>& p, int channel) {
  if (p.bias == nullptr) return {};
  return {p.bias[channel], p.bias[p.hidden + channel], p.bias[2 * p.hidden + channel], p.bias[3 * p.hidden + channel]};
}

// What a cell sees of step t apart from h_{t-1}, as it lies in memory. To be read for several cells before any of them
// is updated: what is written might be what is read, for all that a compiler knows.
template <typename T>
struct CellInput {
  T z[4];
  Cell<T> c_prev;
  PeepholeWeights<Cell<T>> w;
};

// For the branch's channel j at one pixel.
template <typename T>
__device__ CellInput<T> read_cell(const Forward<T>& p, int64_t t, const Branch<T>& branch, int j, uint32_t pixel) {
  const int channel = branch.first_channel + j, gate = branch.channels;
  const T* z = branch.gates + (t * p.pixels + pixel) * 4 * gate + j;
  const Cell<T>* c_prev = t > 0 ? p.c + (t - 1) * p.c_step : p.c_0;
  return {{z[0], z[gate], z[2 * gate], z[3 * gate]},
          c_prev == nullptr ? Cell<T>(0) : c_prev[int64_t{pixel} * p.hidden + channel],
          peephole_weights(p, channel, pixel)};
}

// sums: the hidden-to-hidden part of the pre-activations. Gates, c and the state that the next step reads are written;
// returns h_t.
template <typename Math = StandardMath, typename T>
__device__ T update_state(const Forward<T>& p, int64_t t, const Branch<T>& branch, int j, uint32_t pixel,
                          const CellInput<T>& input, const Gates<Cell<T>>& bias, const Cell<T> (&sums)[4]) {
  const int channel = branch.first_channel + j;
  const auto z = [&](int gate) { return static_cast<Cell<T>>(input.z[gate]) + sums[gate]; };
  const CellOutput<Cell<T>> cell = cell_forward<Cell<T>, Math>(
      {z(0) + bias.i, z(1) + bias.f, z(2) + bias.g, z(3) + bias.o}, input.c_prev, input.w, p.peepholes);

  if (p.keep_gates) {
    T* gates = branch.gates + (t * p.pixels + pixel) * 4 * branch.channels + j;
    gates[0] = static_cast<T>(cell.gates.i);
    gates[branch.channels] = static_cast<T>(cell.gates.f);
    gates[2 * branch.channels] = static_cast<T>(cell.gates.g);
    gates[3 * branch.channels] = static_cast<T>(cell.gates.o);
  }
  p.c[t * p.c_step + int64_t{pixel} * p.hidden + channel] = cell.c;
  const T h = static_cast<T>(cell.h);
  p.state[(t % 2 * p.pixels + pixel) * p.state_row + channel] = h;
  return h;
}

// Where dL/dh_t of a hidden channel at a pixel flows in from outside.
template <typename T>
__device__ const T* incoming_dh(const Backward<T>& p, int64_t t, int channel, uint32_t pixel) {
  const uint32_t image_pixels = p.height * p.width;
  const uint32_t image = pixel / image_pixels, in_image = pixel % image_pixels;
  return p.dh + image * p.dh_image + t * p.dh_step + channel * p.dh_channel + in_image / p.width * p.dh_row +
         in_image % p.width * p.dh_column;
}

// What a cell's gradients need of step t apart from dL/dh_t; see CellInput.
template <typename T>
struct GradientInput {
  T gates[4];
  Cell<T> c_prev, c, dc, dc_n;
  PeepholeWeights<Cell<T>> w;
};

template <typename T>
__device__ GradientInput<T> read_gradient(const Backward<T>& p, int64_t t, const Branch<T>& branch, int channel,
                                          uint32_t pixel) {
  if (t < 0) return {};
  const int64_t element = int64_t{pixel} * p.hidden + channel, gate = branch.channels;
  const T* gates = branch.gates + (t * p.pixels + pixel) * 4 * gate + (channel - branch.first_channel);
  const Cell<T>* c_prev = t > 0 ? p.c + (t - 1) * p.c_step : p.c_0;
  const int64_t length = p.lengths == nullptr ? p.steps : p.lengths[pixel / (p.height * p.width)];
  return {{gates[0], gates[gate], gates[2 * gate], gates[3 * gate]},
          c_prev == nullptr ? Cell<T>(0) : c_prev[element],
          p.c[t * p.c_step + element],
          t == p.steps - 1 ? Cell<T>(0) : p.dc[element],
          p.dc_n == nullptr || t != length - 1 ? Cell<T>(0) : p.dc_n[element],
          peephole_weights(p, channel, pixel)};
}

// dh: dL/dh_t. Gates of one hidden channel at one pixel become their gradients.
template <typename Math = StandardMath, typename T>
__device__ void update_gradients(const Backward<T>& p, int64_t t, const Branch<T>& branch, int channel, uint32_t pixel,
                                 const GradientInput<T>& input, Cell<T> dh) {
  const int64_t element = int64_t{pixel} * p.hidden + channel;
  if (t < 0) {
    p.dh_0[element] = static_cast<T>(dh);
    return;
  }
  const auto known = [&](int gate) { return static_cast<Cell<T>>(input.gates[gate]); };
  const CellGradient<Cell<T>> gradient =
      cell_backward<Cell<T>, Math>({known(0), known(1), known(2), known(3)}, input.c_prev, input.c, dh,
                                   input.dc + input.dc_n, input.w, p.peepholes);
  const int64_t gate = branch.channels;
  T* gates = branch.gates + (t * p.pixels + pixel) * 4 * gate + (channel - branch.first_channel);
  gates[0] = static_cast<T>(gradient.dz.i);
  gates[gate] = static_cast<T>(gradient.dz.f);
  gates[2 * gate] = static_cast<T>(gradient.dz.g);
  gates[3 * gate] = static_cast<T>(gradient.dz.o);
  p.dc[element] = gradient.dc_prev;
}

}  // namespace mkconvlstm::step
