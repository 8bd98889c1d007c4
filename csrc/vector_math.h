// exp and tanh of floats, to about an ulp, in arithmetic and selects alone: a loop around them becomes vector code,
// which a call into libm would forbid. doubles take libm's, one by one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "gates.cuh"

namespace mkconvlstm {

struct VectorMath {
  template <typename T>
  static MKCONVLSTM_INLINE T sigmoid(T x) {
    return T(1) / (T(1) + exp(-x));
  }

  static MKCONVLSTM_INLINE double exp(double x) { return std::exp(x); }
  static MKCONVLSTM_INLINE double tanh(double x) { return std::tanh(x); }

  // exp(x) = 2^n exp(r) with |r| <= ln(2) / 2. Infinity above 88.4, at least the smallest normal number; NaN stays NaN.
  static MKCONVLSTM_INLINE float exp(float x) {
    constexpr float kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860682e-6f;  // n * kLn2High is exact
    constexpr float kRound = 12582912.f;                                // 1.5 * 2^23: integers are one ulp apart there
    x = x > 89.f ? 89.f : x;
    x = x < -87.3f ? -87.3f : x;
    const float rounded = x * kLog2E + kRound;
    const float n = rounded - kRound;
    const float r = (x - n * kLn2High) - n * kLn2Low;

    // (exp(r) - 1 - r) / r^2, minimax in exp's relative error: 3.3e-9
    float p = 1.3813143e-3f;
    p = p * r + 8.3694188e-3f;
    p = p * r + 4.1668457e-2f;
    p = p * r + 1.6666515e-1f;
    p = p * r + 4.9999993e-1f;
    p = p * (r * r) + r + 1.f;

    int32_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    constexpr int32_t kRoundBits = 0x4b400000, kBias = 127;  // bits - kRoundBits = n
    const uint32_t scale_bits = static_cast<uint32_t>(bits - kRoundBits + kBias) << 23;
    float scale;
    std::memcpy(&scale, &scale_bits, sizeof(scale));
    return p * scale;
  }

  // 1 - 2 / (exp(2|x|) + 1) loses digits near zero; there an odd polynomial.
  static MKCONVLSTM_INLINE float tanh(float x) {
    const float size = std::fabs(x);
    const float far = 1.f - 2.f / (exp(2.f * size) + 1.f);

    // (tanh(x) / x - 1) / x^2, minimax in tanh's relative error for |x| <= 0.625: 4.4e-9
    const float z = x * x;
    float q = -5.7049863e-3f;
    q = q * z + 2.0639087e-2f;
    q = q * z - 5.3739715e-2f;
    q = q * z + 1.3331442e-1f;
    q = q * z - 3.3333282e-1f;
    const float near = size + size * (z * q);
    return std::copysign(size < 0.625f ? near : far, x);
  }
};

}  // namespace mkconvlstm
