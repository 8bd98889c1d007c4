// What both directions have in common where weights stay in shared memory: a window of the image comes in, its products
// with the weights go out as sums.
#pragma once

#include "half_math.cuh"
#include "primitives.cuh"
#include "resident.h"
#include "wgmma.cuh"

namespace mkconvlstm::sm90 {

// Which part of the problem a block has, and which cell of it a thread.
struct ResidentPlace {
  int image, first_y, first_x;   // of the block's pixels
  int group, rank;               // rank: the block's number in its cluster
  int pixel_in_window, channel;  // of the thread's cell: among 64, and among 8
  int y, x, pixel;               // in the image, and in the flattened batch
  bool inside;                   // whether the pixel lies in the image

  __device__ explicit ResidentPlace(const ResidentProblem& problem) {
    rank = blockIdx.x % problem.split;
    const int index = blockIdx.x / problem.split, window = index / problem.groups;
    group = index % problem.groups;
    const int windows = problem.windows_x() * problem.windows_y();
    image = window / windows;
    first_y = window % windows / problem.windows_x() * problem.window_height();
    first_x = window % problem.windows_x() * problem.window_width;
    pixel_in_window = threadIdx.x / kFinishedChannels;
    channel = threadIdx.x % kFinishedChannels;
    y = first_y + pixel_in_window / problem.window_width;
    x = first_x + pixel_in_window % problem.window_width;
    pixel = (image * problem.height + y) * problem.width + x;
    inside = y < problem.height && x < problem.width;
  }
};

// Elements of an exchange buffer say themselves whether they have been written: no counter and no fence is needed. They
// are written by halves or more and read by 16 bytes, which the hardware does not tear within a half.
__device__ __forceinline__ bool has_absent(const uint4& elements) {
  const auto absent = [](uint32_t pair) { return (~pair - 0x00010001u) & pair & 0x80008000u; };  // a half is all ones
  return (absent(elements.x) | absent(elements.y) | absent(elements.z) | absent(elements.w)) != 0;
}

__device__ __forceinline__ uint32_t present(uint32_t pair) {
  const uint32_t low = (pair & 0xffffu) == 0xffffu ? 0x7fffu : pair & 0xffffu;
  const uint32_t high = pair >> 16 == 0xffffu ? 0x7fffu : pair >> 16;
  return high << 16 | low;
}

__device__ __forceinline__ void add_to(float& sum, float value) { sum += value; }

__device__ __forceinline__ void add_to(float4& sum, float4 v) {
  sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
}

// The block, or all of its cluster.
template <int kSplit>
__device__ __forceinline__ void sync_cluster() {
  if constexpr (kSplit == 1) {
    __syncthreads();
  } else {
    sync_blocks();
  }
}

// A block's products. All threads call all of its functions together.
template <typename T, int kColumns, int kSplit>
class ResidentProducts {
 public:
  __device__ ResidentProducts(const ResidentShape& shape, char* memory) : shape_(shape) {
    window_ = shared_address(memory);
    weights_ = window_ + shape.weights_at();
    sums_ = window_ + shape.sums_at();
    units_ = reinterpret_cast<uint32_t*>(memory + shape.units_at());
    pixels_ = reinterpret_cast<int*>(memory + shape.pixels_at());
    boxes_ = reinterpret_cast<int2*>(memory + shape.boxes_at());
    warpgroup_ = uniform(threadIdx.x / 128);
  }

  // Where the window lies. What is outside of the image, or pads a box, is zero from now on.
  __device__ void place(const ResidentProblem& problem, const ResidentPlace& place) {
    for (int row = threadIdx.x; row < shape_.rows; row += kResidentThreads) {
      const int y = place.first_y + row / shape_.pitch - shape_.radius_y;
      const int x = place.first_x + row % shape_.pitch - shape_.radius_x;
      const bool inside = y >= 0 && y < problem.height && x >= 0 && x < problem.width;
      pixels_[row] = inside ? (place.image * problem.height + y) * problem.width + x : -1;
    }
    for (int at = threadIdx.x * 16; at < shape_.weights_at(); at += kResidentThreads * 16)
      store_shared(window_ + at, uint4{});
    const int row = 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 16;
    const int own = row / problem.window_width * shape_.pitch + row % problem.window_width;
    own_row_ = window_ + own * kRowBytes;
  }

