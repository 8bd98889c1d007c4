// The tensor cores on a CPU. A product is done once it is issued.
#pragma once

#include "host_bfloat16.h"
#include "primitives.cuh"

namespace mkconvlstm::sm90 {

inline uint32_t weights_descriptor(uint32_t address) { return address >> 4; }
inline uint64_t whole_descriptor(uint32_t low) { return low; }

// Element e of a register's two.
inline float element(uint32_t pair, int e) {
  Brain value;
  value.bits = static_cast<uint16_t>(pair >> 16 * e);
  return static_cast<float>(value);
}

// Addresses are swizzled where memory is read: 16 bytes change places by the row of 128 bytes that they lie in.
inline float weight(uint32_t begin, int column, int k) {
  const uint32_t offset = begin + column * 128 + k / 8 * 16 + k % 8 * 2;
  const uint32_t place = offset ^ (offset >> 7 & 7) << 4;
  return element(*shared<uint16_t>(place), 0);
}

template <typename T, int kSums>
void multiply(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  const auto* fragments = bring(a);
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < kSums; ++i) {
    const int row = lane / 4, half = i / 2 % 2, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair = fragments[row * 4 + k % 8 / 2][half + k / 8 * 2];
      d[i] += element(pair, k % 2) * weight(static_cast<uint32_t>(b) << 4, column, k);
    }
  }
}

inline void begin_products() {}
inline void commit_products() {}
template <int kPending>
void wait_products() {}
template <typename Registers>
void pin(Registers&) {}

}  // namespace mkconvlstm::sm90
