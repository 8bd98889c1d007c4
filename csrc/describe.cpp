#include "describe.h"

#include <sstream>

namespace mkconvlstm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

std::string describe(const Tensor& tensor) {
  return shape_string(tensor.sizes().data(), tensor.sizes().size()) + " " + type_name(tensor.scalar_type()) + " on " +
         device_name(tensor);
}

}  // namespace mkconvlstm
