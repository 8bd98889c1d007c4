// From an operation's tensors, all of them checked, to what kernels of one step a launch read and write. The schema in
// library.py says what the arguments are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../describe.h"
#include "params.h"
#include "problem.h"

namespace mkconvlstm::step {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// Arguments that both operations have.
struct Arguments {
  const char* op;
  const std::vector<Tensor>& gates;
  const std::vector<Tensor>& weights;
  const std::vector<int64_t>& kernels;
  const OptionalTensor& c_0;
  const OptionalTensor& peephole;
  bool current_output_peephole;
};

struct ForwardArguments : Arguments {
  const OptionalTensor& h_0;
  const OptionalTensor& bias;
  bool keep;
  const Tensor& state;
  const Tensor& h;
  const Tensor& c;
};

struct BackwardArguments : Arguments {
  const Tensor& c;
  const OptionalTensor& dh;
  const OptionalTensor& dc_n;
  const OptionalTensor& lengths;
  const OptionalTensor& dh_0;
  const Tensor& dc;
};

void check_cuda(cudaError_t error, const char* op);
Problem read_problem(const Arguments& args);
int multiprocessors(const Arguments& args);

// Calls launch(stream) with torch's current stream of the arguments' device.
void launch_on_stream(const Arguments& args, const std::function<void(cudaStream_t)>& launch);

template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, double>          ? ScalarType::Double
                                   : std::is_same_v<T, float>         ? ScalarType::Float
                                   : std::is_same_v<T, __half>        ? ScalarType::Half
                                   : std::is_same_v<T, __nv_bfloat16> ? ScalarType::BFloat16
                                   : std::is_same_v<T, int64_t>       ? ScalarType::Long
                                                                      : ScalarType::Undefined;

// Calls function(T()) for the one of the types that the parts have.
template <typename... Ts, typename Function>
void with_type(const Arguments& args, const char* types, Function function) {
  const ScalarType type = args.gates.empty() ? ScalarType::Undefined : args.gates[0].scalar_type();
  const bool found = ((type == kScalarType<Ts> && (function(Ts()), true)) || ...);
  STD_TORCH_CHECK(found, args.op, ": parts must be a non-empty list of ", types, " tensors",
                  args.gates.empty() ? "" : ", got " + describe(args.gates[0]));
}

// Reads operands of the sizes that all share, from the gates of the first part.
class Reader {
 public:
  explicit Reader(const Arguments& args, int64_t hidden);

  // The data of a tensor that must be so, contiguous.
  template <typename T>
  T* read(const Tensor& tensor, const std::string& name, const Shape& shape) const {
    check(tensor, name, shape, kScalarType<std::remove_const_t<T>>);
    check_contiguous(tensor, name);
    return static_cast<T*>(tensor.data_ptr());
  }

  template <typename T>
  T* read(const OptionalTensor& tensor, const std::string& name, const Shape& shape) const {
    return tensor ? read<T>(*tensor, name, shape) : nullptr;
  }

  void check(const Tensor& tensor, const std::string& name, const Shape& shape, ScalarType type) const;
  void check_contiguous(const Tensor& tensor, const std::string& name) const;
  void check_alignment(const Tensor& tensor, const std::string& name, size_t bytes) const;

  Shape states() const { return {batch, height, width, hidden}; }
  Shape states(int64_t count) const { return {count, batch, height, width, hidden}; }
  Shape outputs() const { return {batch, steps, hidden, height, width}; }

  int64_t steps, batch, height, width, hidden;

