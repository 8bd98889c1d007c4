// Matrices in shared memory and their products, by the instructions that sm_80 and everything newer has.
// Plain C++ finds declarations here; the tests bring what they stand for.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mkconvlstm::sm80 {

// Of 16 rows by 32 bytes, as ldmatrix hands it to a warp: rows in two halves, then bytes in two halves.
using Fragment = uint32_t[4];

#ifdef __CUDACC__

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Lane l brings where in shared memory 16 bytes are: row l % 8 of matrix l / 8.
__device__ inline void load_matrices(Fragment& fragment, int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_memory())) + row)
               : "memory");
}

// Floats become TF32, to nearest; half types are left alone.
template <typename T>
__device__ void round_fragment(Fragment& fragment) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (uint32_t& value : fragment) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(value) : "f"(__uint_as_float(value)));
  }
}

#define MKCONVLSTM_MULTIPLY(instruction)                                                                   \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                \
               : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]))

// sums [16, 8] += rows [16, 32 bytes] times columns [8, 32 bytes] transposed. A lane has of sums row lane / 4, columns
// lane % 4 * 2 and the next, and the same of row lane / 4 + 8.
template <typename T>
__device__ void multiply(float (&sums)[4], const Fragment& rows, const uint32_t* columns);

template <>
__device__ inline void multiply<__half>(float (&sums)[4], const Fragment& rows, const uint32_t* columns) {
  MKCONVLSTM_MULTIPLY("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}

template <>
__device__ inline void multiply<__nv_bfloat16>(float (&sums)[4], const Fragment& rows, const uint32_t* columns) {
  MKCONVLSTM_MULTIPLY("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}

template <>
__device__ inline void multiply<float>(float (&sums)[4], const Fragment& rows, const uint32_t* columns) {
  MKCONVLSTM_MULTIPLY("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef MKCONVLSTM_MULTIPLY

#else

unsigned char* shared_memory();
void load_matrices(Fragment& fragment, int row);
template <typename T>
void round_fragment(Fragment&) {}
template <typename T>
void multiply(float (&sums)[4], const Fragment& rows, const uint32_t* columns);

#endif

}  // namespace mkconvlstm::sm80
