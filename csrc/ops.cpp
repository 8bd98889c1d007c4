// The CUDA operations: schema, argument checks, the way to a launcher. Only torch's stable ABI, so that one library
// serves every torch that the package supports.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "gate_step.h"
#include "plan.h"

namespace mkconvlstm {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

std::string shape_string(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  for (size_t i = 0; i < count; ++i) text << (i == 0 ? "[" : ", ") << sizes[i];
  text << "]";
  return text.str();
}

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return toString(type);
  }
}

std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << shape_string(tensor.sizes().data(), tensor.sizes().size()) << " " << type_name(tensor.scalar_type())
       << " on ";
  if (tensor.is_cuda()) {
    text << "cuda:" << tensor.get_device_index();
  } else {
    text << "another device";
  }
  return text.str();
}

DType to_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16, got ", describe(tensor));
  }
}

// Turns tensors into the kernels' operands, and finds out on the way what all of them have in common.
class OperandReader {
 public:
  // z decides the problem's sizes, dtype and device.
  OperandReader(const char* op, const Tensor& z, const char* name) : op_(op), device_(z.get_device_index()) {
    STD_TORCH_CHECK(z.is_cuda() && z.dim() == 4 && z.size(1) % 4 == 0, op, ": ", name,
                    " must be [batch, 4 * channels, height, width] on a CUDA device, got ", describe(z));
    scalar_type_ = z.scalar_type();
    problem_.batch = z.size(0);
    problem_.channels = z.size(1) / 4;
    problem_.height = z.size(2);
    problem_.width = z.size(3);
    problem_.dtype = to_dtype(z, name);
    wide_type_ = problem_.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    z_channels_last_ = !is_channels_first(operand(z), z.size(1)) && is_channels_last(operand(z), z.size(1));
  }

  // [batch, gates * channels, height, width] of the gates' own type.
  Operand read(const Tensor& tensor, const char* name, int64_t gates = 1) {
    return read(tensor, name, gates, scalar_type_);
  }

  // [batch, channels, height, width] of the accumulate type.
  Operand read_wide(const Tensor& tensor, const char* name) { return read(tensor, name, 1, wide_type_); }

  // Absent, or of either type.
  Operand read_gradient(const OptionalTensor& tensor, const char* name) {
    if (!tensor) return {};
    return tensor->scalar_type() == wide_type_ ? read_wide(*tensor, name) : read(*tensor, name);
  }

  // What a kernel writes must be dense within an image and apart between images, so that no two threads meet.
  Operand dense(const Operand& operand, const char* name, int64_t gates = 1) const {
    const int64_t channels = gates * problem_.channels;
    const bool empty = problem_.batch * channels * pixels() == 0;
    const bool apart = problem_.batch <= 1 || operand.batch >= channels * pixels();
    STD_TORCH_CHECK(empty || (apart && (is_channels_first(operand, channels) || is_channels_last(operand, channels))),
                    op_, ": ", name, " must hold its images apart, each contiguous, channels first or channels last, ",
                    "got strides [batch, channel, pixel] = [", operand.batch, ", ", operand.channel, ", ",
                    operand.pixel, "]");
    return operand;
  }

  // [3, channels, 1, 1] or [3, channels, height, width].
  Operand read_peephole(const OptionalTensor& tensor) {
    if (!tensor) return {};
    const Shape per_channel = {3, problem_.channels, 1, 1};
    const Shape per_pixel = {3, problem_.channels, problem_.height, problem_.width};
    const bool is_per_channel = matches(*tensor, per_channel, wide_type_);
    STD_TORCH_CHECK(is_per_channel || matches(*tensor, per_pixel, wide_type_), op_, ": peephole must be ",
                    wanted(per_channel, wide_type_), " or ", wanted(per_pixel, wide_type_), ", got ",
                    describe(*tensor));
    STD_TORCH_CHECK(tensor->is_contiguous(), op_, ": peephole must be contiguous");
    problem_.peephole = is_per_channel ? PeepholeShape::kChannel : PeepholeShape::kPixel;
    Operand weights = operand(*tensor);
    if (is_per_channel) weights.pixel = 0;
    return weights;
  }

