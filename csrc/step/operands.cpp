#include "operands.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

namespace mkconvlstm::step {

void check_cuda(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

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

int multiprocessors(const Arguments& args) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, args.gates[0].get_device_index()), args.op);
  return count;
}

void launch_on_stream(const Arguments& args, const std::function<void(cudaStream_t)>& launch) {
  const int32_t device = args.gates[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(static_cast<cudaStream_t>(stream));
  check_cuda(cudaGetLastError(), args.op);
}

Reader::Reader(const Arguments& args, int64_t hidden)
    : steps(args.gates[0].size(0)),
      batch(args.gates[0].size(1)),
      height(args.gates[0].size(2)),
      width(args.gates[0].size(3)),
      hidden(hidden),
      op_(args.op),
      device_(device_name(args.gates[0])) {}

void Reader::check(const Tensor& tensor, const std::string& name, const Shape& shape, ScalarType type) const {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(device_name(tensor) == device_ && tensor.scalar_type() == type &&
                      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
                  op_, ": ", name, " must be ", shape_string(shape.data(), shape.size()), " ", type_name(type), " on ",
                  device_, ", got ", describe(tensor));
}

void Reader::check_contiguous(const Tensor& tensor, const std::string& name) const {
  STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, " must be contiguous");
}

void Reader::check_alignment(const Tensor& tensor, const std::string& name, size_t bytes) const {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0, op_, ": ", name,
                  " must begin at a multiple of ", bytes, " bytes");
}

}  // namespace mkconvlstm::step