  // A kernel's units and their weights: unit first_unit + tap * boxes + b is box first_box + b under that tap. The
  // boxes hold pieces [first_piece, end_piece) of the exchanged rows. weight(column, element, tap): 16 bits of T;
  // elements count from the first box's, taps from the upper left pixel that the products read.
  template <typename Weight>
  __device__ void fill(int first_unit, int first_box, int boxes, int first_piece, int end_piece, int height, int width,
                       Weight weight) {
    const int taps = height * width;
    const int margin = (shape_.radius_y - height / 2) * shape_.pitch + shape_.radius_x - width / 2;
    for (int i = threadIdx.x; i < boxes; i += kResidentThreads) {
      const int piece = first_piece + i * kBoxPieces;
      boxes_[first_box + i] = {piece, max(0, min(kBoxPieces, end_piece - piece))};
    }
    for (int i = threadIdx.x; i < taps * boxes; i += kResidentThreads) {
      const int tap = i / boxes;
      const int row = margin + tap / width * shape_.pitch + tap % width;
      units_[first_unit + i] = (first_box + i % boxes) * shape_.box_bytes() + row * kRowBytes;
    }
    // A warp takes 8 taps of 4 pieces: taps are neighbours where weights come from, pieces where they go. Many of them
    // are on their way at a time.
    constexpr int kAtOnce = 4, kTaps = 8, kPieces = 4;
    const int tap_parts = ceil_quotient(taps, kTaps), piece_parts = boxes * kBoxPieces / kPieces;
    const int count = tap_parts * piece_parts * kColumns * kTaps * kPieces;
    for (int first = threadIdx.x; first < count; first += kAtOnce * kResidentThreads) {
      uint32_t values[kAtOnce][kPieceElements] = {}, targets[kAtOnce] = {};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = first + n * kResidentThreads, part = i / (kTaps * kPieces);
        const int tap = part % tap_parts * kTaps + i % kTaps;
        const int piece = part / tap_parts % piece_parts * kPieces + i / kTaps % kPieces;
        const int column = part / tap_parts / piece_parts;
        if (i >= count || tap >= taps) continue;
        const int unit = first_unit + tap * boxes + piece / kBoxPieces, swizzled = piece % kBoxPieces ^ column % 8;
        targets[n] = weights_ + unit * shape_.unit_bytes() + column * kRowBytes + swizzled * 16;
        if (first_piece + piece >= end_piece) continue;
#pragma unroll
        for (int k = 0; k < kPieceElements; ++k) values[n][k] = weight(column, piece * kPieceElements + k, tap);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const auto pair = [&](int k) { return values[n][k] | values[n][k + 1] << 16; };
        if (targets[n] != 0) store_shared(targets[n], uint4{pair(0), pair(2), pair(4), pair(6)});
      }
    }
  }

  // After the last `fill`: what was written is seen by all threads, and by the tensor cores.
  __device__ void ready() {
    fence_proxy_async();
    __syncthreads();
  }

