// The tensor-core kernels' launches.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"
#include "plan.h"

namespace mkconvlstm::sm80 {

// All steps, one launch a step. Asynchronous. The first error, if any, of what a launch needs beforehand; errors of a
// launch itself are left to cudaGetLastError. For float, __half and __nv_bfloat16.
template <typename T>
cudaError_t launch(const Forward<T>& forward, const Tiling& tiling, const Pass& pass, cudaStream_t stream);
template <typename T>
cudaError_t launch(const Backward<T>& backward, const Tiling& tiling, const Pass& pass, cudaStream_t stream);

}  // namespace mkconvlstm::sm80
