// The recurrence with weights that stay in shared memory, as CUDA operations with the schema of sequence_ops.cpp.
#include "resident_plan.h"
#include "sequence_operands.h"
#include "sm90/resident.h"

namespace mkconvlstm {

namespace {

// What both passes know of a sequence.
template <typename Pass>
Pass new_pass(const ResidentPlan& plan, const Sizes& sizes, const Branches& branches) {
  Pass pass{};
  pass.problem = plan.problem;
  pass.steps = static_cast<int>(sizes.steps);
  for (size_t r = 0; r < branches.problem.branches.size(); ++r)
    pass.branches[r] = {branches.z[r], branches.weights[r]};
  return pass;
}

// Scratch of that many 16-bit elements, all absent.
Tensor new_exchange(const Tensor& like, int64_t elements, cudaStream_t stream, const char* op) {
  Tensor exchange = scratch(like, 2 * elements);
  check_cuda(cudaMemsetAsync(exchange.data_ptr(), sm90::kAbsentByte, 2 * elements, stream), op);
  return exchange;
}

void sm90_resident_forward(Tensor z_0, OptionalTensor z_1, Tensor weight_0, OptionalTensor weight_1,
                           OptionalTensor bias, Tensor h, Tensor c, OptionalTensor h_0,
                           OptionalTensor c_0, bool keep) {
  const char* op = "sm90_resident_forward";
  const Checker checker(op, z_0);
  STD_TORCH_CHECK(h.dim() == 5, op, ": h must be [batch, steps, hidden, height, width]");
  const Sizes sizes{h.size(0), h.size(1), h.size(2), h.size(3), h.size(4)};
  const Branches branches(op, checker, sizes, {z_0, z_1}, {weight_0, weight_1});

  const torch::stable::accelerator::DeviceGuard guard(checker.device());
  const ResidentPlan plan = plan_resident_forward(branches.problem, device_limits(checker.device(), op));
  auto forward = new_pass<sm90::ResidentForward>(plan, sizes, branches);
  const int64_t state_elements = int64_t{plan.problem.pixels()} * plan.problem.hidden;
  const cudaStream_t stream = current_stream(checker);
  const Tensor exchange = new_exchange(h, sizes.steps * state_elements, stream, op);
  forward.exchange = exchange.data_ptr();
  forward.bias = checker.read<const float>(bias, "bias", 4 * sizes.hidden, ScalarType::Float);
  forward.h_0 = checker.read<const void>(h_0, "h_0", state_elements, checker.type());
  forward.c_0 = checker.read<const float>(c_0, "c_0", state_elements, ScalarType::Float);
  forward.h = checker.read<void>(h, "h", h.numel(), checker.type());
  forward.c = checker.read<float>(c, "c", (keep ? sizes.steps : 1) * state_elements, ScalarType::Float);
  forward.keep = keep;
  sm90::launch(forward, checker.dtype(), plan.blocks, plan.shared_memory, stream);
  check_cuda(cudaGetLastError(), op);
}

void sm90_resident_backward(Tensor gates_0, OptionalTensor gates_1, Tensor weight_0, OptionalTensor weight_1, Tensor c,
                            OptionalTensor c_0, OptionalTensor dh, OptionalTensor dc_n, OptionalTensor lengths,
                            OptionalTensor dh_0, Tensor dc, OptionalTensor dbias) {
  const char* op = "sm90_resident_backward";
  const Checker checker(op, gates_0);
  const Sizes sizes = sizes_of_cells(op, c);
  const Branches branches(op, checker, sizes, {gates_0, gates_1}, {weight_0, weight_1});

  const torch::stable::accelerator::DeviceGuard guard(checker.device());
  const ResidentPlan plan = plan_resident_backward(branches.problem, device_limits(checker.device(), op));
  auto backward = new_pass<sm90::ResidentBackward>(plan, sizes, branches);
  read_gradients(op, checker, sizes, c, c_0, dh, dc_n, lengths, dh_0, dc, backward);
  const int64_t bias_elements = 4 * int64_t{plan.problem.pixels()} * plan.problem.hidden;
  backward.dbias = checker.read<float>(dbias, "dbias", bias_elements, ScalarType::Float);
  const cudaStream_t stream = current_stream(checker);
  const Tensor exchange = new_exchange(c, 4 * sizes.numel(), stream, op);
  backward.exchange = exchange.data_ptr();
  sm90::launch(backward, checker.dtype(), plan.blocks, plan.shared_memory, stream);
  check_cuda(cudaGetLastError(), op);
}

}  // namespace

}  // namespace mkconvlstm

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("sm90_resident_forward", TORCH_BOX(&mkconvlstm::sm90_resident_forward));
  m.impl("sm90_resident_backward", TORCH_BOX(&mkconvlstm::sm90_resident_backward));
}
