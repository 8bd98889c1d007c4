// The recurrence in float64 and float32 on NVIDIA GPUs: from an operation's tensors to the SIMT kernels.
#include <torch/csrc/stable/library.h>

#include "../step/operands.h"
#include "launch.h"

namespace mkconvlstm::simt {

namespace {

using namespace step;

constexpr const char* kTypes = "float64 or float32";

int64_t padded(int64_t size, int64_t block) { return ceil_div(size, block) * block; }

void simt_forward(std::vector<Tensor> z, std::vector<Tensor> weights, std::vector<int64_t> kernels, OptionalTensor h_0,
                  OptionalTensor c_0, OptionalTensor bias, OptionalTensor peephole, bool current_output_peephole,
                  bool keep, Tensor state, Tensor h, Tensor c) {
  const ForwardArguments args{
      {"simt_forward", z, weights, kernels, c_0, peephole, current_output_peephole}, h_0, bias, keep, state, h, c};
  with_type<double, float>(args, kTypes, [&](auto scalar) {
    const Problem problem = read_problem(args);
    const Plan chosen = plan(problem, multiprocessors(args));
    const auto shape = [&](const BranchShape& b) -> Shape {
      return {b.taps(), padded(problem.hidden(), kPackedDepth), kColumns * padded(b.channels, kLanes)};
    };
    const auto params = read_forward<decltype(scalar)>(args, problem, chosen, shape, problem.hidden());
    if (params.pixels == 0) return;
    launch_on_stream(args, [&](cudaStream_t stream) { launch(params, chosen.forward, stream); });
  });
}

void simt_backward(std::vector<Tensor> gates, std::vector<Tensor> weights, std::vector<int64_t> kernels,
                   OptionalTensor c_0, Tensor c, OptionalTensor peephole, bool current_output_peephole,
                   OptionalTensor dh, OptionalTensor dc_n, OptionalTensor lengths, OptionalTensor dh_0, Tensor dc) {
  const BackwardArguments args{{"simt_backward", gates, weights, kernels, c_0, peephole, current_output_peephole},
                               c, dh, dc_n, lengths, dh_0, dc};
  with_type<double, float>(args, kTypes, [&](auto scalar) {
    const Problem problem = read_problem(args);
    const Plan chosen = plan(problem, multiprocessors(args));
    const auto shape = [&](const BranchShape& b) -> Shape {
      return {b.taps(), padded(4 * b.channels, kPackedDepth), padded(problem.hidden(), kBlockColumns)};
    };
    const auto params = read_backward<decltype(scalar)>(args, problem, chosen, shape);
    if (params.pixels == 0) return;
    launch_on_stream(args, [&](cudaStream_t stream) { launch(params, chosen.backward, stream); });
  });
}

}  // namespace

}  // namespace mkconvlstm::simt

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("simt_forward", TORCH_BOX(&mkconvlstm::simt::simt_forward));
  m.impl("simt_backward", TORCH_BOX(&mkconvlstm::simt::simt_backward));
}