 private:
  const char* op_;
  std::string device_;
};

// What both passes share. weights_shape(branch): how a branch's weights are packed.
template <typename T, typename WeightsShape>
void read_sequence(const Arguments& args, const Problem& problem, const Columns& columns, const Reader& reader,
                   WeightsShape weights_shape, Sequence<T>& s) {
  std::vector<int64_t> first_channels = {0};
  for (const BranchShape& branch : problem.branches) first_channels.push_back(first_channels.back() + branch.channels);
  s.steps = reader.steps;
  s.pixels = static_cast<uint32_t>(problem.pixels());
  s.height = static_cast<uint32_t>(reader.height);
  s.width = static_cast<uint32_t>(reader.width);
  s.hidden = static_cast<int>(reader.hidden);
  s.branch_count = static_cast<int>(problem.branches.size());
  for (int k = 0; k < s.branch_count; ++k) {
    const int r = columns.order[k];
    const BranchShape& shape = problem.branches[r];
    const std::string part = "part " + std::to_string(r), weights = "weights[" + std::to_string(r) + "]";
    s.branches[k] = {reader.read<T>(args.gates[r], part,
                                    {reader.steps, reader.batch, reader.height, reader.width, 4 * shape.channels}),
                     reader.read<const T>(args.weights[r], weights, weights_shape(shape)),
                     static_cast<int>(shape.kernel_height),
                     static_cast<int>(shape.kernel_width),
                     static_cast<int>(shape.dilation_height),
                     static_cast<int>(shape.dilation_width),
                     static_cast<int>(shape.channels),
                     static_cast<int>(first_channels[r]),
                     static_cast<unsigned>(columns.first_blocks[k])};
    reader.check_alignment(args.weights[r], weights, 16);
  }

  s.c_0 = reader.read<const Cell<T>>(args.c_0, "c_0", reader.states());
  s.peepholes = !args.peephole                   ? Peepholes::kNone
                : args.current_output_peephole ? Peepholes::kCurrentOutput
                                               : Peepholes::kPreviousOutput;
  if (args.peephole) {
    const bool per_channel = args.peephole->dim() == 4 && args.peephole->size(2) == 1 && args.peephole->size(3) == 1;
    const Shape per_pixel = {3, reader.hidden, reader.height, reader.width};
    s.peephole =
        reader.read<const Cell<T>>(*args.peephole, "peephole", per_channel ? Shape{3, reader.hidden, 1, 1} : per_pixel);
    s.peephole_pixels = per_channel ? 1 : s.height * s.width;
  }
}

// state_row: elements of a pixel in h_0 and state.
template <typename T, typename WeightsShape>
Forward<T> read_forward(const ForwardArguments& args, const Problem& problem, const Columns& columns,
                        WeightsShape weights_shape, int64_t state_row) {
  const Reader reader(args, problem.hidden());
  Forward<T> p{};
  read_sequence<T>(args, problem, columns, reader, weights_shape, p);
  p.keep_gates = args.keep;
  p.c = reader.read<Cell<T>>(args.c, "c", reader.states(args.keep ? reader.steps : 1));
  p.c_step = args.keep ? problem.pixels() * reader.hidden : 0;
  p.state_row = static_cast<int>(state_row);
  p.h_0 = reader.read<const T>(args.h_0, "h_0", {reader.batch, reader.height, reader.width, state_row});
  p.bias = reader.read<const Cell<T>>(args.bias, "bias", {4 * reader.hidden});
  p.state = reader.read<T>(args.state, "state", {2, reader.batch, reader.height, reader.width, state_row});
  p.h = reader.read<T>(args.h, "h", reader.outputs());
  return p;
}

template <typename T, typename WeightsShape>
Backward<T> read_backward(const BackwardArguments& args, const Problem& problem, const Columns& columns,
                          WeightsShape weights_shape) {
  const Reader reader(args, problem.hidden());
  Backward<T> p{};
  read_sequence<T>(args, problem, columns, reader, weights_shape, p);
  p.c = reader.read<Cell<T>>(args.c, "c", reader.states(reader.steps));
  p.c_step = problem.pixels() * reader.hidden;
  if (args.dh) {
    reader.check(*args.dh, "dh", reader.outputs(), kScalarType<T>);
    p.dh = static_cast<const T*>(args.dh->data_ptr());
    p.dh_image = args.dh->stride(0), p.dh_step = args.dh->stride(1), p.dh_channel = args.dh->stride(2);
    p.dh_row = args.dh->stride(3), p.dh_column = args.dh->stride(4);
  }
  p.dc_n = reader.read<const Cell<T>>(args.dc_n, "dc_n", reader.states());
  p.lengths = reader.read<const int64_t>(args.lengths, "lengths", {reader.batch});
  p.dh_0 = reader.read<T>(args.dh_0, "dh_0", reader.states());
  p.dc = reader.read<Cell<T>>(args.dc, "dc", reader.states());
  return p;
}

}  // namespace mkconvlstm::step
