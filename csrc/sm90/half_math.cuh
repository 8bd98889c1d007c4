// Half-precision elements in pairs, and functions as exact as they need.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mkconvlstm::sm90 {

template <typename T>
struct HalfMath;

template <>
struct HalfMath<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  // Relative error 2^-11, a quarter of bfloat16's rounding.
  static __device__ __forceinline__ float tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float sigmoid(float x) { return fmaf(tanh(0.5f * x), 0.5f, 0.5f); }
};

template <>
struct HalfMath<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  // Absolute errors near 1e-7. Where the exponential overflows, the quotient is zero, as it should be.
  static __device__ __forceinline__ float sigmoid(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(1.0f + __expf(-x)));
    return y;
  }
  static __device__ __forceinline__ float tanh(float x) { return fmaf(2.0f, sigmoid(2.0f * x), -1.0f); }
};

}  // namespace mkconvlstm::sm90
