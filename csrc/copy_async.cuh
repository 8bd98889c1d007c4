// Copies from global to shared memory that a thread starts and later waits for, a group at a time, in order.
// Plain C++ finds declarations here; the tests bring what they stand for.
#pragma once

namespace mkconvlstm {

#ifdef __CUDACC__

// kBytes (4, 8 or 16), at multiples of them: the first `there` of them from memory, zeros for the rest.
template <int kBytes>
__device__ void copy_async(void* shared, const void* global, int there = kBytes) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes), "r"(there)
               : "memory");
}

// 16 bytes that no other block of the multiprocessor is likely to read.
__device__ inline void copy_async_streaming(void* shared, const void* global) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}

// Ends a group, which may be empty.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the thread's last kPending groups are there.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

template <int kBytes>
void copy_async(void* shared, const void* global, int there = kBytes);
void copy_async_streaming(void* shared, const void* global);
void end_copy_group();
template <int kPending>
void wait_for_copies();

#endif

}  // namespace mkconvlstm
