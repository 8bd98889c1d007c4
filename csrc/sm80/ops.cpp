// The recurrence on tensor cores of any NVIDIA GPU that has them, from sm_80 on: from an operation's tensors to the
// kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../step/operands.h"
#include "launch.h"

namespace mkconvlstm::sm80 {

namespace {

using namespace step;

constexpr const char* kTypes = "float32, float16 or bfloat16";

// Freed when the caller returns; torch keeps the memory until the stream has passed what was launched before.
Tensor scratch(const Tensor& like, int64_t bytes) {
  const int64_t sizes[1] = {bytes};
  return torch::stable::new_empty(like, {sizes, 1}, ScalarType::Byte);
}

Plan plan_on_device(const Arguments& args, const Problem& problem, int element_bytes) {
  Limits limits{multiprocessors(args), 0};
  check_cuda(cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    args.gates[0].get_device_index()),
             args.op);
  return plan(problem, element_bytes, limits);
}

template <typename T>
Shape weights_shape(int64_t blocks, int64_t taps, int64_t depth) {
  return {blocks, ceil_div(depth, kSlice<T>) * taps, kBlockColumns, kSlice<T>};
}

template <typename Params>
void launch_pass(const Arguments& args, const Params& params, const Pass& pass) {
  if (params.pixels == 0) return;
  // Copies are of 16 bytes, or of 8 where an image's pixels are not aligned to more.
  for (const Tensor& gates : args.gates)
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(gates.data_ptr()) % 8 == 0, args.op,
                    ": parts must begin at multiples of 8 bytes");
  launch_on_stream(args, [&](cudaStream_t stream) {
    Tiling tiling{pass.band_slots, pass.band_rows, pass.share, pass.blocks_x * pass.block_pixels, nullptr};
    std::optional<Tensor> partial_sums;
    if (pass.splits > 1) {
      const int64_t sums = pass.splits * tiling.partial_rows * pass.blocks_y * kBlockColumns;
      partial_sums = scratch(args.gates[0], sums * sizeof(float));
      tiling.partial_sums = static_cast<float*>(partial_sums->data_ptr());
    }
    check_cuda(launch(params, tiling, pass, stream), args.op);
  });
}

void sm80_forward(std::vector<Tensor> z, std::vector<Tensor> weights, std::vector<int64_t> kernels, OptionalTensor h_0,
                  OptionalTensor c_0, OptionalTensor bias, OptionalTensor peephole, bool current_output_peephole,
                  bool keep, Tensor state, Tensor h, Tensor c) {
  const ForwardArguments args{
      {"sm80_forward", z, weights, kernels, c_0, peephole, current_output_peephole}, h_0, bias, keep, state, h, c};
  with_type<float, __half, __nv_bfloat16>(args, kTypes, [&](auto element) {
    using T = decltype(element);
    const Problem problem = read_problem(args);
    const Plan chosen = plan_on_device(args, problem, sizeof(T));
    constexpr int64_t kAligned = kChunkBytes / sizeof(T);
    const int64_t hidden = problem.hidden(), state_row = ceil_div(hidden, kAligned) * kAligned;
    const auto shape = [&](const BranchShape& b) {
      return weights_shape<T>(ceil_div(b.channels, kBlockChannels), b.taps(), hidden);
    };
    launch_pass(args, read_forward<T>(args, problem, chosen, shape, state_row), chosen.forward);
  });
}

void sm80_backward(std::vector<Tensor> gates, std::vector<Tensor> weights, std::vector<int64_t> kernels,
                   OptionalTensor c_0, Tensor c, OptionalTensor peephole, bool current_output_peephole,
                   OptionalTensor dh, OptionalTensor dc_n, OptionalTensor lengths, OptionalTensor dh_0, Tensor dc) {
  const BackwardArguments args{{"sm80_backward", gates, weights, kernels, c_0, peephole, current_output_peephole},
                               c, dh, dc_n, lengths, dh_0, dc};
  with_type<float, __half, __nv_bfloat16>(args, kTypes, [&](auto element) {
    using T = decltype(element);
    const Problem problem = read_problem(args);
    const Plan chosen = plan_on_device(args, problem, sizeof(T));
    const auto shape = [&](const BranchShape& b) {
      return weights_shape<T>(ceil_div(problem.hidden(), kBlockColumns), b.taps(), 4 * b.channels);
    };
    launch_pass(args, read_backward<T>(args, problem, chosen, shape), chosen.backward);
  });
}

}  // namespace

}  // namespace mkconvlstm::sm80

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("sm80_forward", TORCH_BOX(&mkconvlstm::sm80::sm80_forward));
  m.impl("sm80_backward", TORCH_BOX(&mkconvlstm::sm80::sm80_backward));
}
