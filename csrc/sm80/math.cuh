// How the tensor-core kernels compute a cell's functions: as exactly as their elements need.
#pragma once

#include "../gates.cuh"

#ifdef __CUDACC__
#include "../sm90/half_math.cuh"
#endif

namespace mkconvlstm::sm80 {

template <typename T>
struct MathOf {
  using type = StandardMath;
};

#ifdef __CUDACC__
template <>
struct MathOf<__half> {
  using type = sm90::HalfMath<__half>;
};
template <>
struct MathOf<__nv_bfloat16> {
  using type = sm90::HalfMath<__nv_bfloat16>;
};
#endif

template <typename T>
using Math = typename MathOf<T>::type;

}  // namespace mkconvlstm::sm80
