// The recurrence in float64 and float32 on NVIDIA GPUs: from an operation's tensors, all of them checked, to the SIMT
// kernels. The schema in library.py says what the arguments are.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../describe.h"
#include "launch.h"

namespace mkconvlstm::simt {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

void check_cuda(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// The sizes that all operands share, from the gates of the first part; reads operands of these sizes.
template <typename Scalar>
class Reader {
 public:
  Reader(const char* op, const Tensor& gates)
      : steps(gates.size(0)),
        batch(gates.size(1)),
        height(gates.size(2)),
        width(gates.size(3)),
        op_(op),
        device_(device_name(gates)) {}

  Scalar* read(const Tensor& tensor, const std::string& name, const Shape& shape) const {
    check(tensor, name, shape, kType);
    STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, " must be contiguous");
    return static_cast<Scalar*>(tensor.data_ptr());
  }

  Scalar* read(const OptionalTensor& tensor, const std::string& name, const Shape& shape) const {
    return tensor ? read(*tensor, name, shape) : nullptr;
  }

  void check(const Tensor& tensor, const std::string& name, const Shape& shape, ScalarType type) const {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(device_name(tensor) == device_ && tensor.scalar_type() == type &&
                        std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
                    op_, ": ", name, " must be ", shape_string(shape.data(), shape.size()), " ", type_name(type),
                    " on ", device_, ", got ", describe(tensor));
  }

  Shape states() const { return {batch, height, width, hidden}; }
  Shape states(int64_t count) const { return {count, batch, height, width, hidden}; }

  int64_t steps, batch, height, width;
  int64_t hidden = 0;

 private:
  static constexpr ScalarType kType = std::is_same_v<Scalar, double> ? ScalarType::Double : ScalarType::Float;

  const char* op_;
  std::string device_;
};

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

Problem read_problem(const Arguments& args) {
  for (const Tensor& gates : args.gates) {
    STD_TORCH_CHECK(gates.is_cuda() && gates.dim() == 5 && gates.size(4) % 4 == 0, args.op,
                    ": parts must be [steps, batch, height, width, 4 * channels] on a CUDA device, got ",
                    describe(gates));
  }
  const size_t parts = args.gates.size();
  STD_TORCH_CHECK(args.weights.size() == parts && args.kernels.size() == 4 * parts, args.op,
                  ": weights must be a list of ", parts, " tensors and kernels of ", 4 * parts, " numbers, got ",
                  args.weights.size(), " and ", args.kernels.size());
  const Tensor& first = args.gates[0];
  Problem problem{first.size(1), first.size(2), first.size(3), {}};
  for (size_t r = 0; r < parts; ++r) {
    const int64_t* kernel = &args.kernels[4 * r];
    problem.branches.push_back({args.gates[r].size(4) / 4, kernel[0], kernel[1], kernel[2], kernel[3]});
  }
  return problem;
}

// What both passes share, but the branches' weights.
template <typename Scalar>
void read_sequence(const Arguments& args, const Problem& problem, const Plan& plan, Reader<Scalar>& reader,
                   Sequence<Scalar>& s) {
  std::vector<int64_t> first_channels;
  for (const BranchShape& branch : problem.branches) {
    first_channels.push_back(reader.hidden);
    reader.hidden += branch.channels;
  }
  s.steps = reader.steps;
  s.pixels = static_cast<uint32_t>(reader.batch * reader.height * reader.width);
  s.height = static_cast<uint32_t>(reader.height);
  s.width = static_cast<uint32_t>(reader.width);
  s.hidden = static_cast<int>(reader.hidden);
  s.branch_count = static_cast<int>(problem.branches.size());
  for (int k = 0; k < s.branch_count; ++k) {
    const int r = plan.order[k];
    const BranchShape& shape = problem.branches[r];
    Branch<Scalar>& branch = s.branches[k];
    branch.gates = reader.read(args.gates[r], "part " + std::to_string(r),
                               {reader.steps, reader.batch, reader.height, reader.width, 4 * shape.channels});
    branch.kernel_height = static_cast<int>(shape.kernel_height);
    branch.kernel_width = static_cast<int>(shape.kernel_width);
    branch.dilation_height = static_cast<int>(shape.dilation_height);
    branch.dilation_width = static_cast<int>(shape.dilation_width);
    branch.channels = static_cast<int>(shape.channels);
    branch.first_channel = static_cast<int>(first_channels[r]);
    branch.first_block = plan.first_blocks[k];
  }

  s.c_0 = reader.read(args.c_0, "c_0", reader.states());
  s.peepholes = !args.peephole                   ? Peepholes::kNone
                : args.current_output_peephole ? Peepholes::kCurrentOutput
                                               : Peepholes::kPreviousOutput;
  if (args.peephole) {
    const bool per_channel = args.peephole->dim() == 4 && args.peephole->size(2) == 1 && args.peephole->size(3) == 1;
    const Shape per_pixel = {3, reader.hidden, reader.height, reader.width};
    s.peephole = reader.read(*args.peephole, "peephole", per_channel ? Shape{3, reader.hidden, 1, 1} : per_pixel);
    s.peephole_pixels = per_channel ? 1 : s.height * s.width;
  }
}

int64_t padded(int64_t size, int64_t block) { return (size + block - 1) / block * block; }

// shape(channels): depth and padded columns of a branch's weights.
template <typename Scalar, typename Columns>
void read_weights(const Arguments& args, const Problem& problem, const Plan& plan, const Reader<Scalar>& reader,
                  Sequence<Scalar>& s, Columns shape) {
  for (int k = 0; k < s.branch_count; ++k) {
    const int r = plan.order[k];
    const Tensor& weights = args.weights[r];
    const auto [depth, columns] = shape(problem.branches[r].channels);
    const std::string name = "weights[" + std::to_string(r) + "]";
    s.branches[k].weights =
        reader.read(weights, name, {problem.branches[r].taps(), padded(depth, kPackedDepth), columns});
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 == 0, args.op, ": ", name,
                    " must begin at a multiple of 16 bytes");
  }
}

