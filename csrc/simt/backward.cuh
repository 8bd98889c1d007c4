// One step backward: dL/dh_t, the data gradient of the convolutions from dz_{t+1}, and the gates' gradients at step t.
// Step -1 has no gates: it is dL/dh_0. A thread has hidden channels kLanes apart, so that neighbours access neighbours.
#pragma once

#include "../step/update.cuh"
#include "convolve.cuh"

namespace mkconvlstm::simt {

template <typename Scalar, int kPixels>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Backward<Scalar> p,
                                                            const int64_t t) {
  __shared__ Slices<Scalar, kPixels> slices;
  Sums<Scalar, kPixels> sums = {};

  if (step::convolves(p, t)) {
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
    const Branch<Scalar>& branch = step::branch_of_channel(p, channel);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const uint32_t pixel = first_pixel_of_thread<kPixels>() + i;
      if (pixel >= p.pixels) break;
      const auto input = step::read_gradient(p, t, branch, channel, pixel);
      const Scalar dh = sums[i][k] + (t < 0 || p.dh == nullptr ? 0 : *step::incoming_dh(p, t, channel, pixel));
      step::update_gradients(p, t, branch, channel, pixel, input, dh);
    }
  }
}

}  // namespace mkconvlstm::simt
