// bfloat16 in pairs on a CPU.
#pragma once

#include <cmath>

#include "host_bfloat16.h"

namespace mkconvlstm::sm90 {

template <typename T>
struct HalfMath {
  static uint32_t pack(float low, float high) { return T(low).bits | uint32_t{T(high).bits} << 16; }
  static float tanh(float x) { return std::tanh(x); }
  static float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
};

}  // namespace mkconvlstm::sm90
