// Products on the tensor cores: D [64, 64] float32 in registers += A [64, 16] in registers * B [64, 16] in shared
// memory. In a warpgroup, lane l of warp w holds of D: row 16 w + l / 4 (+ 8), columns 8 j + 2 (l % 4) and the next, as
// d[4 j], d[4 j + 1] (and d[4 j + 2], d[4 j + 3]).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mkconvlstm::sm90 {

// B as 64 rows of 128 bytes with the 128-byte swizzle: element (n, k) lies at
// 128 n + ((k / 8) ^ (n % 8)) * 16 + (k % 8) * 2. A descriptor's upper half is the same for all; its lower half counts
// 16 bytes, so that the next 16 columns of B begin at 2 more.
__device__ __forceinline__ uint32_t weights_descriptor(uint32_t address) { return address >> 4 | 1 << 16; }

__device__ __forceinline__ uint64_t whole_descriptor(uint32_t low) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kAtomBytes = 1024;
  return uint64_t{kSwizzle128 | kAtomBytes >> 4} << 32 | low;
}

#define MKCONVLSTM_WGMMA(type)                                                                                      \
  asm volatile(                                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "                                                             \
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "  \
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                                                      \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b);

template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  MKCONVLSTM_WGMMA("bf16");
}

template <>
__device__ __forceinline__ void multiply<__half>(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  MKCONVLSTM_WGMMA("f16");
}

#undef MKCONVLSTM_WGMMA

// Before the first product after any other instruction touched its registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler takes a product for done once it is issued. After the wait, this keeps it from reading sums, or reusing
// the registers of operands, any earlier.
__device__ __forceinline__ void pin(float (&registers)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Computed here and not later.
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

__device__ __forceinline__ void pin(uint32_t (&fragment)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(fragment[i])::"memory");
}

}  // namespace mkconvlstm::sm90