  // The window of one step. rows: T [pixels, row_bytes]; where it is an exchange buffer, waits for every element.
  __device__ __forceinline__ void gather(const void* rows, int row_bytes, bool exchanged) {
    constexpr int kAtOnce = 6, kRows = kResidentThreads / kBoxPieces;
    const int piece = threadIdx.x % kBoxPieces, first_row = threadIdx.x / kBoxPieces;
    int row = first_row, box = 0;
    while (box < shape_.boxes) {
      const char* sources[kAtOnce];
      uint32_t targets[kAtOnce], wanted = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (box < shape_.boxes && row < shape_.rows) {
          const int pixel = pixels_[row];
          const int2 here = boxes_[box];
          targets[i] = window_ + box * shape_.box_bytes() + row * kRowBytes + ((piece ^ (row & 7)) << 4);
          sources[i] = static_cast<const char*>(rows) + int64_t{pixel} * row_bytes + (here.x + piece) * 16;
          if (pixel >= 0 && piece < here.y) wanted |= 1u << i;
        }
        row += kRows;
        if (row - first_row >= shape_.rows) {
          row = first_row;
          ++box;
        }
      }
      for (uint32_t tries = 0; wanted != 0; ++tries) {
        uint4 elements[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if ((wanted >> i & 1) != 0) elements[i] = load_relaxed(sources[i]);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if ((wanted >> i & 1) == 0 || (exchanged && has_absent(elements[i]))) continue;
          store_shared(targets[i], elements[i]);
          wanted &= ~(1u << i);
        }
        if (tries > 1u << 22) __trap();
      }
    }
    __syncthreads();
  }

  // The sums of all units, each warpgroup's share of them apart. While one unit's products are on their way, the next
  // one's fragments are fetched into the registers that the one before has left.
  __device__ __forceinline__ void multiply_window(int step) {
    const int first = shape_.units * warpgroup_ / kWarpgroups, last = shape_.units * (warpgroup_ + 1) / kWarpgroups;
    float sums[kColumns / 2];
#pragma unroll
    for (float& sum : sums) sum = 0;
    uint32_t even[4][4], odd[4][4];
    if (first < last) load_fragments(even, locate(first));
#pragma unroll 1
    for (int unit = first; unit < last; unit += 2) {
      multiply_unit(sums, even, unit);
      wait_products<1>();
      pin(odd);
      if (unit + 1 == last) break;
      load_fragments(odd, locate(unit + 1));
      multiply_unit(sums, odd, unit + 1);
      wait_products<1>();
      pin(even);
      if (unit + 2 < last) load_fragments(even, locate(unit + 2));
    }
    wait_products<0>();
    pin(sums);
    const int row = 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
    const uint32_t target = sums_of(step, warpgroup_, row, 2 * (threadIdx.x % 4));
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const uint32_t address = target + (i / 2 * 8 + i % 2 * 8 * shape_.sums_pitch()) * 4;
      store_shared(address, float2{sums[2 * i], sums[2 * i + 1]});
    }
    sync_cluster<kSplit>();
  }

  // A thread's sums over everything, of one column or four, always added up in the same order.
  template <typename Sum>
  __device__ __forceinline__ Sum total(int step, int pixel, int column) const {
    Sum parts[kSplit * kWarpgroups];
#pragma unroll
    for (int i = 0; i < kSplit * kWarpgroups; ++i) {
      const uint32_t address = sums_of(step, i % kWarpgroups, pixel, column);
      if constexpr (kSplit == 1) {
        load_shared(parts[i], address);
      } else {
        load_cluster(parts[i], in_block(address, i / kWarpgroups));
      }
    }
    Sum sum = parts[0];
#pragma unroll
    for (int i = 1; i < kSplit * kWarpgroups; ++i) add_to(sum, parts[i]);
    return sum;
  }

 private:
  __device__ __forceinline__ uint32_t sums_of(int step, int warpgroup, int pixel, int column) const {
    const uint32_t base = sums_ + (kSplit == 1 ? 0 : step % 2 * shape_.sums_bytes());
    return base + ((warpgroup * kWindowPixels + pixel) * shape_.sums_pitch() + column) * 4;
  }

  // Where the lane fetches its part of a unit.
  __device__ __forceinline__ uint32_t locate(int unit) const {
    const uint32_t address = own_row_ + units_[unit];
    const uint32_t half = threadIdx.x % 32 / 16;
    return address + ((half ^ (address / kRowBytes & 7)) << 4);
  }

  __device__ __forceinline__ void multiply_unit(float (&sums)[kColumns / 2], const uint32_t (&fragments)[4][4],
                                                int unit) const {
    const uint32_t weights = weights_descriptor(weights_ + unit * shape_.unit_bytes());
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply<T>(sums, fragments[k], whole_descriptor(weights + 2 * k));
    commit_products();
  }

  const ResidentShape& shape_;
  uint32_t window_, weights_, sums_;
  uint32_t* units_;  // where a unit's rows begin in the window, in bytes
  int* pixels_;      // of each row of the window in the flattened batch; -1: outside
  int2* boxes_;      // first piece of an exchanged row, and how many
  int warpgroup_;
  uint32_t own_row_;
};

}  // namespace mkconvlstm::sm90
