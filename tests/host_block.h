// A block of CUDA threads on a CPU, for kernels compiled as plain C++: threads are fibers that change places at
// barriers. To be included before the kernels.
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
  unsigned x, y, z;
};

Index threadIdx, blockIdx, gridDim;

constexpr size_t kStackBytes = 1 << 16;

struct Copy {
  void* target;
  const void* source;
  size_t bytes, there;
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
std::function<void()> at_barrier = [] {};

void run_fiber() {
  kernel();
  fibers[threadIdx.x].done = true;
}

[[maybe_unused]] void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

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
    at_barrier();
    for (const Fiber& fiber : fibers) {
      if (fiber.done == fibers[0].done) continue;
      std::fputs("threads of a block disagree on a barrier\n", stderr);
      std::abort();
    }
  }
}

[[maybe_unused]] void run_grid(unsigned threads, const Index& blocks, std::function<void()> step) {
  gridDim = blocks;
  kernel = std::move(step);
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) run_block(threads);
    }
  }
}

}  // namespace

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#include "copy_async.cuh"

// A copy happens at the latest possible moment, and spoils its target from the first.
namespace mkconvlstm {

template <int kBytes>
void copy_async(void* shared, const void* global, int there) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes) std::abort();
  std::memset(shared, 0xff, kBytes);  // NaN
  fibers[threadIdx.x].copies.back().push_back({shared, global, kBytes, static_cast<size_t>(there)});
}

inline void copy_async_streaming(void* shared, const void* global) { copy_async<16>(shared, global, 16); }

inline void end_copy_group() { fibers[threadIdx.x].copies.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = fibers[threadIdx.x].copies;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.target, copy.source, copy.there);
      std::memset(static_cast<char*>(copy.target) + copy.there, 0, copy.bytes - copy.there);
    }
  }
}

}  // namespace mkconvlstm