  void fill(GateStep& step, const OptionalTensor& peephole, bool current_output_peephole) {
    step.peephole = read_peephole(peephole);
    step.peepholes = !peephole                 ? Peepholes::kNone
                     : current_output_peephole ? Peepholes::kCurrentOutput
                                               : Peepholes::kPreviousOutput;
  }

  // Once everything has been read: plans the launch and does it, on torch's current stream of the tensors' device.
  template <typename Step>
  void launch_step(Step& step) {
    problem_.layout = all_channels_first_  ? Layout::kChannelsFirst
                      : all_channels_last_ ? Layout::kChannelsLast
                                           : Layout::kStrided;
    DeviceLimits limits;
    check_cuda(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    check_cuda(cudaDeviceGetAttribute(&limits.max_threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor,
                                      device_));
    const GateStepPlan step_plan = plan(problem_, limits);
    if (step_plan.blocks_x == 0) return;

    step.batch = problem_.batch;
    step.channels = static_cast<uint32_t>(problem_.channels);
    step.pixels = static_cast<uint32_t>(problem_.height * problem_.width);
    step.channels_last = problem_.layout == Layout::kStrided ? z_channels_last_ : !all_channels_first_;

    const torch::stable::accelerator::DeviceGuard guard(device_);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    launch(step, step_plan, problem_.dtype, static_cast<cudaStream_t>(stream));
    check_cuda(cudaGetLastError());
  }

 private:
  Operand read(const Tensor& tensor, const char* name, int64_t gates, ScalarType type) {
    const Shape shape = {problem_.batch, gates * problem_.channels, problem_.height, problem_.width};
    STD_TORCH_CHECK(matches(tensor, shape, type), op_, ": ", name, " must be ", wanted(shape, type), ", got ",
                    describe(tensor));
    const int64_t row = tensor.stride(2), column = tensor.stride(3);
    STD_TORCH_CHECK(tensor.size(2) <= 1 || tensor.size(3) <= 1 || row == tensor.size(3) * column, op_, ": ", name,
                    " must hold its pixels at one stride, got strides ",
                    shape_string(tensor.strides().data(), tensor.strides().size()));
    Operand result = operand(tensor);
    result.wide = type == wide_type_;
    all_channels_first_ = all_channels_first_ && is_channels_first(result, shape[1]);
    all_channels_last_ = all_channels_last_ && is_channels_last(result, shape[1]);
    limit_vector_width(result, static_cast<int64_t>(tensor.element_size()));
    return result;
  }

  bool matches(const Tensor& tensor, const Shape& shape, ScalarType type) const {
    const auto sizes = tensor.sizes();
    return tensor.is_cuda() && tensor.get_device_index() == device_ && tensor.scalar_type() == type &&
           std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  }

  std::string wanted(const Shape& shape, ScalarType type) const {
    return shape_string(shape.data(), shape.size()) + " " + type_name(type) + " on cuda:" + std::to_string(device_);
  }

  // A stride along one element is never followed; torch leaves it arbitrary.
  static Operand operand(const Tensor& tensor) {
    Operand result;
    result.data = tensor.data_ptr();
    result.batch = tensor.size(0) > 1 ? tensor.stride(0) : 0;
    result.channel = tensor.size(1) > 1 ? tensor.stride(1) : 0;
    result.pixel = tensor.size(3) > 1 ? tensor.stride(3) : tensor.size(2) > 1 ? tensor.stride(2) : 0;
    return result;
  }

  int64_t pixels() const { return problem_.height * problem_.width; }

  bool is_channels_first(const Operand& o, int64_t channels) const {
    return (pixels() <= 1 || o.pixel == 1) && (channels <= 1 || o.channel == pixels());
  }

  bool is_channels_last(const Operand& o, int64_t channels) const {
    return (channels <= 1 || o.channel == 1) && (pixels() <= 1 || o.pixel == channels);
  }

  // Every image has to begin at a multiple of a vector, or at least of the 16 bytes that one access moves.
  void limit_vector_width(const Operand& operand, int64_t element_size) {
    const int64_t begins =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(operand.data)) | operand.batch * element_size;
    int width = 1;
    while (width * element_size < 16 && begins % (2 * width * element_size) == 0) width *= 2;
    if (width * element_size < 16) problem_.max_vector_width = std::min(problem_.max_vector_width, width);
  }

