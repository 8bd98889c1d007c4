// The pointwise step on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "gate_step.h"
#include "plan.h"

namespace mkconvlstm {

// Asynchronous; errors of the launch are left to cudaGetLastError.
void launch(const GateStepForward& step, const GateStepPlan& plan, DType dtype, cudaStream_t stream);
void launch(const GateStepBackward& step, const GateStepPlan& plan, DType dtype, cudaStream_t stream);

}  // namespace mkconvlstm
