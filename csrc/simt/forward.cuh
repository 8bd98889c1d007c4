// One step forward: the convolutions of h_{t-1}, gates, state update. A block takes kBlockColumns / 4 channels of one
// branch; each thread has all four gates of its channel side by side.
#pragma once

#include "convolve.cuh"

namespace mkconvlstm::simt {

// Which branch the block computes: blocks of columns are shared out in the order of the branches.
template <typename Scalar>
__device__ const Branch<Scalar>& branch_of_block(const Sequence<Scalar>& s) {
  int r = 0;
  while (r + 1 < s.branch_count && blockIdx.y >= s.branches[r + 1].first_block) ++r;
  return s.branches[r];
}

// sums: the hidden-to-hidden part of channel j's pre-activations at one pixel.
template <typename Scalar>
__device__ void update_state(const Forward<Scalar>& p, int64_t t, const Branch<Scalar>& branch, int j, uint32_t pixel,
                             const Scalar (&sums)[kColumns]) {
  const uint32_t image_pixels = p.height * p.width;
  const uint32_t image = pixel / image_pixels, in_image = pixel % image_pixels;
  const int channel = branch.first_channel + j;
  const int64_t element = int64_t{pixel} * p.hidden + channel;

  Scalar* gates = branch.gates + (t * p.pixels + pixel) * 4 * branch.channels + j;
  Scalar z[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    z[gate] = gates[gate * branch.channels] + sums[gate];
    if (p.bias != nullptr) z[gate] += p.bias[gate * p.hidden + channel];
  }
  const Scalar* c_prev = t > 0 ? p.c + (t - 1) * p.c_step : p.c_0;
  const CellOutput<Scalar> cell =
      cell_forward(Gates<Scalar>{z[0], z[1], z[2], z[3]}, c_prev == nullptr ? Scalar(0) : c_prev[element],
                   peephole_weights(p, channel, in_image), p.peepholes);

  if (p.keep_gates) {
    gates[0] = cell.gates.i;
    gates[branch.channels] = cell.gates.f;
    gates[2 * branch.channels] = cell.gates.g;
    gates[3 * branch.channels] = cell.gates.o;
  }
  p.c[t * p.c_step + element] = cell.c;
  p.state[t % 2 * p.pixels * p.hidden + element] = cell.h;
  p.h[((image * p.steps + t) * p.hidden + channel) * image_pixels + in_image] = cell.h;
}

template <typename Scalar, int kPixels>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward<Scalar> p, const int64_t t) {
  __shared__ Slices<Scalar, kPixels> slices;
  const Branch<Scalar>& branch = branch_of_block(p);
  const unsigned column_block = blockIdx.y - branch.first_block;
  Sums<Scalar, kPixels> sums = {};

  const Scalar* h_prev = t > 0 ? p.state + (t - 1) % 2 * p.pixels * p.hidden : p.h_0;
  if (h_prev != nullptr) {
    const int columns = (branch.channels + kLanes - 1) / kLanes * kBlockColumns;
    const Convolution<Scalar> convolution{h_prev,
                                          branch.weights,
                                          p.hidden,
                                          columns,
                                          branch.kernel_height,
                                          branch.kernel_width,
                                          branch.dilation_height,
                                          branch.dilation_width};
    locate_pixels(p, slices);
    convolve(p, convolution, column_block, slices, sums);
  }

  const int j = column_block * kLanes + lane();
  if (j >= branch.channels) return;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const uint32_t pixel = first_pixel_of_thread<kPixels>() + i;
    if (pixel < p.pixels) update_state(p, t, branch, j, pixel, sums[i]);
  }
}

}  // namespace mkconvlstm::simt
