// Hopper's instructions on a CPU, those that kernels with resident weights have.
#pragma once

#include "host_grid.h"

namespace mkconvlstm::sm90 {

inline char* shared_memory() { return block().memory; }

inline uint32_t shared_address(const void* pointer) {
  return kSharedBegin + static_cast<uint32_t>(static_cast<const char*>(pointer) - block().memory);
}

inline void fence_proxy_async() {}
inline int uniform(int value) { return value; }

// Lane l brings where row l % 8 of matrix l / 8 lies, and takes 4 bytes of row l / 4 of each matrix.
inline void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
  const auto* addresses = bring({address});
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t row = addresses[matrix * 8 + threadIdx.x % kWarp / 4][0];
    if (row % 16 != 0) __trap();
    fragment[matrix] = *shared<uint32_t>(row + threadIdx.x % 4 * 4);
  }
}

inline void load_fragments(uint32_t (&fragments)[4][4], uint32_t address) {
  for (int k = 0; k < 4; ++k) load_matrices(fragments[k], address ^ (k << 5));
}

template <typename Value>
void load_shared(Value& value, uint32_t address) {
  value = *shared<Value>(address);
}

template <typename Value>
void store_shared(uint32_t address, Value value) {
  *shared<Value>(address) = value;
}

inline uint32_t in_block(uint32_t address, int rank) {
  return address | (blockIdx.x / cluster_blocks * cluster_blocks + rank + 1) << kBlockShift;
}

template <typename Value>
void load_cluster(Value& value, uint32_t address) {
  value = *shared<Value>(address);
}

inline void sync_blocks() { sync_cluster_blocks(); }

template <typename Value>
void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(Value) != 0) __trap();
}

// Others run first, so that what they have not written yet is not there.
inline uint4 load_relaxed(const void* address) {
  check_aligned<uint4>(address);
  let_others_run();
  return *static_cast<const uint4*>(address);
}

template <typename Value>
void store_relaxed(void* address, Value value) {
  check_aligned<Value>(address);
  std::memcpy(address, &value, sizeof(Value));
}

}  // namespace mkconvlstm::sm90
