// One step backward: dL/dh_t, the data gradient of the convolutions from dz_{t+1}, and the gates' gradients at step t.
// Step -1 has no gates: it is dL/dh_0. A block takes kBlockColumns hidden channels. A second kernel finishes the step
// where blocks share out products, as forward.
#pragma once

#include "convolve.cuh"
#include "math.cuh"

namespace mkconvlstm::sm80 {

// Adds to sums_memory what flows in from outside, with threads along pixels.
template <int kPixels, typename T>
__device__ void add_incoming(const Backward<T>& p, int64_t t, uint32_t first_pixel) {
  constexpr int kChannelsAtOnce = kThreads / kPixels;
  const int m = threadIdx.x % kPixels, first_channel = blockIdx.y * kBlockColumns;
  if (first_pixel + m < p.pixels) {
    const T* incoming = step::incoming_dh(p, t, first_channel, first_pixel + m);
    for (int first = threadIdx.x / kPixels; first < kBlockColumns; first += kBatch * kChannelsAtOnce) {
      T dh[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int n = first + b * kChannelsAtOnce;
        if (n < kBlockColumns && first_channel + n < p.hidden) dh[b] = incoming[n * p.dh_channel];
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int n = first + b * kChannelsAtOnce;
        if (n < kBlockColumns && first_channel + n < p.hidden)
          sums_memory()[m * kSumsRow + n] += static_cast<float>(dh[b]);
      }
    }
  }
  __syncthreads();
}

// Gradients of the gates of kPixels pixels from first_pixel on, from sums_memory. Threads are along channels, as gates
// and states lie in memory; what flows in from outside is read so only where it lies so, too.
template <int kPixels, typename T>
__device__ void update_tile(const Backward<T>& p, int64_t t, uint32_t first_pixel) {
  const bool has_dh = t >= 0 && p.dh != nullptr, along_channels = p.dh_channel < p.dh_column;
  if (has_dh && !along_channels) add_incoming<kPixels>(p, t, first_pixel);

  constexpr int kPixelsAtOnce = kThreads / kBlockColumns;
  const int n = threadIdx.x % kBlockColumns, channel = blockIdx.y * kBlockColumns + n;
  if (channel >= p.hidden) return;
  const Branch<T>& branch = step::branch_of_channel(p, channel);
  for (int first = threadIdx.x / kBlockColumns; first < kPixels; first += kBatch * kPixelsAtOnce) {
    step::GradientInput<T> inputs[kBatch];
    T dh[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const uint32_t pixel = first_pixel + first + b * kPixelsAtOnce;
      if (pixel >= p.pixels) continue;
      inputs[b] = step::read_gradient(p, t, branch, channel, pixel);
      if (has_dh && along_channels) dh[b] = *step::incoming_dh(p, t, channel, pixel);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int m = first + b * kPixelsAtOnce;
      if (first_pixel + m >= p.pixels) continue;
      float sum = sums_memory()[m * kSumsRow + n];
      if (has_dh && along_channels) sum += static_cast<float>(dh[b]);
      step::update_gradients<Math<T>>(p, t, branch, channel, first_pixel + m, inputs[b], sum);
    }
  }
}

template <typename T, int kBlockPixels>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const __grid_constant__ Backward<T> p, const __grid_constant__ Tiling tiling, const int64_t t) {
  const bool is_complete = step::convolves(p, t)
                               ? convolve<kBlockPixels, T>(p, t, tiling, 0, p.branch_count, blockIdx.y)
                               : clear_sums<kBlockPixels>();
  if (is_complete) update_tile<kBlockPixels>(p, t, blockIdx.x * kBlockPixels);
}

// After backward_kernel, for the tiles whose products were shared out.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_finish_kernel(const __grid_constant__ Backward<T> p, const __grid_constant__ Tiling tiling,
                           const int64_t t) {
  if (add_partial_sums(tiling, count_products<T>(p, t, 0, p.branch_count)))
    update_tile<kFinishPixels>(p, t, blockIdx.x * kFinishPixels);
}

}  // namespace mkconvlstm::sm80
