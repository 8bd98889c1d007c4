#include "resident_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mkconvlstm {

using namespace sm90;

namespace {

constexpr int kWidths[] = {8, 16, 32, 64};

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument("plan: " + reason); }

ResidentProblem checked(const SequenceProblem& problem) {
  check_served(problem);
  ResidentProblem resident{};
  resident.batch = static_cast<int>(problem.batch);
  resident.height = static_cast<int>(problem.height);
  resident.width = static_cast<int>(problem.width);
  resident.hidden = static_cast<int>(problem.hidden());
  for (const BranchShape& branch : problem.branches) {
    const int r = resident.branch_count++, before = r == 0 ? 0 : resident.branches[r - 1].channels;
    resident.branches[r] = {static_cast<int>(branch.kernel_height), static_cast<int>(branch.kernel_width),
                            static_cast<int>(branch.channels), before};
  }
  return resident;
}

// Of a step, roughly: products, by what they read of shared memory; windows on their way; the exchange of sums.
int64_t step_cycles(const ResidentShape& shape) {
  const int64_t products = int64_t{shape.units} * 4 * (16 + shape.columns / 4);
  return products + int64_t{shape.boxes} * shape.rows * kRowBytes / 40 + (shape.split > 1 ? 600 : 0) + 2000;
}

// Of all windows and clusters that are served the one whose slowest block is fastest. fit: fills in the plan's groups,
// and hands the shape of each kind of block to the function that it is given.
template <typename Fit>
ResidentPlan choose(const SequenceProblem& problem, const HopperLimits& limits, int most_split, Fit fit) {
  ResidentPlan best;
  bool fits = false;
  for (int split = 1; split <= most_split; ++split) {
    for (const int width : kWidths) {
      ResidentPlan plan;
      plan.problem = checked(problem);
      plan.problem.window_width = width;
      plan.problem.split = split;
      fit(plan.problem, [&](const ResidentShape& shape) {
        plan.shared_memory = std::max(plan.shared_memory, shape.bytes());
        plan.cycles = std::max(plan.cycles, step_cycles(shape));
      });
      if (plan.shared_memory > limits.shared_memory) continue;
      fits = true;
      const int64_t clusters = int64_t{plan.windows()} * plan.problem.groups;
      if (clusters > limits.multiprocessors / split) continue;
      plan.blocks = static_cast<int>(clusters) * split;
      if (best.blocks == 0 || plan.cycles < best.cycles) best = plan;
    }
  }
  if (!fits) refuse("the weights of 8 channels do not fit into shared memory");
  if (best.blocks == 0) refuse("there are too few multiprocessors to keep all weights in shared memory");
  return best;
}

}  // namespace

ResidentPlan plan_resident_forward(const SequenceProblem& problem, const HopperLimits& limits) {
  return choose(problem, limits, 1, [](ResidentProblem& resident, auto add) {
    for (int r = 0; r < resident.branch_count; ++r) {
      const ResidentBranch& branch = resident.branches[r];
      resident.groups += branch.channels / kFinishedChannels;
      add(forward_shape(resident, branch));
    }
  });
}

ResidentPlan plan_resident_backward(const SequenceProblem& problem, const HopperLimits& limits) {
  return choose(problem, limits, 2, [](ResidentProblem& resident, auto add) {
    resident.groups = ceil_quotient(resident.hidden, resident.group_channels());
    add(backward_shape(resident));
  });
}

}  // namespace mkconvlstm
