// The kernels of the pointwise step: one walk over the elements, one body for each pass.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "gate_step_cuda.h"
#include "vector.cuh"

namespace mkconvlstm {

namespace {

template <typename Scalar>
using accumulate_t = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

struct Position {
  int64_t image;
  uint32_t channel, pixel;
};

template <typename T>
__device__ T* address(const Operand& operand, Position at, int64_t channel_offset = 0) {
  return static_cast<T*>(operand.data) + at.image * operand.batch + (channel_offset + at.channel) * operand.channel +
         at.pixel * operand.pixel;
}

template <typename Accumulate, typename Stored, int kWidth>
__device__ void add(Accumulate (&sum)[kWidth], const Stored* source) {
  const auto vector = *reinterpret_cast<const Vector<Stored, kWidth>*>(source);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum[k] += static_cast<Accumulate>(vector.values[k]);
}

template <typename Accumulate, typename Stored, int kWidth>
__device__ void store(Stored* target, const Accumulate (&values)[kWidth]) {
  Vector<Stored, kWidth> vector;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) vector.values[k] = static_cast<Stored>(values[k]);
  *reinterpret_cast<Vector<Stored, kWidth>*>(target) = vector;
}

// dh_out and dh_rec: absent, or of either type.
template <typename Scalar, typename Accumulate, int kWidth>
__device__ void add_gradient(Accumulate (&sum)[kWidth], const Operand& operand, Position at) {
  if (operand.data == nullptr) return;
  if (operand.wide) {
    add(sum, address<Accumulate>(operand, at));
  } else {
    add(sum, address<Scalar>(operand, at));
  }
}

template <typename Accumulate>
__device__ PeepholeWeights<Accumulate> peephole_weights(const GateStep& step, Position at, int k) {
  if (step.peepholes == Peepholes::kNone) return {};
  at.image = 0;
  const Operand& weights = step.peephole;
  const auto* w = address<const Accumulate>(weights, at) + k * (step.channels_last ? weights.channel : weights.pixel);
  return {w[0], w[weights.batch], w[2 * weights.batch]};
}

template <typename Scalar, int kWidth>
__device__ void advance(const GateStepForward& step, Position at) {
  using Accumulate = accumulate_t<Scalar>;
  Accumulate gates[4][kWidth] = {};
  Accumulate c[kWidth] = {};
  Accumulate h[kWidth];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    const int64_t offset = int64_t{gate} * step.channels;
    add(gates[gate], address<Scalar>(step.z, at, offset));
    if (step.u.data != nullptr) add(gates[gate], address<Scalar>(step.u, at, offset));
  }
  add(c, address<Accumulate>(step.c_prev, at));

#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const CellOutput<Accumulate> cell =
        cell_forward(Gates<Accumulate>{gates[0][k], gates[1][k], gates[2][k], gates[3][k]}, c[k],
                     peephole_weights<Accumulate>(step, at, k), step.peepholes);
    gates[0][k] = cell.gates.i;
    gates[1][k] = cell.gates.f;
    gates[2][k] = cell.gates.g;
    gates[3][k] = cell.gates.o;
    c[k] = cell.c;
    h[k] = cell.h;
  }

#pragma unroll
  for (int gate = 0; gate < 4; ++gate) store(address<Scalar>(step.z, at, int64_t{gate} * step.channels), gates[gate]);
  store(address<Accumulate>(step.c, at), c);
  store(address<Scalar>(step.h, at), h);
}

template <typename Scalar, int kWidth>
__device__ void advance(const GateStepBackward& step, Position at) {
  using Accumulate = accumulate_t<Scalar>;
  Accumulate gates[4][kWidth] = {};
  Accumulate c_prev[kWidth] = {};
  Accumulate c[kWidth] = {};
  Accumulate dh[kWidth] = {};
  Accumulate dc[kWidth] = {};
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) add(gates[gate], address<Scalar>(step.z, at, int64_t{gate} * step.channels));
  add(c_prev, address<Accumulate>(step.c_prev, at));
  add(c, address<Accumulate>(step.c, at));
  add(dc, address<Accumulate>(step.dc, at));
  add_gradient<Scalar>(dh, step.dh_out, at);
  add_gradient<Scalar>(dh, step.dh_rec, at);

#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const CellGradient<Accumulate> gradient =
        cell_backward(Gates<Accumulate>{gates[0][k], gates[1][k], gates[2][k], gates[3][k]}, c_prev[k], c[k], dh[k],
                      dc[k], peephole_weights<Accumulate>(step, at, k), step.peepholes);
    gates[0][k] = gradient.dz.i;
    gates[1][k] = gradient.dz.f;
    gates[2][k] = gradient.dz.g;
    gates[3][k] = gradient.dz.o;
    dc[k] = gradient.dc_prev;
  }

#pragma unroll
  for (int gate = 0; gate < 4; ++gate) store(address<Scalar>(step.z, at, int64_t{gate} * step.channels), gates[gate]);
  store(address<Accumulate>(step.dc, at), dc);
}

// Grid [images, blocks of one image]; each thread takes kWidth neighbours at a time.
template <typename Scalar, int kWidth, typename Step>
__global__ void __launch_bounds__(256) gate_step_kernel(const Step step, const uint32_t vectors_per_image) {
  for (int64_t image = blockIdx.y; image < step.batch; image += gridDim.y) {
    for (uint32_t vector = blockIdx.x * blockDim.x + threadIdx.x; vector < vectors_per_image;
         vector += gridDim.x * blockDim.x) {
      const uint32_t first = vector * kWidth;
      const uint32_t fastest = step.channels_last ? step.channels : step.pixels;
      const uint32_t slow = first / fastest;
      const uint32_t fast = first - slow * fastest;
      advance<Scalar, kWidth>(step, step.channels_last ? Position{image, fast, slow} : Position{image, slow, fast});
    }
  }
}

// Widths are powers of two, up to 16 bytes of the gates.
template <typename Scalar, int kWidth = 16 / sizeof(Scalar), typename Step>
void launch_width(const Step& step, const GateStepPlan& plan, cudaStream_t stream) {
  if (plan.vector_width == kWidth) {
    const dim3 grid(plan.blocks_x, plan.blocks_y);
    gate_step_kernel<Scalar, kWidth>
        <<<grid, plan.threads, 0, stream>>>(step, static_cast<uint32_t>(plan.vectors_per_image));
  } else if constexpr (kWidth > 1) {
    launch_width<Scalar, kWidth / 2>(step, plan, stream);
  }
}

template <typename Step>
void launch_dtype(const Step& step, const GateStepPlan& plan, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat64:
      return launch_width<double>(step, plan, stream);
    case DType::kFloat32:
      return launch_width<float>(step, plan, stream);
    case DType::kFloat16:
      return launch_width<__half>(step, plan, stream);
    case DType::kBFloat16:
      return launch_width<__nv_bfloat16>(step, plan, stream);
  }
}

}  // namespace

void launch(const GateStepForward& step, const GateStepPlan& plan, DType dtype, cudaStream_t stream) {
  launch_dtype(step, plan, dtype, stream);
}

void launch(const GateStepBackward& step, const GateStepPlan& plan, DType dtype, cudaStream_t stream) {
  launch_dtype(step, plan, dtype, stream);
}

}  // namespace mkconvlstm
