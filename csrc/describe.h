// Tensors in words, for errors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mkconvlstm {

std::string shape_string(const int64_t* sizes, size_t count);
const char* type_name(torch::headeronly::ScalarType type);
std::string device_name(const torch::stable::Tensor& tensor);
std::string describe(const torch::stable::Tensor& tensor);  // "[2, 3] float32 on cuda:0"

}  // namespace mkconvlstm
