// Neighbours in memory that are accessed together.
#pragma once

namespace mkconvlstm {

// kWidth elements, accessed 16 bytes at a time where they fill as much.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T values[kWidth];
};

}  // namespace mkconvlstm
