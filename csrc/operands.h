// From an operation's tensors to the pointwise steps of its parts, every argument checked on the way.
// Only torch's stable ABI, so that one library serves every torch that the package supports.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "gate_step.h"
#include "plan.h"

namespace mkconvlstm {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

// One step for each hidden branch ("part"), on channels of h and c that no other part touches.
template <typename Step>
struct GateSteps {
  std::vector<Step> parts;
  int64_t height, width;
  DType dtype;
  PeepholeShape peephole;
};

// The arguments of gate_step_forward and gate_step_backward; the schema in library.py says what they are.
// Throw what STD_TORCH_CHECK throws where one of them is wrong, or not on a device of that type.
GateSteps<GateStepForward> read_forward(torch::headeronly::DeviceType device, const TensorList& z, const TensorList& u,
                                        const Tensor& c_prev, const Tensor& h, const Tensor& c,
                                        const OptionalTensor& peephole, bool current_output_peephole);
GateSteps<GateStepBackward> read_backward(torch::headeronly::DeviceType device, const TensorList& gates,
                                          const OptionalTensor& dh, const OptionalTensor& dh_prev, const Tensor& dc,
                                          const Tensor& c_prev, const Tensor& c, const OptionalTensor& peephole,
                                          bool current_output_peephole);

}  // namespace mkconvlstm
