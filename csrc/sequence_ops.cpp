// The whole recurrence as one CUDA operation: schema, argument checks, the way to a launcher. Only torch's stable ABI.
#include <cuda.h>

#include <array>
#include <string>

#include "sequence_operands.h"
#include "sm90/backward.h"
#include "sm90/forward.h"

namespace mkconvlstm {

namespace {

// data: float16, bfloat16 or float32; the last dimension is contiguous, strides: of the others, in elements. Those that
// are not in the order of their size are beyond what the driver's manual says of them, and work.
template <size_t kDimensions>
CUtensorMap tensor_map(const char* op, void* data, DType dtype, std::array<int64_t, kDimensions> sizes,
                       std::array<int64_t, kDimensions - 1> strides, std::array<int, kDimensions> box,
                       CUtensorMapSwizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  STD_TORCH_CHECK(encode != nullptr, op, ": the driver has no tensor maps");
  CUtensorMap map;
  cuuint64_t extents[kDimensions], bytes[kDimensions];
  cuuint32_t boxes[kDimensions], steps[kDimensions];
  for (size_t i = 0; i < kDimensions; ++i) {  // the driver counts from the innermost
    const size_t from = kDimensions - 1 - i;
    extents[i] = static_cast<cuuint64_t>(sizes[from]);
    boxes[i] = static_cast<cuuint32_t>(box[from]);
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[from]) * (dtype == DType::kFloat32 ? 4 : 2);
  }
  const CUtensorMapDataType type = dtype == DType::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, type, kDimensions, data, extents, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": cuTensorMapEncodeTiled failed with error ", static_cast<int>(result));
  return map;
}

// What boxes are loaded from: data [steps * images, height, width, channels].
CUtensorMap box_map(const char* op, void* data, DType dtype, int64_t steps, int64_t channels,
                    const sm90::Program& program) {
  const sm90::Tiling& t = program.tiling;
  return tensor_map<4>(op, data, dtype, {steps * t.images, t.height, t.width, channels},
                       {int64_t{t.height} * t.width * channels, t.width * channels, channels},
                       {1, t.box_height(), program.chunk_width, sm90::kBoxChannels}, CU_TENSOR_MAP_SWIZZLE_128B);
}

