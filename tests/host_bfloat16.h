// bfloat16 on a CPU, for kernels compiled as plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

// bfloat16, rounded to nearest even.
struct Brain {
  uint16_t bits;
  Brain() = default;
  explicit Brain(float value) {
    uint32_t whole;
    std::memcpy(&whole, &value, 4);
    if (value != value) whole = 0x7fff0000;  // as the GPU makes it
    bits = static_cast<uint16_t>((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t whole = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &whole, 4);
    return value;
  }
};

}  // namespace
