// The SIMT kernels on a CPU, for test_simt.py: a block's threads are fibers that change places at barriers.
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace {

struct Index {
  unsigned x, y;
};

Index threadIdx, blockIdx;

constexpr size_t kStackBytes = 1 << 16;

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  bool is_there;
};

struct Fiber {
  ucontext_t context;
  std::deque<std::vector<Copy>> copies;  // groups, the last of them not ended yet
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
std::function<void()> kernel;

void run_fiber() {
  kernel();
  fibers[threadIdx.x].done = true;
}

void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

// From barrier to barrier, every other time backwards, so that a missing barrier shows.
void run_block(unsigned threads) {
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    fiber.copies.assign(1, {});
    fiber.done = false;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool backwards = false; !fibers[0].done; backwards = !backwards) {
    for (unsigned k = 0; k < threads; ++k) {
      threadIdx.x = backwards ? threads - 1 - k : k;
      if (fibers[threadIdx.x].done) std::abort();
      swapcontext(&scheduler, &fibers[threadIdx.x].context);
    }
    for (const Fiber& fiber : fibers) {
      if (fiber.done == fibers[0].done) continue;
      std::fputs("threads of a block disagree on a barrier\n", stderr);
      std::abort();
    }
  }
}

}  // namespace

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static
#include "simt/backward.cuh"
#include "simt/forward.cuh"

// A copy happens at the latest possible moment, and spoils its target from the first.
namespace mkconvlstm::simt {

template <int kBytes>
void copy_async(void* shared, const void* global, bool is_there) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes) std::abort();
  std::memset(shared, 0xff, kBytes);  // NaN
  fibers[threadIdx.x].copies.back().push_back({shared, global, kBytes, is_there});
}

void end_copy_group() { fibers[threadIdx.x].copies.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = fibers[threadIdx.x].copies;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.is_there) std::memcpy(copy.target, copy.source, copy.bytes);
      if (!copy.is_there) std::memset(copy.target, 0, copy.bytes);
    }
  }
}

}  // namespace mkconvlstm::simt

namespace {

using namespace mkconvlstm;
using namespace mkconvlstm::simt;

// Integers of a call, as test_simt.py lists them.
struct Sizes {
  int64_t steps, batch, height, width, hidden, branches, peepholes, peephole_pixels, keep;
  int64_t pixels_per_thread, blocks_x, blocks_y;
};

template <typename Scalar>
void fill(Sequence<Scalar>& s, const Sizes& sizes, const int64_t* branches, void** gates, void** weights) {
  s.steps = sizes.steps;
  s.pixels = sizes.batch * sizes.height * sizes.width;
  s.height = sizes.height;
  s.width = sizes.width;
  s.hidden = sizes.hidden;
  s.branch_count = sizes.branches;
  for (int r = 0; r < s.branch_count; ++r, branches += 7) {
    s.branches[r] = {static_cast<Scalar*>(gates[r]),     static_cast<Scalar*>(weights[r]),
                     static_cast<int>(branches[0]),      static_cast<int>(branches[1]),
                     static_cast<int>(branches[2]),      static_cast<int>(branches[3]),
                     static_cast<int>(branches[4]),      static_cast<int>(branches[5]),
                     static_cast<unsigned>(branches[6])};
  }
  s.c_step = sizes.keep ? int64_t{s.pixels} * s.hidden : 0;
  s.peepholes = static_cast<Peepholes>(sizes.peepholes);
  s.peephole_pixels = sizes.peephole_pixels;
}

template <typename Step>
void run_grid(const Sizes& sizes, Step step) {
  for (blockIdx.y = 0; blockIdx.y < sizes.blocks_y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < sizes.blocks_x; ++blockIdx.x) {
      kernel = step;
      run_block(kThreads);
    }
  }
}

template <int kPixels, typename Scalar>
void run_kernel(const Sizes& sizes, const Forward<Scalar>& p, int64_t t) {
  run_grid(sizes, [&] { forward_kernel<Scalar, kPixels>(p, t); });
}

template <int kPixels, typename Scalar>
void run_kernel(const Sizes& sizes, const Backward<Scalar>& p, int64_t t) {
  run_grid(sizes, [&] { backward_kernel<Scalar, kPixels>(p, t); });
}

template <typename Params>
void run_step(const Sizes& sizes, const Params& p, int64_t t) {
  switch (sizes.pixels_per_thread) {
    case 8:
      return run_kernel<8>(sizes, p, t);
    case 4:
      return run_kernel<4>(sizes, p, t);
    case 2:
      return run_kernel<2>(sizes, p, t);
    default:
      std::abort();
  }
}

template <typename Scalar>
void forward(const Sizes& sizes, const int64_t* branches, void** gates, void** weights, void** operands) {
  Forward<Scalar> p{};
  fill(p, sizes, branches, gates, weights);
  p.keep_gates = sizes.keep;
  p.h_0 = static_cast<Scalar*>(operands[0]);
  p.c_0 = static_cast<Scalar*>(operands[1]);
  p.bias = static_cast<Scalar*>(operands[2]);
  p.peephole = static_cast<Scalar*>(operands[3]);
  p.state = static_cast<Scalar*>(operands[4]);
  p.h = static_cast<Scalar*>(operands[5]);
  p.c = static_cast<Scalar*>(operands[6]);
  for (int64_t t = 0; t < p.steps; ++t) run_step(sizes, p, t);
}

template <typename Scalar>
void backward(const Sizes& sizes, const int64_t* branches, void** gates, void** weights, void** operands,
              const int64_t* dh_strides) {
  Backward<Scalar> p{};
  fill(p, sizes, branches, gates, weights);
  p.c_0 = static_cast<Scalar*>(operands[0]);
  p.c = static_cast<Scalar*>(operands[1]);
  p.peephole = static_cast<Scalar*>(operands[2]);
  p.dh = static_cast<Scalar*>(operands[3]);
  p.dc_n = static_cast<Scalar*>(operands[4]);
  p.lengths = static_cast<int64_t*>(operands[5]);
  p.dh_0 = static_cast<Scalar*>(operands[6]);
  p.dc = static_cast<Scalar*>(operands[7]);
  p.dh_image = dh_strides[0], p.dh_step = dh_strides[1], p.dh_channel = dh_strides[2];
  p.dh_row = dh_strides[3], p.dh_column = dh_strides[4];
  for (int64_t t = p.steps - 1; t >= (p.dh_0 == nullptr ? 0 : -1); --t) run_step(sizes, p, t);
}

}  // namespace

extern "C" void simt_forward(bool is_double, const Sizes* sizes, const int64_t* branches, void** gates, void** weights,
                             void** operands) {
  is_double ? forward<double>(*sizes, branches, gates, weights, operands)
            : forward<float>(*sizes, branches, gates, weights, operands);
}

extern "C" void simt_backward(bool is_double, const Sizes* sizes, const int64_t* branches, void** gates, void** weights,
                              void** operands, const int64_t* dh_strides) {
  is_double ? backward<double>(*sizes, branches, gates, weights, operands, dh_strides)
            : backward<float>(*sizes, branches, gates, weights, operands, dh_strides);
}
