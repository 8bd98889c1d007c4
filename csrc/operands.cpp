#include "operands.h"

#include <algorithm>
#include <limits>
#include <string>

#include "describe.h"

namespace mkconvlstm {

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;

DType to_dtype(const Tensor& tensor, const std::string& name) {
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

// Turns tensors into operands. z, one tensor a part, decides the problem's sizes, dtype and device.
class OperandReader {
 public:
  OperandReader(const char* op, DeviceType device, const TensorList& z, const char* name) : op_(op) {
    STD_TORCH_CHECK(!z.empty(), op, ": ", name, " must be a non-empty list, one tensor a hidden branch");
    const Tensor& first = z[0];
    const bool is_here = device == DeviceType::CUDA ? first.is_cuda() : first.is_cpu();
    STD_TORCH_CHECK(is_here && first.dim() == 4, op, ": ", name, "[0] must be [batch, 4 * channels, height, width] on ",
                    device == DeviceType::CUDA ? "a CUDA device" : "the CPU", ", got ", describe(first));
    device_ = device_name(first);
    scalar_type_ = first.scalar_type();
    dtype_ = to_dtype(first, std::string(name) + "[0]");
    wide_type_ = dtype_ == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    batch_ = first.size(0), height_ = first.size(2), width_ = first.size(3);
    for (const Tensor& part : z) {
      STD_TORCH_CHECK(part.dim() == 4 && part.size(1) % 4 == 0, op, ": ", name,
                      " must be [batch, 4 * channels, height, width] each, got ", describe(part));
      sizes_.push_back(part.size(1) / 4);
      channels_ += part.size(1) / 4;
    }
    STD_TORCH_CHECK(4 * channels_ * pixels() <= std::numeric_limits<int32_t>::max(), op, ": ", name,
                    " must have fewer than 2^31 elements an image");
  }

  // One [batch, 4 * channels of the part, height, width] of the gates' own type for each part.
  std::vector<Operand> read_parts(const TensorList& tensors, const char* name) const {
    STD_TORCH_CHECK(tensors.size() == sizes_.size(), op_, ": ", name, " must be a list of ", sizes_.size(),
                    " tensors, one a hidden branch, got ", tensors.size());
    std::vector<Operand> parts;
    for (size_t r = 0; r < tensors.size(); ++r) {
      const std::string part_name = std::string(name) + "[" + std::to_string(r) + "]";
      parts.push_back(read(tensors[r], part_name, 4 * sizes_[r], scalar_type_));
    }
    return parts;
  }

  // [batch, channels, height, width] of the gates' own type.
  Operand read(const Tensor& tensor, const char* name) const { return read(tensor, name, channels_, scalar_type_); }

  // [batch, channels, height, width] of the accumulate type.
  Operand read_wide(const Tensor& tensor, const char* name) const { return read(tensor, name, channels_, wide_type_); }

  // Absent, or of either type.
  Operand read_gradient(const OptionalTensor& tensor, const char* name) const {
    if (!tensor) return {};
    return tensor->scalar_type() == wide_type_ ? read_wide(*tensor, name) : read(*tensor, name);
  }

  // What a kernel writes must be dense within an image and apart between images, so that no two threads meet.
  Operand dense(const Operand& operand, const char* name) const { return dense(operand, name, channels_); }

  std::vector<Operand> dense(const std::vector<Operand>& parts, const char* name) const {
    for (size_t r = 0; r < parts.size(); ++r) dense(parts[r], name, 4 * sizes_[r]);
    return parts;
  }

  // Cuts `whole`, whose operands but z and u span all channels, into the parts.
  template <typename Step, typename Slice>
  GateSteps<Step> split(Step whole, const OptionalTensor& peephole, bool current_output_peephole, Slice slice) const {
    GateSteps<Step> steps{{}, height_, width_, dtype_, PeepholeShape::kNone};
    whole.batch = batch_;
    whole.pixels = static_cast<uint32_t>(pixels());
    whole.peepholes = !peephole                 ? Peepholes::kNone
                      : current_output_peephole ? Peepholes::kCurrentOutput
                                                : Peepholes::kPreviousOutput;
    if (peephole) whole.peephole = read_peephole(*peephole, steps.peephole);
    int64_t offset = 0;
    for (size_t r = 0; r < sizes_.size(); ++r) {
      Step part = whole;
      part.channels = static_cast<uint32_t>(sizes_[r]);
      for (Operand* operand : {&part.c_prev, &part.c, &part.peephole}) *operand = from_channel(*operand, offset);
      slice(part, r, [&](const Operand& operand) { return from_channel(operand, offset); });
      steps.parts.push_back(part);
      offset += sizes_[r];
    }
    return steps;
  }

 private:
  Operand read(const Tensor& tensor, const std::string& name, int64_t channels, ScalarType type) const {
    const Shape shape = {batch_, channels, height_, width_};
    STD_TORCH_CHECK(matches(tensor, shape, type), op_, ": ", name, " must be ", wanted(shape, type), ", got ",
                    describe(tensor));
    const int64_t row = tensor.stride(2), column = tensor.stride(3);
    STD_TORCH_CHECK(tensor.size(2) <= 1 || tensor.size(3) <= 1 || row == tensor.size(3) * column, op_, ": ", name,
                    " must hold its pixels at one stride, got strides ",
                    shape_string(tensor.strides().data(), tensor.strides().size()));
    Operand result = operand(tensor);
    result.wide = type == wide_type_;
    return result;
  }

  // [3, channels, 1, 1] or [3, channels, height, width].
  Operand read_peephole(const Tensor& tensor, PeepholeShape& shape) const {
    const Shape per_channel = {3, channels_, 1, 1};
    const Shape per_pixel = {3, channels_, height_, width_};
    const bool is_per_channel = matches(tensor, per_channel, wide_type_);
    STD_TORCH_CHECK(is_per_channel || matches(tensor, per_pixel, wide_type_), op_, ": peephole must be ",
                    wanted(per_channel, wide_type_), " or ", wanted(per_pixel, wide_type_), ", got ", describe(tensor));
    STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": peephole must be contiguous");
    shape = is_per_channel ? PeepholeShape::kChannel : PeepholeShape::kPixel;
    Operand weights = operand(tensor);
    weights.wide = true;
    if (is_per_channel) weights.pixel = 0;
    return weights;
  }

  Operand dense(const Operand& operand, const char* name, int64_t channels) const {
    const bool empty = batch_ * channels * pixels() == 0;
    const bool apart = batch_ <= 1 || operand.batch >= channels * pixels();
    const auto is = [](int64_t size, int64_t stride, int64_t wanted) { return size <= 1 || stride == wanted; };
    const bool channels_first = is(pixels(), operand.pixel, 1) && is(channels, operand.channel, pixels());
    const bool channels_last = is(channels, operand.channel, 1) && is(pixels(), operand.pixel, channels);
    STD_TORCH_CHECK(empty || (apart && (channels_first || channels_last)), op_, ": ", name,
                    " must hold its images apart, each contiguous, channels first or channels last, ",
                    "got strides [batch, channel, pixel] = [", operand.batch, ", ", operand.channel, ", ",
                    operand.pixel, "]");
    return operand;
  }

  Operand from_channel(Operand operand, int64_t channel) const {
    const int64_t bytes = operand.wide ? accumulate_bytes(dtype_) : scalar_bytes(dtype_);
    if (operand.data != nullptr) operand.data = static_cast<char*>(operand.data) + channel * operand.channel * bytes;
    return operand;
  }

  bool matches(const Tensor& tensor, const Shape& shape, ScalarType type) const {
    const auto sizes = tensor.sizes();
    return device_name(tensor) == device_ && tensor.scalar_type() == type &&
           std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  }

  std::string wanted(const Shape& shape, ScalarType type) const {
    return shape_string(shape.data(), shape.size()) + " " + type_name(type) + " on " + device_;
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

  int64_t pixels() const { return height_ * width_; }

  const char* op_;
  std::string device_;
  ScalarType scalar_type_, wide_type_;
  DType dtype_;
  int64_t batch_, height_, width_, channels_ = 0;
  std::vector<int64_t> sizes_;  // channels of each part
};

}  // namespace

GateSteps<GateStepForward> read_forward(DeviceType device, const TensorList& z, const TensorList& u,
                                        const Tensor& c_prev, const Tensor& h, const Tensor& c,
                                        const OptionalTensor& peephole, bool current_output_peephole) {
  const OperandReader reader("gate_step_forward", device, z, "z");
  const std::vector<Operand> z_parts = reader.dense(reader.read_parts(z, "z"), "z");
  const std::vector<Operand> u_parts = u.empty() ? std::vector<Operand>(z.size()) : reader.read_parts(u, "u");
  GateStepForward whole{};
  whole.c_prev = reader.read_wide(c_prev, "c_prev");
  whole.h = reader.dense(reader.read(h, "h"), "h");
  whole.c = reader.dense(reader.read_wide(c, "c"), "c");
  return reader.split(whole, peephole, current_output_peephole, [&](GateStepForward& part, size_t r, auto slice) {
    part.z = z_parts[r];
    part.u = u_parts[r];
    part.h = slice(part.h);
  });
}

GateSteps<GateStepBackward> read_backward(DeviceType device, const TensorList& gates, const OptionalTensor& dh,
                                          const OptionalTensor& dh_prev, const Tensor& dc, const Tensor& c_prev,
                                          const Tensor& c, const OptionalTensor& peephole,
                                          bool current_output_peephole) {
  const OperandReader reader("gate_step_backward", device, gates, "gates");
  const std::vector<Operand> gate_parts = reader.dense(reader.read_parts(gates, "gates"), "gates");
  GateStepBackward whole{};
  whole.dh_out = reader.read_gradient(dh, "dh");
  whole.dh_rec = reader.read_gradient(dh_prev, "dh_prev");
  whole.dc = reader.dense(reader.read_wide(dc, "dc"), "dc");
  whole.c_prev = reader.read_wide(c_prev, "c_prev");
  whole.c = reader.read_wide(c, "c");
  return reader.split(whole, peephole, current_output_peephole, [&](GateStepBackward& part, size_t r, auto slice) {
    part.z = gate_parts[r];
    for (Operand* operand : {&part.dh_out, &part.dh_rec, &part.dc}) *operand = slice(*operand);
  });
}

}  // namespace mkconvlstm
