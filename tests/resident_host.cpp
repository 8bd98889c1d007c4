// The kernels with resident weights on a CPU, in bfloat16, for test_resident.py, which puts host_sm90 in the place of
// Hopper's instructions.
#include "host_bfloat16.h"
#include "host_grid.h"
#include "resident_plan.h"
#include "sm90/resident_backward.cuh"
#include "sm90/resident_forward.cuh"

namespace {

using namespace mkconvlstm;

// Integers of a call, as test_resident.py lists them.
struct Call {
  int64_t multiprocessors, batch, steps, height, width, keep, c_is_half, dh_strides[4], branches;
  int64_t kernels[sm90::kMostBranches][3];  // height, width, channels
};

SequenceProblem problem_of(const Call& call) {
  SequenceProblem problem{call.batch, call.height, call.width, {}};
  for (int r = 0; r < call.branches; ++r)
    problem.branches.push_back({call.kernels[r][0], call.kernels[r][1], call.kernels[r][2]});
  return problem;
}

HopperLimits limits_of(const Call& call) { return {static_cast<int>(call.multiprocessors), kSharedBytes}; }

// tensors: gates and weights of both branches, one after the other. Launches with an exchange buffer of that many
// elements of a cell.
template <typename Pass>
void launch(Pass pass, const ResidentPlan& plan, const Call& call, void** tensors, int64_t elements) {
  pass.problem = plan.problem;
  pass.steps = static_cast<int>(call.steps);
  for (int r = 0; r < call.branches; ++r) {
    pass.branches[r].gates = tensors[r];
    pass.branches[r].weights = tensors[2 + r];
  }
  std::vector<uint4> exchange(call.steps * plan.problem.pixels() * plan.problem.hidden * elements * 2 / sizeof(uint4));
  std::memset(exchange.data(), sm90::kAbsentByte, exchange.size() * sizeof(uint4));
  pass.exchange = exchange.data();
  sm90::launch_resident<Brain>(pass, plan.blocks, plan.shared_memory, nullptr);
}

}  // namespace

extern "C" {

// Whether both halves of a pair are as they should be: what is written is never absent, and nothing else becomes so.
bool resident_is_told(uint32_t pair) {
  const auto absent = [](uint32_t half) { return (half & 0xffff) == 0xffff; };
  const uint32_t written = sm90::present(pair);
  return sm90::has_absent(uint4{0, 0, pair, 0}) == (absent(pair) || absent(pair >> 16)) &&
         !sm90::has_absent(uint4{written, 0, 0, 0}) && (absent(pair) || (written & 0xffff) == (pair & 0xffff)) &&
         (absent(pair >> 16) || written >> 16 == pair >> 16);
}

// tensors, after those above: bias, h, c, h_0, c_0.
void resident_forward(const Call& call, void** tensors) {
  sm90::ResidentForward forward{};
  forward.bias = static_cast<const float*>(tensors[4]);
  forward.h = tensors[5];
  forward.c = static_cast<float*>(tensors[6]);
  forward.h_0 = tensors[7];
  forward.c_0 = static_cast<const float*>(tensors[8]);
  forward.keep = call.keep != 0;
  launch(forward, plan_resident_forward(problem_of(call), limits_of(call)), call, tensors, 1);
}

// tensors, after those above: c, c_0, dh, dc_n, lengths, dh_0, dc, dbias.
void resident_backward(const Call& call, void** tensors) {
  sm90::ResidentBackward backward{};
  backward.c = tensors[4];
  backward.c_is_half = call.c_is_half != 0;
  backward.c_0 = static_cast<const float*>(tensors[5]);
  backward.dh = tensors[6];
  backward.dh_image = call.dh_strides[0];
  backward.dh_step = call.dh_strides[1];
  backward.dh_channel = call.dh_strides[2];
  backward.dh_pixel = call.dh_strides[3];
  backward.dc_n = static_cast<const float*>(tensors[7]);
  backward.lengths = static_cast<const int64_t*>(tensors[8]);
  backward.dh_0 = tensors[9];
  backward.dc = static_cast<float*>(tensors[10]);
  backward.dbias = static_cast<float*>(tensors[11]);
  launch(backward, plan_resident_backward(problem_of(call), limits_of(call)), call, tensors, 4);
}

}  // extern "C"
