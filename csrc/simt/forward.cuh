// One step forward: the convolutions of h_{t-1}, gates, state update. A block takes kBlockColumns / 4 channels of one
// branch; each thread has all four gates of its channel side by side.
#pragma once

#include "../step/update.cuh"
#include "convolve.cuh"

namespace mkconvlstm::simt {

template <typename Scalar, int kPixels>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward<Scalar> p, const int64_t t) {
  __shared__ Slices<Scalar, kPixels> slices;
  const Branch<Scalar>& branch = step::branch_of_block(p);
  const unsigned column_block = blockIdx.y - branch.first_block;
  Sums<Scalar, kPixels> sums = {};

  if (step::convolves(p, t)) {
    const int columns = (branch.channels + kLanes - 1) / kLanes * kBlockColumns;
    const Convolution<Scalar> convolution{step::previous_h(p, t),
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
  const auto bias = step::gate_bias(p, branch.first_channel + j);
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const uint32_t pixel = first_pixel_of_thread<kPixels>() + i;
    if (pixel >= p.pixels) return;
    const auto input = step::read_cell(p, t, branch, j, pixel);
    *step::output_h(p, t, branch.first_channel + j, pixel) =
        step::update_state(p, t, branch, j, pixel, input, bias, sums[i]);
  }
}

}  // namespace mkconvlstm::simt
