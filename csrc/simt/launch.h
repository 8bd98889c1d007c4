// The SIMT kernels' launches.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"
#include "plan.h"

namespace mkconvlstm::simt {

// All steps, one launch a step. Asynchronous; errors of a launch are left to cudaGetLastError. For float and double.
template <typename Scalar>
void launch(const Forward<Scalar>& forward, const Pass& pass, cudaStream_t stream);
template <typename Scalar>
void launch(const Backward<Scalar>& backward, const Pass& pass, cudaStream_t stream);

}  // namespace mkconvlstm::simt
