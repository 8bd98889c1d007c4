// One step backward: dL/dh_t, the data gradient of the convolutions from dz_{t+1}, and the gates' gradients at step t.
// Step -1 has no gates: it is dL/dh_0. A thread has hidden channels kLanes apart, so that neighbours access neighbours.
#pragma once

#include "convolve.cuh"

namespace mkconvlstm::simt {

// What flows into dL/dc_t from step t+1 and from outside.
template <typename Scalar>
__device__ Scalar incoming_dc(const Backward<Scalar>& p, int64_t t, uint32_t image, int64_t element) {
  Scalar dc = t == p.steps - 1 ? Scalar(0) : p.dc[element];
  const int64_t length = p.lengths == nullptr ? p.steps : p.lengths[image];
  if (p.dc_n != nullptr && t == length - 1) dc += p.dc_n[element];
  return dc;
}

// dh: what came from step t+1. Gates of one hidden channel at one pixel become their gradients.
template <typename Scalar>
__device__ void update_gradients(const Backward<Scalar>& p, int64_t t, const Branch<Scalar>& branch, int channel,
                                 uint32_t pixel, Scalar dh) {
  const uint32_t image_pixels = p.height * p.width;
  const uint32_t image = pixel / image_pixels, in_image = pixel % image_pixels;
  const int64_t element = int64_t{pixel} * p.hidden + channel;
  if (t < 0) {
    p.dh_0[element] = dh;
    return;
  }
  if (p.dh != nullptr) {
    dh += p.dh[image * p.dh_image + t * p.dh_step + channel * p.dh_channel + in_image / p.width * p.dh_row +
               in_image % p.width * p.dh_column];
  }

  const int64_t gate = branch.channels;
  Scalar* gates = branch.gates + (t * p.pixels + pixel) * 4 * gate + (channel - branch.first_channel);
  const Scalar* c_prev = t > 0 ? p.c + (t - 1) * p.c_step : p.c_0;
  const CellGradient<Scalar> gradient =
      cell_backward(Gates<Scalar>{gates[0], gates[gate], gates[2 * gate], gates[3 * gate]},
                    c_prev == nullptr ? Scalar(0) : c_prev[element], p.c[t * p.c_step + element], dh,
                    incoming_dc(p, t, image, element), peephole_weights(p, channel, in_image), p.peepholes);
  gates[0] = gradient.dz.i;
  gates[gate] = gradient.dz.f;
  gates[2 * gate] = gradient.dz.g;
  gates[3 * gate] = gradient.dz.o;
  p.dc[element] = gradient.dc_prev;
}

template <typename Scalar>
__device__ const Branch<Scalar>& branch_of_channel(const Sequence<Scalar>& s, int channel) {
  int r = 0;
  while (channel < s.branches[r].first_channel || channel >= s.branches[r].first_channel + s.branches[r].channels) ++r;
  return s.branches[r];
}

template <typename Scalar, int kPixels>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Backward<Scalar> p,
                                                            const int64_t t) {
  __shared__ Slices<Scalar, kPixels> slices;
  Sums<Scalar, kPixels> sums = {};

  if (t + 1 < p.steps) {
    const int columns = (p.hidden + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
    locate_pixels(p, slices);
    for (int r = 0; r < p.branch_count; ++r) {
      const Branch<Scalar>& branch = p.branches[r];
      const Convolution<Scalar> convolution{branch.gates + (t + 1) * p.pixels * 4 * branch.channels,
                                            branch.weights,
                                            4 * branch.channels,
                                            columns,
                                            branch.kernel_height,
                                            branch.kernel_width,
                                            branch.dilation_height,
                                            branch.dilation_width};
      convolve(p, convolution, blockIdx.y, slices, sums);
    }
  }

#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const int channel = blockIdx.y * kBlockColumns + k * kLanes + lane();
    if (channel >= p.hidden) return;
    const Branch<Scalar>& branch = branch_of_channel(p, channel);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const uint32_t pixel = first_pixel_of_thread<kPixels>() + i;
      if (pixel < p.pixels) update_gradients(p, t, branch, channel, pixel, sums[i][k]);
    }
  }
}

}  // namespace mkconvlstm::simt
