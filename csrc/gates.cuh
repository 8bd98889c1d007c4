// The cell's mathematics, forward and backward, for one hidden channel at one pixel.
// Every kernel calls these functions; they also compile as plain C++, where the tests check them.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define MKCONVLSTM_INLINE __host__ __device__ __forceinline__
#else
#define MKCONVLSTM_INLINE inline __attribute__((always_inline))  // or no loop around it becomes vector code
#endif

namespace mkconvlstm {

enum class Peepholes {
  kNone,
  kPreviousOutput,  // the output gate sees c_{t-1}: the paper's equation 8
  kCurrentOutput,   // the output gate sees c_t: Shi et al. 2015
};

// T is the type that the cell computes in: float, or double for float64 tensors.

template <typename T>
struct Gates {
  T i, f, g, o;
};

template <typename T>
struct PeepholeWeights {
  T i, f, o;
};

template <typename T>
struct CellOutput {
  Gates<T> gates;  // activated
  T c, h;
};

template <typename T>
struct CellGradient {
  Gates<T> dz;
  T dc_prev;
};

// exp(-x) may overflow to infinity; the quotient is then zero, as it should be.
template <typename T>
MKCONVLSTM_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

// How a cell computes its functions; a caller may bring faster ones.
struct StandardMath {
  template <typename T>
  static MKCONVLSTM_INLINE T sigmoid(T x) {
    return mkconvlstm::sigmoid(x);
  }
  template <typename T>
  static MKCONVLSTM_INLINE T tanh(T x) {
    return std::tanh(x);
  }
};

// z: pre-activations. Without peepholes w is not read into the result, so an infinite c_prev stays harmless.
template <typename T, typename Math = StandardMath>
MKCONVLSTM_INLINE CellOutput<T> cell_forward(Gates<T> z, T c_prev, PeepholeWeights<T> w, Peepholes peepholes) {
  if (peepholes != Peepholes::kNone) {
    z.i += w.i * c_prev;
    z.f += w.f * c_prev;
  }
  const T i = Math::sigmoid(z.i);
  const T f = Math::sigmoid(z.f);
  const T g = Math::tanh(z.g);
  const T c = f * c_prev + i * g;

  if (peepholes != Peepholes::kNone) z.o += w.o * (peepholes == Peepholes::kCurrentOutput ? c : c_prev);
  const T o = Math::sigmoid(z.o);
  return {{i, f, g, o}, c, o * Math::tanh(c)};
}

// gates: activated. dh: dL/dh_t from everywhere. dc: dL/dc_t from step t+1 alone; what reaches c_t through h_t and
// through a peephole of this step is added here. Peephole weights get sum(dz * c), over time at once, elsewhere.
template <typename T, typename Math = StandardMath>
MKCONVLSTM_INLINE CellGradient<T> cell_backward(Gates<T> gates, T c_prev, T c, T dh, T dc, PeepholeWeights<T> w,
                                                Peepholes peepholes) {
  const auto [i, f, g, o] = gates;
  const T tanh_c = Math::tanh(c);

  Gates<T> dz;
  dz.o = dh * tanh_c * o * (T(1) - o);
  dc += dh * o * (T(1) - tanh_c * tanh_c);
  if (peepholes == Peepholes::kCurrentOutput) dc += dz.o * w.o;

  dz.i = dc * g * i * (T(1) - i);
  dz.f = dc * c_prev * f * (T(1) - f);
  dz.g = dc * i * (T(1) - g * g);

  T dc_prev = dc * f;
  if (peepholes != Peepholes::kNone) dc_prev += dz.i * w.i + dz.f * w.f;
  if (peepholes == Peepholes::kPreviousOutput) dc_prev += dz.o * w.o;
  return {dz, dc_prev};
}

}  // namespace mkconvlstm
