// The operations on NVIDIA GPUs: one launch a part, on torch's current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "gate_step_cuda.h"
#include "operands.h"
#include "plan.h"

namespace mkconvlstm {

namespace {

constexpr auto kDevice = torch::headeronly::DeviceType::CUDA;

void check_cuda(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "gate step: ", cudaGetErrorString(error)); }

// What a step reads and writes, each with its channels in this part.
using OperandChannels = std::vector<std::pair<Operand, int64_t>>;

OperandChannels operands(const GateStepForward& step) {
  const int64_t channels = step.channels;
  return {{step.z, 4 * channels},
          {step.u, 4 * channels},
          {step.c_prev, channels},
          {step.h, channels},
          {step.c, channels}};
}

OperandChannels operands(const GateStepBackward& step) {
  const int64_t channels = step.channels;
  return {{step.z, 4 * channels}, {step.dh_out, channels}, {step.dh_rec, channels},
          {step.dc, channels},    {step.c_prev, channels}, {step.c, channels}};
}

bool is_channels_first(const Operand& operand, int64_t channels, int64_t pixels) {
  return (pixels <= 1 || operand.pixel == 1) && (channels <= 1 || operand.channel == pixels);
}

// A pixel's channels follow one another; pixels lie apart where other parts have channels in between.
bool is_channels_last(const Operand& operand, int64_t channels) { return channels <= 1 || operand.channel == 1; }

// Every image, and where channels are walked every pixel, has to begin at a multiple of a vector, or at least of the
// 16 bytes that one access moves.
int limit_vector_width(int limit, const Operand& operand, Layout layout, int64_t element_size) {
  const int64_t begins = static_cast<int64_t>(reinterpret_cast<uintptr_t>(operand.data)) |
                         operand.batch * element_size |
                         (layout == Layout::kChannelsLast ? operand.pixel * element_size : 0);
  int width = 1;
  while (width * element_size < 16 && begins % (2 * width * element_size) == 0) width *= 2;
  return width * element_size < 16 ? std::min(limit, width) : limit;
}

template <typename Step>
GateStepProblem problem_of(const GateSteps<Step>& steps, const Step& part) {
  GateStepProblem problem;
  problem.batch = part.batch;
  problem.channels = part.channels;
  problem.height = steps.height;
  problem.width = steps.width;
  problem.dtype = steps.dtype;
  problem.peephole = steps.peephole;
  bool channels_first = true, channels_last = true;
  for (const auto& [operand, channels] : operands(part)) {
    if (operand.data == nullptr) continue;
    channels_first = channels_first && is_channels_first(operand, channels, part.pixels);
    channels_last = channels_last && is_channels_last(operand, channels);
  }
  problem.layout = channels_first  ? Layout::kChannelsFirst
                   : channels_last ? Layout::kChannelsLast
                                   : Layout::kStrided;
  for (const auto& [operand, channels] : operands(part)) {
    const int bytes = operand.wide ? accumulate_bytes(steps.dtype) : scalar_bytes(steps.dtype);
    if (operand.data != nullptr)
      problem.max_vector_width = limit_vector_width(problem.max_vector_width, operand, problem.layout, bytes);
  }
  return problem;
}

template <typename Step>
void run(GateSteps<Step> steps, int32_t device) {
  DeviceLimits limits;
  check_cuda(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(
      cudaDeviceGetAttribute(&limits.max_threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (Step& part : steps.parts) {
    const GateStepProblem problem = problem_of(steps, part);
    const GateStepPlan step_plan = plan(problem, limits);
    if (step_plan.blocks_x == 0) continue;
    part.channels_last = problem.layout == Layout::kStrided
                             ? is_channels_last(part.z, 4 * problem.channels)
                             : problem.layout == Layout::kChannelsLast;
    launch(part, step_plan, steps.dtype, static_cast<cudaStream_t>(stream));
    check_cuda(cudaGetLastError());
  }
}

void gate_step_forward(TensorList z, TensorList u, Tensor c_prev, Tensor h, Tensor c, OptionalTensor peephole,
                       bool current_output_peephole) {
  auto steps = read_forward(kDevice, z, u, c_prev, h, c, peephole, current_output_peephole);
  run(std::move(steps), z[0].get_device_index());  // now that there is one
}

void gate_step_backward(TensorList gates, OptionalTensor dh, OptionalTensor dh_prev, Tensor dc, Tensor c_prev,
                        Tensor c, OptionalTensor peephole, bool current_output_peephole) {
  auto steps = read_backward(kDevice, gates, dh, dh_prev, dc, c_prev, c, peephole, current_output_peephole);
  run(std::move(steps), gates[0].get_device_index());
}

}  // namespace

}  // namespace mkconvlstm

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("gate_step_forward", TORCH_BOX(&mkconvlstm::gate_step_forward));
  m.impl("gate_step_backward", TORCH_BOX(&mkconvlstm::gate_step_backward));
}
