// Plans the recurrence on Hopper with weights that stay in shared memory. Arithmetic only, no CUDA needed.
#pragma once

#include <cstdint>

#include "sequence_plan.h"
#include "sm90/resident_shape.h"

namespace mkconvlstm {

struct ResidentPlan {
  sm90::ResidentProblem problem{};
  int blocks = 0;
  int shared_memory = 0;
  int64_t cycles = 0;  // of a step, roughly

  int windows() const { return problem.batch * problem.windows_x() * problem.windows_y(); }
};

// Both throw std::invalid_argument with the reason where the kernels cannot serve the problem.
ResidentPlan plan_resident_forward(const SequenceProblem& problem, const HopperLimits& limits);
ResidentPlan plan_resident_backward(const SequenceProblem& problem, const HopperLimits& limits);

}  // namespace mkconvlstm
