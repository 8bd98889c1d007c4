// The SIMT kernels on a CPU, for test_simt.py.
#include "host_block.h"
#include "simt/backward.cuh"
#include "simt/forward.cuh"
#include "step_host.h"

namespace {

using namespace simt;

template <int kPixels, typename Scalar>
void run_kernel(const Index& blocks, const Forward<Scalar>& p, int64_t t) {
  run_grid(kThreads, blocks, [&] { forward_kernel<Scalar, kPixels>(p, t); });
}

template <int kPixels, typename Scalar>
void run_kernel(const Index& blocks, const Backward<Scalar>& p, int64_t t) {
  run_grid(kThreads, blocks, [&] { backward_kernel<Scalar, kPixels>(p, t); });
}

template <typename Params>
void run_step(const Sizes& sizes, const Params& p, int64_t t) {
  const Index blocks{static_cast<unsigned>(sizes.blocks_x), static_cast<unsigned>(sizes.blocks_y), 1};
  switch (sizes.family[0]) {
    case 8:
      return run_kernel<8>(blocks, p, t);
    case 4:
      return run_kernel<4>(blocks, p, t);
    case 2:
      return run_kernel<2>(blocks, p, t);
    default:
      std::abort();
  }
}

template <typename Function>
void with_scalar(int64_t bytes, Function function) {
  bytes == 8 ? function(double()) : function(float());
}

}  // namespace

extern "C" void simt_forward(int64_t bytes, const Sizes* sizes, const int64_t* branches, void** gates, void** weights,
                             void** operands) {
  with_scalar(bytes, [&](auto scalar) {
    run_forward<decltype(scalar)>(*sizes, branches, gates, weights, operands,
                                  [&](const auto& p, int64_t t) { run_step(*sizes, p, t); });
  });
}

extern "C" void simt_backward(int64_t bytes, const Sizes* sizes, const int64_t* branches, void** gates, void** weights,
                              void** operands, const int64_t* dh_strides) {
  with_scalar(bytes, [&](auto scalar) {
    run_backward<decltype(scalar)>(*sizes, branches, gates, weights, operands, dh_strides,
                                   [&](const auto& p, int64_t t) { run_step(*sizes, p, t); });
  });
}