// Plans and launches on torch's current stream. read(plan): the pass's parameters.
template <typename Read>
void run(const Arguments& args, Pass Plan::*pass, Read read) {
  const Problem problem = read_problem(args);
  const int32_t device = args.gates[0].get_device_index();
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), args.op);
  const Plan chosen = plan(problem, multiprocessors);
  const auto params = read(problem, chosen);
  if (params.pixels == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(params, chosen.*pass, static_cast<cudaStream_t>(stream));
  check_cuda(cudaGetLastError(), args.op);
}

// Calls function(Scalar()) for the parts' type.
template <typename Function>
void with_scalar(const char* op, const std::vector<Tensor>& parts, Function function) {
  const bool is_double = !parts.empty() && parts[0].scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || (!parts.empty() && parts[0].scalar_type() == ScalarType::Float), op,
                  ": parts must be a non-empty list of float64 or float32 tensors",
                  parts.empty() ? "" : ", got " + describe(parts[0]));
  if (is_double) {
    function(double());
  } else {
    function(float());
  }
}

void simt_forward(std::vector<Tensor> z, std::vector<Tensor> weights, std::vector<int64_t> kernels, OptionalTensor h_0,
                  OptionalTensor c_0, OptionalTensor bias, OptionalTensor peephole, bool current_output_peephole,
                  bool keep, Tensor state, Tensor h, Tensor c) {
  const Arguments args{"simt_forward", z, weights, kernels, c_0, peephole, current_output_peephole};
  with_scalar(args.op, z, [&](auto scalar) {
    using Scalar = decltype(scalar);
    run(args, &Plan::forward, [&](const Problem& problem, const Plan& plan) {
      Reader<Scalar> reader(args.op, z[0]);
      Forward<Scalar> p{};
      read_sequence<Scalar>(args, problem, plan, reader, p);
      read_weights<Scalar>(args, problem, plan, reader, p, [&](int64_t channels) {
        return std::pair(reader.hidden, kColumns * padded(channels, kLanes));
      });
      p.keep_gates = keep;
      p.c = reader.read(c, "c", reader.states(keep ? reader.steps : 1));
      p.c_step = keep ? reader.batch * reader.height * reader.width * reader.hidden : 0;
      p.h_0 = reader.read(h_0, "h_0", reader.states());
      p.bias = reader.read(bias, "bias", {4 * reader.hidden});
      p.state = reader.read(state, "state", reader.states(2));
      p.h = reader.read(h, "h", {reader.batch, reader.steps, reader.hidden, reader.height, reader.width});
      return p;
    });
  });
}

void simt_backward(std::vector<Tensor> gates, std::vector<Tensor> weights, std::vector<int64_t> kernels,
                   OptionalTensor c_0, Tensor c, OptionalTensor peephole, bool current_output_peephole,
                   OptionalTensor dh, OptionalTensor dc_n, OptionalTensor lengths, OptionalTensor dh_0, Tensor dc) {
  const Arguments args{"simt_backward", gates, weights, kernels, c_0, peephole, current_output_peephole};
  with_scalar(args.op, gates, [&](auto scalar) {
    using Scalar = decltype(scalar);
    run(args, &Plan::backward, [&](const Problem& problem, const Plan& plan) {
      Reader<Scalar> reader(args.op, gates[0]);
      Backward<Scalar> p{};
      read_sequence<Scalar>(args, problem, plan, reader, p);
      read_weights<Scalar>(args, problem, plan, reader, p, [&](int64_t channels) {
        return std::pair(4 * channels, padded(reader.hidden, kBlockColumns));
      });
      p.c = reader.read(c, "c", reader.states(reader.steps));
      p.c_step = reader.batch * reader.height * reader.width * reader.hidden;
      if (dh) {
        reader.check(*dh, "dh", {reader.batch, reader.steps, reader.hidden, reader.height, reader.width},
                     gates[0].scalar_type());
        p.dh = static_cast<const Scalar*>(dh->data_ptr());
        p.dh_image = dh->stride(0), p.dh_step = dh->stride(1), p.dh_channel = dh->stride(2);
        p.dh_row = dh->stride(3), p.dh_column = dh->stride(4);
      }
      p.dc_n = reader.read(dc_n, "dc_n", reader.states());
      if (lengths) {
        reader.check(*lengths, "lengths", {reader.batch}, ScalarType::Long);
        STD_TORCH_CHECK(lengths->is_contiguous(), args.op, ": lengths must be contiguous");
        p.lengths = static_cast<const int64_t*>(lengths->data_ptr());
      }
      p.dh_0 = reader.read(dh_0, "dh_0", reader.states());
      p.dc = reader.read(dc, "dc", reader.states());
      return p;
    });
  });
}

}  // namespace

}  // namespace mkconvlstm::simt

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CUDA, m) {
  m.impl("simt_forward", TORCH_BOX(&mkconvlstm::simt::simt_forward));
  m.impl("simt_backward", TORCH_BOX(&mkconvlstm::simt::simt_backward));
}
