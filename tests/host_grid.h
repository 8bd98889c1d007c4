// All blocks of a CUDA launch at once on a CPU, for kernels whose blocks wait for each other: threads are fibers that
// change places wherever they wait. To be included before the kernels.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace {

using std::max;
using std::min;

struct Index {
  unsigned x;
};

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

Index threadIdx, blockIdx;

constexpr int kBlockThreads = 512, kWarp = 32;
constexpr size_t kSharedBytes = 232448, kStackBytes = 1 << 16;
constexpr uint32_t kSharedBegin = 4096, kBlockShift = 20;  // an address: the block's number plus one, then its byte

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
};

struct Barrier {
  int arrived = 0, phase = 0;
};

// What the lanes of a warp bring to an instruction that they carry out together; two in turn.
struct Warp {
  Barrier barrier;
  uint32_t brought[2][kWarp][4];
};

struct Block {
  char* memory;
  Barrier barrier;
  Warp warps[kBlockThreads / kWarp];
  int instructions[kBlockThreads] = {};  // that each lane has had
};

std::vector<Fiber> fibers;
std::vector<Block> blocks;
std::vector<Barrier> clusters;
int cluster_blocks;
ucontext_t scheduler;
std::function<void()> kernel;

size_t fiber_index() { return size_t{blockIdx.x} * kBlockThreads + threadIdx.x; }
Block& block() { return blocks[blockIdx.x]; }

void let_others_run() { swapcontext(&fibers[fiber_index()].context, &scheduler); }

void arrive_and_wait(Barrier& barrier, int threads) {
  const int phase = barrier.phase;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  while (barrier.phase == phase) let_others_run();
}

void __syncthreads() { arrive_and_wait(block().barrier, kBlockThreads); }
void __syncwarp() {}
void sync_cluster_blocks() { arrive_and_wait(clusters[blockIdx.x / cluster_blocks], kBlockThreads * cluster_blocks); }

[[noreturn]] void __trap() {
  std::fputs("trap\n", stderr);
  std::abort();
}

// What all lanes of this warp bring.
uint32_t (*bring(const uint32_t (&mine)[4]))[4] {
  Warp& warp = block().warps[threadIdx.x / kWarp];
  auto& brought = warp.brought[block().instructions[threadIdx.x]++ % 2];
  std::memcpy(brought[threadIdx.x % kWarp], mine, sizeof(mine));
  arrive_and_wait(warp.barrier, kWarp);
  return brought;
}

// Shared memory of this block, or of another one by an address that says so.
template <typename Value>
Value* shared(uint32_t address) {
  const Block& owner = address >> kBlockShift == 0 ? block() : blocks[(address >> kBlockShift) - 1];
  const uint32_t offset = (address & ((1u << kBlockShift) - 1)) - kSharedBegin;
  if (offset % alignof(Value) != 0 || offset > kSharedBytes - sizeof(Value)) __trap();
  return reinterpret_cast<Value*>(owner.memory + offset);
}

void run_fiber() {
  kernel();
  fibers[fiber_index()].done = true;
}

// Every other time backwards, so that a missing barrier shows. Memory begins as NaN.
[[maybe_unused]] void run_grid(int count, int cluster, std::function<void()> body) {
  kernel = std::move(body);
  cluster_blocks = cluster;
  fibers.clear();
  fibers.resize(size_t(count) * kBlockThreads);
  blocks.assign(count, {});
  clusters.assign(count / cluster, {});
  for (Block& b : blocks) {
    b.memory = static_cast<char*>(std::aligned_alloc(1024, kSharedBytes));
    std::memset(b.memory, 0xff, kSharedBytes);
  }
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  bool running = true;
  for (bool backwards = false; running; backwards = !backwards) {
    running = false;
    for (size_t k = 0; k < fibers.size(); ++k) {
      const size_t index = backwards ? fibers.size() - 1 - k : k;
      if (fibers[index].done) continue;
      running = true;
      blockIdx.x = index / kBlockThreads;
      threadIdx.x = index % kBlockThreads;
      swapcontext(&scheduler, &fibers[index].context);
    }
  }
  for (Block& b : blocks) std::free(b.memory);
}

}  // namespace
