// Products on the tensor cores: D [64, N] float32 in registers += A [64, 16] in registers * B [N, 16] in shared memory,
// N = 8, 16, 32 or 64. In a warpgroup, lane l of warp w holds of D: row 16 w + l / 4 (+ 8), columns 8 j + 2 (l % 4) and
// the next, as d[4 j], d[4 j + 1] (and d[4 j + 2], d[4 j + 3]).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mkconvlstm::sm90 {

// B as rows of 128 bytes with the 128-byte swizzle: element (n, k) lies at
// 128 n + ((k / 8) ^ (n % 8)) * 16 + (k % 8) * 2. A descriptor's upper half is the same for all; its lower half counts
// 16 bytes, so that the next 16 columns of B begin at 2 more.
__device__ __forceinline__ uint32_t weights_descriptor(uint32_t address) { return address >> 4 | 1 << 16; }

__device__ __forceinline__ uint64_t whole_descriptor(uint32_t low) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kAtomBytes = 1024;
  return uint64_t{kSwizzle128 | kAtomBytes >> 4} << 32 | low;
}

// registers: how the operands are counted; what follows: the sums.
#define MKCONVLSTM_WGMMA_OF(columns, type, registers, ...)                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64" columns "k16.f32." type "." type " " registers ", 1, 1, 1, 0;" \
               : __VA_ARGS__                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MKCONVLSTM_WGMMA(columns, registers, ...)                 \
  if constexpr (std::is_same_v<T, __half>) {                      \
    MKCONVLSTM_WGMMA_OF(columns, "f16", registers, __VA_ARGS__);  \
  } else {                                                        \
    MKCONVLSTM_WGMMA_OF(columns, "bf16", registers, __VA_ARGS__); \
  }
#define MKCONVLSTM_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MKCONVLSTM_SUMS8(i) MKCONVLSTM_SUMS4(i), MKCONVLSTM_SUMS4(i + 4)
#define MKCONVLSTM_SUMS16(i) MKCONVLSTM_SUMS8(i), MKCONVLSTM_SUMS8(i + 8)
#define MKCONVLSTM_SUMS32(i) MKCONVLSTM_SUMS16(i), MKCONVLSTM_SUMS16(i + 16)

// T: float16 or bfloat16. D has 2 * kSums columns, and B as many rows.
template <typename T, int kSums>
__device__ __forceinline__ void multiply(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kSums == 4 || kSums == 8 || kSums == 16 || kSums == 32, "8, 16, 32 or 64 columns");
  if constexpr (kSums == 4) {
    MKCONVLSTM_WGMMA("n8", "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8", MKCONVLSTM_SUMS4(0));
  } else if constexpr (kSums == 8) {
    MKCONVLSTM_WGMMA("n16", "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12", MKCONVLSTM_SUMS8(0));
  } else if constexpr (kSums == 16) {
    MKCONVLSTM_WGMMA("n32",
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, "
                     "%18, %19}, %20",
                     MKCONVLSTM_SUMS16(0));
  } else {
    MKCONVLSTM_WGMMA("n64",
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
                     "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, "
                     "%34, %35}, %36",
                     MKCONVLSTM_SUMS32(0));
  }
}

#undef MKCONVLSTM_SUMS32
#undef MKCONVLSTM_SUMS16
#undef MKCONVLSTM_SUMS8
#undef MKCONVLSTM_SUMS4
#undef MKCONVLSTM_WGMMA
#undef MKCONVLSTM_WGMMA_OF

// Before the first product after any other instruction touched its registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler takes a product for done once it is issued. After the wait, this keeps it from reading sums, or reusing
// the registers of operands, any earlier.
template <int kRegisters>
__device__ __forceinline__ void pin(float (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void pin(uint32_t (&fragment)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(fragment[i])::"memory");
}

__device__ __forceinline__ void pin(uint32_t (&fragments)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pin(fragments[i]);
}

}  // namespace mkconvlstm::sm90
