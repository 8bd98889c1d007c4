// From a plan to the kernels that it names.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace mkconvlstm::sm80 {

template <typename Params, typename Kernel>
cudaError_t launch_steps(Kernel kernel, Kernel finish, const Params& params, const Tiling& tiling, const Pass& pass,
                         cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, pass.shared_memory);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(pass.blocks_x), pass.blocks_y, pass.splits);
  const dim3 finish_grid((params.pixels + kFinishPixels - 1) / kFinishPixels, pass.blocks_y);
  constexpr int kFinishMemory = kBandsBegin + kFinishPixels * kSumsRow * sizeof(float);
  step::for_each_step(params, [&](int64_t t) {
    kernel<<<grid, kThreads, pass.shared_memory, stream>>>(params, tiling, t);
    if (pass.splits > 1 && step::convolves(params, t))
      finish<<<finish_grid, kThreads, kFinishMemory, stream>>>(params, tiling, t);
  });
  return cudaSuccess;
}

template <typename T>
cudaError_t launch(const Forward<T>& forward, const Tiling& tiling, const Pass& pass, cudaStream_t stream) {
  return launch_steps(pass.block_pixels == kLargeTile ? forward_kernel<T, kLargeTile> : forward_kernel<T, kSmallTile>,
                      forward_finish_kernel<T>, forward, tiling, pass, stream);
}

template <typename T>
cudaError_t launch(const Backward<T>& backward, const Tiling& tiling, const Pass& pass, cudaStream_t stream) {
  return launch_steps(
      pass.block_pixels == kLargeTile ? backward_kernel<T, kLargeTile> : backward_kernel<T, kSmallTile>,
      backward_finish_kernel<T>, backward, tiling, pass, stream);
}

}  // namespace mkconvlstm::sm80
