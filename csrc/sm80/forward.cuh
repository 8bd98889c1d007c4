// One step forward: the convolutions of h_{t-1}, gates, state update. A block takes kBlockChannels channels of one
// branch. Where blocks share out the products of a tile, a second kernel adds up their sums and goes on with them: all
// multiprocessors do, which takes less time than the last block of each tile would.
#pragma once

#include "convolve.cuh"
#include "math.cuh"

namespace mkconvlstm::sm80 {

// Gates and states of kPixels pixels from first_pixel on, from sums_memory.
template <int kPixels, typename T>
__device__ void update_states(const Forward<T>& p, int64_t t, const Branch<T>& branch, uint32_t first_pixel) {
  const int first_channel = (blockIdx.y - branch.first_block) * kBlockChannels;
  const auto exists = [&](int m, int j) { return first_pixel + m < p.pixels && first_channel + j < branch.channels; };

  // Threads along channels, as gates and states lie in memory.
  constexpr int kPixelsAtOnce = kThreads / kBlockChannels;
  constexpr int kCells = kPixels / kPixelsAtOnce < kBatch ? kPixels / kPixelsAtOnce : kBatch;
  const int j = threadIdx.x % kBlockChannels, channel = first_channel + j;
  const auto bias = channel < branch.channels ? step::gate_bias(p, branch.first_channel + channel) : Gates<float>{};
  for (int first = threadIdx.x / kBlockChannels; first < kPixels; first += kCells * kPixelsAtOnce) {
    step::CellInput<T> inputs[kCells];
#pragma unroll
    for (int b = 0; b < kCells; ++b) {
      const int m = first + b * kPixelsAtOnce;
      if (exists(m, j)) inputs[b] = step::read_cell(p, t, branch, channel, first_pixel + m);
    }
#pragma unroll
    for (int b = 0; b < kCells; ++b) {
      const int m = first + b * kPixelsAtOnce;
      if (!exists(m, j)) continue;
      float* sums = sums_memory() + m * kSumsRow + j;
      const float gates[4] = {sums[0], sums[kBlockChannels], sums[2 * kBlockChannels], sums[3 * kBlockChannels]};
      sums[0] = static_cast<float>(
          step::update_state<Math<T>>(p, t, branch, channel, first_pixel + m, inputs[b], bias, gates));
    }
  }
  __syncthreads();

  // Threads along pixels, as the output lies in memory.
  const int m = threadIdx.x % kPixels;
  if (first_pixel + m >= p.pixels) return;
  T* h = step::output_h(p, t, branch.first_channel + first_channel, first_pixel + m);
  for (int i = threadIdx.x / kPixels; i < kBlockChannels; i += kThreads / kPixels)
    if (exists(m, i)) h[int64_t{i} * p.height * p.width] = static_cast<T>(sums_memory()[m * kSumsRow + i]);
}

template <typename T, int kBlockPixels>
__global__ void __launch_bounds__(kThreads, 3)
    forward_kernel(const __grid_constant__ Forward<T> p, const __grid_constant__ Tiling tiling, const int64_t t) {
  const Branch<T>& branch = step::branch_of_block(p);
  const int r = static_cast<int>(&branch - p.branches);
  const bool is_complete =
      step::convolves(p, t) ? convolve<kBlockPixels, T>(p, t, tiling, r, r + 1, blockIdx.y - branch.first_block)
                            : clear_sums<kBlockPixels>();
  if (is_complete) update_states<kBlockPixels>(p, t, branch, blockIdx.x * kBlockPixels);
}

// After forward_kernel, for the tiles whose products were shared out.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_finish_kernel(const __grid_constant__ Forward<T> p, const __grid_constant__ Tiling tiling,
                          const int64_t t) {
  const Branch<T>& branch = step::branch_of_block(p);
  const int r = static_cast<int>(&branch - p.branches);
  if (add_partial_sums(tiling, count_products<T>(p, t, r, r + 1)))
    update_states<kFinishPixels>(p, t, branch, blockIdx.x * kFinishPixels);
}

}  // namespace mkconvlstm::sm80
