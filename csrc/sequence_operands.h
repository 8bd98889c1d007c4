// What the operations of whole recurrences on Hopper share: checks of their tensors. Only torch's stable ABI.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "plan.h"
#include "sequence_plan.h"

namespace mkconvlstm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_cuda(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// What all tensors of a call have in common.
class Checker {
 public:
  Checker(const char* op, const Tensor& like) : op_(op), device_(like.get_device_index()) {
    STD_TORCH_CHECK(like.is_cuda(), op, ": all tensors must be on a CUDA device");
    type_ = like.scalar_type();
    STD_TORCH_CHECK(type_ == ScalarType::Half || type_ == ScalarType::BFloat16, op,
                    ": z must be float16 or bfloat16, got ", toString(type_));
  }

  // The data of a contiguous tensor of that many elements, all of which kernels reach by 16-byte accesses.
  template <typename Pointer>
  Pointer* read(const Tensor& tensor, const char* name, int64_t elements, ScalarType type) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, op_, ": ", name,
                    " must be on the device of z");
    STD_TORCH_CHECK(tensor.scalar_type() == type, op_, ": ", name, " must be ", toString(type), ", got ",
                    toString(tensor.scalar_type()));
    STD_TORCH_CHECK(tensor.numel() == elements && tensor.is_contiguous(), op_, ": ", name, " must hold ", elements,
                    " elements, contiguous, got ", tensor.numel());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, op_, ": ", name,
                    " must begin at a multiple of 16 bytes");
    return static_cast<Pointer*>(tensor.data_ptr());
  }

  template <typename Pointer>
  Pointer* read(const OptionalTensor& tensor, const char* name, int64_t elements, ScalarType type) const {
    return tensor ? read<Pointer>(*tensor, name, elements, type) : nullptr;
  }

  ScalarType type() const { return type_; }
  DType dtype() const { return type_ == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16; }
  int32_t device() const { return device_; }

 private:
  const char* op_;
  int32_t device_;
  ScalarType type_;
};

// Freed when the caller returns; torch keeps the memory until the stream has passed what was launched before.
inline Tensor scratch(const Tensor& like, int64_t bytes) {
  const int64_t sizes[1] = {bytes};
  return torch::stable::new_empty(like, {sizes, 1}, ScalarType::Byte);
}

inline HopperLimits device_limits(int32_t device, const char* op) {
  HopperLimits limits;
  check_cuda(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device), op);
  check_cuda(cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op);
  return limits;
}

struct Sizes {
  int64_t batch, steps, hidden, height, width;

  int64_t numel() const { return batch * steps * hidden * height * width; }
};

// One or two branches, and each one's part of z.
struct Branches {
  SequenceProblem problem;
  const void* weights[2] = {};
  void* z[2] = {};

  Branches(const char* op, const Checker& checker, const Sizes& sizes, const OptionalTensor (&zs)[2],
           const OptionalTensor (&all_weights)[2])
      : problem{sizes.batch, sizes.height, sizes.width, {}} {
    const int64_t hidden = sizes.hidden;
    for (int r = 0; r < 2 && all_weights[r]; ++r) {
      const Tensor& weight = *all_weights[r];
      STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) % 4 == 0 && weight.size(1) == hidden && zs[r], op,
                      ": weights must be [4 * channels, hidden, kernel height, kernel width], one for each z");
      problem.branches.push_back({weight.size(2), weight.size(3), weight.size(0) / 4});
      weights[r] = checker.read<void>(weight, "weight", weight.numel(), checker.type());
      z[r] = checker.read<void>(*zs[r], "z", sizes.numel() / hidden * weight.size(0), checker.type());
    }
    STD_TORCH_CHECK(sizes.numel() <= std::numeric_limits<int32_t>::max(), op,
                    ": h must have at most 2^31 - 1 elements");
    STD_TORCH_CHECK(problem.hidden() == hidden, op, ": the branches must serve all hidden channels");
  }
};

inline cudaStream_t current_stream(const Checker& checker) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(checker.device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of c [steps, batch, height, width, hidden].
inline Sizes sizes_of_cells(const char* op, const Tensor& c) {
  STD_TORCH_CHECK(c.dim() == 5, op, ": c must be [steps, batch, height, width, hidden]");
  const Sizes sizes{c.size(1), c.size(0), c.size(4), c.size(2), c.size(3)};
  STD_TORCH_CHECK(sizes.numel() > 0, op, ": c is empty");
  STD_TORCH_CHECK(sizes.steps <= std::numeric_limits<int32_t>::max() / (sizes.batch * sizes.height * sizes.width), op,
                  ": there must be at most 2^31 - 1 pixels in all steps");
  return sizes;
}

// What backward reads and writes besides the branches' gates; `dc` becomes the gradient of c_0.
template <typename Pass>
void read_gradients(const char* op, const Checker& checker, const Sizes& sizes, const Tensor& c,
                    const OptionalTensor& c_0, const OptionalTensor& dh, const OptionalTensor& dc_n,
                    const OptionalTensor& lengths, const OptionalTensor& dh_0, const Tensor& dc, Pass& backward) {
  const ScalarType half = checker.type(), single = ScalarType::Float;
  const int64_t state_elements = sizes.batch * sizes.height * sizes.width * sizes.hidden;
  backward.c_is_half = c.scalar_type() != single;
  backward.c = checker.read<const void>(c, "c", sizes.numel(), backward.c_is_half ? half : single);
  backward.c_0 = checker.read<const float>(c_0, "c_0", state_elements, single);
  if (dh) {
    STD_TORCH_CHECK(dh->dim() == 4 && dh->numel() == c.numel() && dh->scalar_type() == half, op,
                    ": dh must be [batch, steps, hidden, height * width] of the gates' type");
    backward.dh = dh->data_ptr();
    backward.dh_image = dh->stride(0);
    backward.dh_step = dh->stride(1);
    backward.dh_channel = dh->stride(2);
    backward.dh_pixel = dh->stride(3);
  }
  backward.dc_n = checker.read<const float>(dc_n, "dc_n", state_elements, single);
  if (lengths) backward.lengths = checker.read<const int64_t>(*lengths, "lengths", sizes.batch, ScalarType::Long);
  backward.dh_0 = checker.read<void>(dh_0, "dh_0", state_elements, half);
  backward.dc = checker.read<float>(dc, "dc", state_elements, single);
}

}  // namespace mkconvlstm