  void check_cuda(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error));
  }

  const char* op_;
  int32_t device_;
  ScalarType scalar_type_, wide_type_;
  GateStepProblem problem_;
  bool z_channels_last_ = false;
  bool all_channels_first_ = true;
  bool all_channels_last_ = true;
};

void gate_step_forward(Tensor z, OptionalTensor u, Tensor c_prev, Tensor h, Tensor c, OptionalTensor peephole,
                       bool current_output_peephole) {
  OperandReader reader("gate_step_forward", z, "z");
  GateStepForward step{};
  step.z = reader.dense(reader.read(z, "z", 4), "z", 4);
  if (u) step.u = reader.read(*u, "u", 4);
  step.c_prev = reader.read_wide(c_prev, "c_prev");
  step.h = reader.dense(reader.read(h, "h"), "h");
  step.c = reader.dense(reader.read_wide(c, "c"), "c");
  reader.fill(step, peephole, current_output_peephole);
  reader.launch_step(step);
}

void gate_step_backward(Tensor gates, OptionalTensor dh_out, OptionalTensor dh_rec, Tensor dc, Tensor c_prev, Tensor c,
                        OptionalTensor peephole, bool current_output_peephole) {
  OperandReader reader("gate_step_backward", gates, "gates");
  GateStepBackward step{};
  step.z = reader.dense(reader.read(gates, "gates", 4), "gates", 4);
  step.dh_out = reader.read_gradient(dh_out, "dh_out");
  step.dh_rec = reader.read_gradient(dh_rec, "dh_rec");
  step.dc = reader.dense(reader.read_wide(dc, "dc"), "dc");
  step.c_prev = reader.read_wide(c_prev, "c_prev");
  step.c = reader.read_wide(c, "c");
  reader.fill(step, peephole, current_output_peephole);
  reader.launch_step(step);
}

}  // namespace

}  // namespace mkconvlstm

STABLE_TORCH_LIBRARY_FRAGMENT(mkconvlstm, m) {
  // z [B, 4F, H, W] pre-activations, gate-major i f g o, become activated gates; u, the hidden-to-hidden part, is
  // added. c_prev, c [B, F, H, W] and peephole [3, F, 1 or H, 1 or W] (rows w_ci, w_cf, w_co) are float64 for float64
  // z, else float32. c may be c_prev itself.
  m.def(
      "gate_step_forward(Tensor(a!) z, Tensor? u, Tensor c_prev, Tensor(b!) h, Tensor(c!) c, Tensor? peephole, "
      "bool current_output_peephole) -> ()");
  // gates become the gradients of the pre-activations. dc [B, F, H, W] holds dL/dc_t as step t+1 sees it and becomes
  // dL/dc_{t-1}. dL/dh_t = dh_out + dh_rec, each of the gates' dtype or c's.
  m.def(
      "gate_step_backward(Tensor(a!) gates, Tensor? dh_out, Tensor? dh_rec, Tensor(b!) dc, Tensor c_prev, Tensor c, "
      "Tensor? peephole, bool current_output_peephole) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("gate_step_forward", TORCH_BOX(&mkconvlstm::gate_step_forward));
  m.impl("gate_step_backward", TORCH_BOX(&mkconvlstm::gate_step_backward));
}
