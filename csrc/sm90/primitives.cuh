// Hopper's instructions in C++: barriers in shared memory, bulk copies, matrix fragments, counters between blocks.
// Addresses in shared memory are 32 bits of the shared window. Every wait ends: after far longer than any step can
// take it traps, so that a mistake is an error and not a hang.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace mkconvlstm::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What the launch asks for.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_if(bool elected, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "setp.ne.u32 elected, %1, 0;\n"
      "@elected mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(barrier),
      "r"(static_cast<uint32_t>(elected))
      : "memory");
}

// The barrier of any block of the cluster, see `in_block`.
__device__ __forceinline__ void arrive_cluster_if(bool elected, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "setp.ne.u32 elected, %1, 0;\n"
      "@elected mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
      "}\n" ::"r"(barrier),
      "r"(static_cast<uint32_t>(elected))
      : "memory");
}

// For consumers: without a limit of its own, whose code the compiler would take for a reason to part the warp's lanes.
// A lane that has nothing else to do, or waits with limits itself until then, watches over them, see `watch`.
__device__ __forceinline__ void wait_watched(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred ready;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
      "@ready bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// Whether a wait would end at once.
__device__ __forceinline__ bool is_complete(uint32_t barrier, uint32_t phase) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}\n"
      : "=r"(complete)
      : "r"(barrier), "r"(phase)
      : "memory");
  return complete != 0;
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred ready, late;\n"
      ".reg .u32 tries;\n"
      "mov.u32 tries, 0;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
      "@ready bra DONE;\n"
      "add.u32 tries, tries, 1;\n"
      "setp.gt.u32 late, tries, 0x4000000;\n"
      "@late trap;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

constexpr uint64_t kLongestTile = 200'000'000;  // nanoseconds, thousands of times what a tile takes, under tools, too

// Traps where the barrier's first phase takes longer than that.
__device__ __forceinline__ void watch(uint32_t barrier, uint64_t nanoseconds) {
  const auto now = [] {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
  };
  const uint64_t begin = now();
  while (!is_complete(barrier, 0)) {
    __nanosleep(1000);
    if (now() - begin > nanoseconds) __trap();
  }
}

__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// To the same place in all blocks of the cluster that `blocks` has a bit of, and to the barriers of each.
__device__ __forceinline__ void copy_bulk_to(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier,
                                             uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}

// A box of a tensor; what lies outside of it is zero. at: its first element, the innermost dimension first.
__device__ __forceinline__ void copy_tensor(uint32_t target, const CUtensorMap* map, const int (&at)[4],
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
}

__device__ __forceinline__ void copy_tensor(uint32_t target, const CUtensorMap* map, const int (&at)[5],
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}

// And back; what lies outside is left out.
__device__ __forceinline__ void store_tensor(const CUtensorMap* map, const int (&at)[5], uint32_t source) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(source), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until this thread's stores of tensors have left shared memory.
__device__ __forceinline__ void wait_sources() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Until they are complete.
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary writes that this thread has seen become visible to bulk copies that follow.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same, of writes to shared memory alone.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// 4 fragments of 64 rows x 16 channels.
__device__ __forceinline__ void load_fragments(uint32_t (&fragments)[4][4], uint32_t address) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices(fragments[k], address ^ (k << 5));
}

// A matrix of 8 x 8 16-bit elements, of whose row l / 4 lane l has elements 2 (l % 4) and the next.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 values;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(address)
               : "memory");
  return values;
}

__device__ __forceinline__ void load_shared(float4& values, uint32_t address) { values = load_shared(address); }

__device__ __forceinline__ void load_shared(float& value, uint32_t address) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_shared(uint2& values, uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(values.x), "=r"(values.y) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

// A value that is the same in all lanes, so that the compiler knows it and computes what follows from it once a warp.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// Named barriers of a part of the block.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void publish(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait_counter(const uint32_t* counter, uint32_t wanted) {
  for (uint32_t tries = 0;; ++tries) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    if (value >= wanted) return;
    if (tries > 1u << 23) __trap();
  }
}

// Elements that other blocks write or read meanwhile: nothing is said of the order of any two.
__device__ __forceinline__ uint4 load_relaxed(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(void* address, uint16_t value) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed(void* address, uint2 values) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(values.x), "r"(values.y) : "memory");
}

// Stores without a branch, around which the compiler would compute each address anew.
#define MKCONVLSTM_STORE_IF(there, store, ...)                                                                  \
  asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %0, 0;\n@there " store "\n}\n" ::"r"(uint32_t{there}), \
               __VA_ARGS__                                                                                      \
               : "memory")

__device__ __forceinline__ void store_if(bool there, void* address, uint16_t value) {
  MKCONVLSTM_STORE_IF(there, "st.global.u16 [%1], %2;", "l"(address), "h"(value));
}

__device__ __forceinline__ void store_if(bool there, void* address, uint2 v) {
  MKCONVLSTM_STORE_IF(there, "st.global.v2.u32 [%1], {%2, %3};", "l"(address), "r"(v.x), "r"(v.y));
}

// Of what is not read again soon.
__device__ __forceinline__ void store_last_if(bool there, void* address, float4 v) {
  MKCONVLSTM_STORE_IF(there, "st.global.cs.v4.f32 [%1], {%2, %3, %4, %5};", "l"(address), "f"(v.x), "f"(v.y), "f"(v.z),
                      "f"(v.w));
}

#undef MKCONVLSTM_STORE_IF

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Where another block of the cluster has what this one has at `address`.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ void load_cluster(float& value, uint32_t address) {
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_cluster(float4& v, uint32_t address) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
}

// All threads of all blocks of the cluster; what each has written in shared memory is there for all.
__device__ __forceinline__ void sync_blocks() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Position in a ring of buffers, and the parity of the phase that it is in.
struct RingPosition {
  int index = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int size) {
    if (++index == size) {
      index = 0;
      phase ^= 1;
    }
  }
};

}  // namespace mkconvlstm::sm90
