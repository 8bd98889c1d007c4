// From a plan to the kernel that it names.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace mkconvlstm::simt {

template <int kPixels, typename Scalar>
void launch_kernel(const Forward<Scalar>& forward, int64_t t, dim3 grid, cudaStream_t stream) {
  forward_kernel<Scalar, kPixels><<<grid, kThreads, 0, stream>>>(forward, t);
}

template <int kPixels, typename Scalar>
void launch_kernel(const Backward<Scalar>& backward, int64_t t, dim3 grid, cudaStream_t stream) {
  backward_kernel<Scalar, kPixels><<<grid, kThreads, 0, stream>>>(backward, t);
}

template <int kPixels = 8, typename Params>
void launch_step(const Params& params, int64_t t, const Pass& pass, cudaStream_t stream) {
  if (pass.pixels_per_thread == kPixels) {
    launch_kernel<kPixels>(params, t, dim3(static_cast<unsigned>(pass.blocks_x), pass.blocks_y), stream);
  } else if constexpr (kPixels > 2) {
    launch_step<kPixels / 2>(params, t, pass, stream);
  }
}

template <typename Scalar>
void launch(const Forward<Scalar>& forward, const Pass& pass, cudaStream_t stream) {
  step::for_each_step(forward, [&](int64_t t) { launch_step(forward, t, pass, stream); });
}

template <typename Scalar>
void launch(const Backward<Scalar>& backward, const Pass& pass, cudaStream_t stream) {
  step::for_each_step(backward, [&](int64_t t) { launch_step(backward, t, pass, stream); });
}

}  // namespace mkconvlstm::simt