// One group's part of z [steps * images, height, width, 4 * branch_channels].
CUtensorMap gates_map(const char* op, void* z, DType dtype, int64_t steps, int64_t branch_channels,
                      const ColumnGroup& group, const sm90::Tiling& t) {
  const int64_t pixel = 4 * branch_channels, line = t.width * pixel;
  return tensor_map<5>(op, static_cast<char*>(z) + 2 * group.first_in_branch, dtype,
                       {steps * t.images, 4, t.height, t.width, group.channels},
                       {t.height * line, branch_channels, line, pixel},
                       {1, 4, t.patch_height(), t.patch_width(), sm90::kChunkChannels}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// Chunks of cells [steps * images, height, width, hidden].
CUtensorMap cells_map(const char* op, const void* cells, DType dtype, int64_t steps, int64_t hidden,
                      const sm90::Tiling& t) {
  return tensor_map<4>(op, const_cast<void*>(cells), dtype, {steps * t.images, t.height, t.width, hidden},
                       {int64_t{t.height} * t.width * hidden, t.width * hidden, hidden},
                       {1, t.patch_height(), t.patch_width(), sm90::kChunkChannels}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// What both passes know of a sequence.
template <typename Pass, typename Plan>
Pass new_pass(const Plan& plan, const Sizes& sizes) {
  Pass pass{};
  pass.program = plan.program;
  pass.steps = static_cast<int>(sizes.steps);
  pass.hidden = static_cast<int>(sizes.hidden);
  pass.images = sm90::Images::of(static_cast<int>(sizes.height), static_cast<int>(sizes.width));
  pass.tiles_m = plan.tiles_m;
  pass.tiles_n = plan.tiles_n;
  pass.period = plan.dealing.period;
  return pass;
}

void sm90_forward(Tensor z_0, OptionalTensor z_1, Tensor weight_0, OptionalTensor weight_1, OptionalTensor bias,
                  Tensor h, Tensor c, OptionalTensor h_0, OptionalTensor c_0, bool keep) {
  const char* op = "sm90_forward";
  const Checker checker(op, z_0);
  STD_TORCH_CHECK(h.dim() == 5, op, ": h must be [batch, steps, hidden, height, width]");
  const ScalarType half = checker.type(), single = ScalarType::Float;
  const Sizes sizes{h.size(0), h.size(1), h.size(2), h.size(3), h.size(4)};
  const Branches branches(op, checker, sizes, {z_0, z_1}, {weight_0, weight_1});

  const torch::stable::accelerator::DeviceGuard guard(checker.device());
  const ForwardPlan plan = plan_forward(branches.problem, device_limits(checker.device(), op));
  auto forward = new_pass<sm90::Forward>(plan, sizes);
  forward.pixels = static_cast<int>(sizes.batch) * forward.images.pixels.value;
  forward.shares_cells = plan.dealing.rotates();
  sm90::ForwardMaps maps{};
  for (int g = 0; g < sm90::kGroups; ++g) {
    const ColumnGroup& group = plan.groups[g];
    forward.groups[g] = {group.first_hidden, group.channels};
    if (group.channels > 0)
      maps.gates[g] = gates_map(op, branches.z[group.branch], checker.dtype(), forward.steps,
                                branches.problem.branches[group.branch].channels, group, plan.program.tiling);
  }
  const int64_t state_elements = int64_t{forward.pixels} * forward.hidden;
  Tensor packed = scratch(h, plan.packed_bytes());
  Tensor counters = scratch(h, 2 * plan.tiles_m * sizeof(uint32_t));
  Tensor state = scratch(h, 2 * state_elements * 2);
  forward.packed = static_cast<char*>(packed.data_ptr());
  forward.counters = static_cast<uint32_t*>(counters.data_ptr());
  forward.state = state.data_ptr();
  forward.h = checker.read<void>(h, "h", h.numel(), half);
  forward.c = checker.read<float>(c, "c", (keep ? forward.steps : 1) * state_elements, single);
  forward.h_step = sizes.hidden * forward.images.pixels.value;
  forward.c_step = keep ? state_elements : 0;
  forward.bias = checker.read<const float>(bias, "bias", 4 * sizes.hidden, single);
  forward.c_0 = checker.read<const float>(c_0, "c_0", state_elements, single);
  forward.has_h_0 = h_0.has_value();
  forward.keep = keep;
  const sm90::Tiling& tiling = plan.program.tiling;
  forward.quads = (tiling.height > 1 ? tiling.width : sizes.height * sizes.width) % 4 == 0;

  const cudaStream_t stream = current_stream(checker);
  sm90::pack(plan, branches.problem, branches.weights, static_cast<char*>(packed.data_ptr()), stream);
  check_cuda(cudaMemsetAsync(forward.counters, 0, counters.numel(), stream), op);
  if (h_0) {
    const auto* initial = checker.read<const void>(h_0, "h_0", state_elements, half);
    check_cuda(cudaMemcpyAsync(forward.state, initial, state_elements * 2, cudaMemcpyDeviceToDevice, stream), op);
  }
  maps.state = box_map(op, forward.state, checker.dtype(), 2, forward.hidden, plan.program);
  sm90::launch(forward, maps, checker.dtype(), plan.dealing.blocks(), plan.shared_memory, stream);
  check_cuda(cudaGetLastError(), op);
}

void sm90_backward(Tensor gates_0, OptionalTensor gates_1, Tensor weight_0, OptionalTensor weight_1, Tensor c,
                   OptionalTensor c_0, OptionalTensor dh, OptionalTensor dc_n, OptionalTensor lengths,
                   OptionalTensor dh_0, Tensor dc) {
  const char* op = "sm90_backward";
  const Checker checker(op, gates_0);
  const Sizes sizes = sizes_of_cells(op, c);
  const Branches branches(op, checker, sizes, {gates_0, gates_1}, {weight_0, weight_1});

  const torch::stable::accelerator::DeviceGuard guard(checker.device());
  const BackwardPlan plan = plan_backward(branches.problem, device_limits(checker.device(), op));
  auto backward = new_pass<sm90::Backward>(plan, sizes);
  backward.items = plan.items();
  backward.parts[1].first_hidden = backward.hidden;
  for (size_t r = 0; r < branches.problem.branches.size(); ++r) {
    const int before = r == 0 ? 0 : backward.parts[0].channels;
    backward.parts[r] = {branches.z[r], static_cast<int>(branches.problem.branches[r].channels), before};
  }
  read_gradients(op, checker, sizes, c, c_0, dh, dc_n, lengths, dh_0, dc, backward);
  const int64_t tiles = int64_t{plan.tiles_m} * plan.tiles_n;
  Tensor packed = scratch(c, plan.packed_bytes());
  Tensor partial = scratch(c, plan.partial_bytes());
  Tensor counters = scratch(c, (tiles + plan.tiles_m) * sm90::kCounterStride * sizeof(uint32_t));
  backward.packed = static_cast<char*>(packed.data_ptr());
  backward.partial = static_cast<float4*>(partial.data_ptr());
  backward.summed = static_cast<uint32_t*>(counters.data_ptr());
  backward.finished = backward.summed + tiles * sm90::kCounterStride;

  const cudaStream_t stream = current_stream(checker);
  sm90::pack(plan, branches.problem, branches.weights, static_cast<char*>(packed.data_ptr()), stream);
  check_cuda(cudaMemsetAsync(backward.summed, 0, counters.numel(), stream), op);
  const sm90::Tiling& tiling = plan.program.tiling;
  sm90::BackwardMaps maps{};
  for (size_t r = 0; r < branches.problem.branches.size(); ++r) {
    const sm90::GatePart& part = backward.parts[r];
    const ColumnGroup all{static_cast<int>(r), 0, part.first_hidden, part.channels};
    maps.boxes[r] = box_map(op, part.gates, checker.dtype(), backward.steps, 4 * part.channels, plan.program);
    maps.gates[r] = gates_map(op, part.gates, checker.dtype(), backward.steps, part.channels, all, tiling);
  }
  const DType type = backward.c_is_half ? checker.dtype() : DType::kFloat32;
  maps.cells = cells_map(op, backward.c, type, backward.steps, backward.hidden, tiling);
  if (backward.c_0 != nullptr) maps.c_0 = cells_map(op, backward.c_0, DType::kFloat32, 1, backward.hidden, tiling);
  sm90::launch(backward, maps, checker.dtype(), plan.dealing.blocks(), plan.shared_memory, stream);
  check_cuda(cudaGetLastError(), op);
}

}  // namespace

}  // namespace mkconvlstm

STABLE_TORCH_LIBRARY_FRAGMENT(mkconvlstm, m) {
  // The recurrence forward on Hopper, all steps in one launch; one or two branches r, pixels = [batch, height, width].
  // z_r [steps, pixels, 4 * channels] and weight_r [4 * channels, hidden, kernel height, kernel width], gate-major;
  // bias [4 * hidden] float32. With keep z_r become the activated gates. h [batch, steps, hidden, height, width];
  // c [keep ? steps : 1, pixels, hidden] float32; h_0 and c_0 [pixels, hidden].
  const std::string forward =
      "_forward(Tensor(a!) z_0, Tensor(b!)? z_1, Tensor weight_0, Tensor? weight_1, Tensor? bias, "
      "Tensor(c!) h, Tensor(d!) c, Tensor? h_0, Tensor? c_0, bool keep) -> ()";
  // Backward. The gates become the gradients of the pre-activations. c [steps, batch, height, width, hidden], float32
  // or of their type; dh [batch, steps, hidden, height * width] of any strides; dc_n, dh_0 and dc [pixels, hidden], the
  // last two written; lengths [batch] int64: the steps after which dc_n enters. Kernels with resident weights also sum
  // the gradients of pre-activations over the steps: dbias [pixels, 4 * hidden] float32, gate-major.
  const std::string backward =
      "_backward(Tensor(a!) gates_0, Tensor(b!)? gates_1, Tensor weight_0, Tensor? weight_1, Tensor c, Tensor? c_0, "
      "Tensor? dh, Tensor? dc_n, Tensor? lengths, Tensor(c!)? dh_0, Tensor(d!) dc";
  for (const std::string kernels : {"sm90", "sm90_resident"}) {  // the latter: see resident_ops.cpp
    m.def((kernels + forward).c_str());
    const std::string sums = kernels == "sm90" ? "" : ", Tensor(e!)? dbias";
    m.def((kernels + backward + sums + ") -> ()").c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("sm90_forward", TORCH_BOX(&mkconvlstm::sm90_forward));
  m.impl("sm90_backward", TORCH_BOX(&mkconvlstm::sm90_backward));
}
