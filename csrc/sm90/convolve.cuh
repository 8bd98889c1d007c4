// The products of a tile: one warp streams packed weights, one loads boxes of images, two warpgroups multiply.
#pragma once

#include <cstddef>
#include <type_traits>

#include "images.h"
#include "primitives.cuh"
#include "program.h"
#include "wgmma.cuh"

namespace mkconvlstm::sm90 {

constexpr int kProducerWarps = 4;

__device__ __forceinline__ int rank_in_pair() { return blockIdx.x % kPair; }

// Where everything lies in shared memory.
struct SharedMemory {
  uint32_t boxes, zeros, stages, stage_full, stage_empty, box_full, box_empty, finished;
  uint32_t mate_empty;  // stage_empty of the block of the pair that this lane tells
  int box_bytes;

  __device__ SharedMemory(const Program& program, const void* base) {
    box_bytes = program.box_chunks * program.chunk_rows * kRowBytes;
    boxes = shared_address(base);
    zeros = boxes + program.box_slots * box_bytes;
    stages = zeros + kZeroBytes;
    stage_full = stages + program.stages * kStageBytes;
    stage_empty = stage_full + 8 * kMaxStages;
    mate_empty = in_block(stage_empty, threadIdx.x % kPair);
    box_full = stage_empty + 8 * kMaxStages;
    box_empty = box_full + 8 * kMaxBoxes;
    finished = box_empty + 8 * kMaxBoxes;
  }

  // By all threads, before they part.
  __device__ void init(const Program& program, void* base) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < program.stages; ++i) {
        init_barrier(stage_full + 8 * i, 1);
        init_barrier(stage_empty + 8 * i, kPair * 4 * kConsumers);
      }
      for (int i = 0; i < program.box_slots; ++i) {
        init_barrier(box_full + 8 * i, 1);
        init_barrier(box_empty + 8 * i, 4 * kConsumers);
      }
      init_barrier(finished, 4 * kConsumers);
      fence_barrier_init();
    }
    if (threadIdx.x < kZeroBytes / 16)
      reinterpret_cast<uint4*>(static_cast<char*>(base) + (zeros - boxes))[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncwarp();
    sync_blocks();
  }
};

// What pairs of blocks do: so many items a step, dealt to them in turn. With a period that the pairs divide, each has
// the same items at every step; with one of `items` what is left over falls to other pairs at each, so that in the end
// none has more to do than another.
template <typename Body>
__device__ __forceinline__ void deal(int steps, int items, int period, Body body) {
  int step = 0;
#pragma unroll 1
  for (int item = blockIdx.x / kPair;; item += gridDim.x / kPair) {
    if (item >= period) {
      item -= period;
      ++step;
    }
    if (step >= steps) return;
    if (item < items) body(step, item);
  }
}

// One lane: so many stages of packed weights. Each block fetches its share of a stage, for all of the pair.
__device__ __forceinline__ void stream_weights(const Program& program, const SharedMemory& shared, const char* packed,
                                               int stages, RingPosition& ring) {
  constexpr int kShare = kStageBytes / kPair;
  const int first = rank_in_pair() * kShare;
  for (int stage = 0; stage < stages; ++stage) {
    wait(shared.stage_empty + 8 * ring.index, ring.phase ^ 1);  // in both blocks
    expect_bytes(shared.stage_full + 8 * ring.index, kStageBytes);
    copy_bulk_to(shared.stages + ring.index * kStageBytes + first, packed + int64_t{stage} * kStageBytes + first,
                 kShare, shared.stage_full + 8 * ring.index, (1 << kPair) - 1);
    ring.advance(program.stages);
  }
}

// One lane: a box of rows [row, row + 128 + 2 * halo) of an operand; what lies outside of it is zero.
__device__ __forceinline__ void load_box(const Program& program, const SharedMemory& shared, const CUtensorMap* map,
                                         int channel, int row, int slot) {
  const uint32_t barrier = shared.box_full + 8 * slot;
  expect_bytes(barrier, shared.box_bytes);
  for (int chunk = 0; chunk < program.box_chunks; ++chunk) {
    copy_tensor(shared.boxes + slot * shared.box_bytes + chunk * program.chunk_rows * kRowBytes, map, channel,
                row + chunk * program.chunk_rows, barrier);
  }
}

// The tiles whose pixels the taps of a tile touch.
struct Neighbours {
  int first_row;  // of the tile's boxes, in the flattened batch
  int first, last;

  __device__ Neighbours(const Program& program, int tile, int tiles) {
    first_row = tile * kTileRows - program.halo;
    first = max(0, first_row) / kTileRows;
    last = min(tiles - 1, (first_row + kTileRows - 1 + 2 * program.halo) / kTileRows);
  }
};

// The row of the tile whose operand a lane fetches, and which of its neighbours lie inside the image.
struct FragmentRow {
  int row;        // in a box
  uint32_t half;  // which 8 of 16 channels
  uint32_t y_inside = 0, x_inside = 0;

  __device__ FragmentRow(const Program& program, int warp) {
    const int lane = threadIdx.x % 32;
    row = program.halo + 16 * warp + lane % 16;
    half = lane / 16;
  }

  // pixel: the lane's own in the flattened batch; beyond the last one nothing is inside.
  __device__ void place(const Program& program, int pixel, int pixels, const Images& images) {
    const Images::Place at = images.place(pixel);
    y_inside = pixel < pixels ? inside(at.y, images.height.value, program.radius_y) : 0;
    x_inside = inside(at.x, images.width.value, program.radius_x);
  }

 private:
  // Bits [first, last] of positions -radius ... radius that stay within [0, size).
  static __device__ uint32_t inside(int position, int size, int radius) {
    const int first = max(0, radius - position), last = min(2 * radius, radius + size - 1 - position);
    return (2u << last) - (1u << first);
  }
};

// Boxes in shared memory, as the tiles' loads go round its slots.
struct BoxRing {
  int first = 0;  // the slot of this tile's first box
  uint32_t phase = 0;

  __device__ __forceinline__ BoxRing at(const Program& program, int boxes) const {
    BoxRing ring{first + boxes, phase};
    while (ring.first >= program.box_slots) {
      ring.first -= program.box_slots;
      ring.phase ^= 1;
    }
    return ring;
  }
};

// The fragments of half a unit, 2 of 64 rows x 16 channels.
template <int kHalf>
__device__ __forceinline__ void load_half(uint32_t (&fragments)[4][4], uint32_t address) {
#pragma unroll
  for (int k = 2 * kHalf; k < 2 * kHalf + 2; ++k) {
    pin(fragments[k]);
    load_matrices(fragments[k], address ^ (k << 5));
  }
}

// Half of a unit's products: 32 channels of its box.
template <Columns kColumns, int kHalf, typename T>
__device__ __forceinline__ void multiply_half(float (&first)[32], float (&second)[32],
                                              const uint32_t (&fragments)[4][4], uint32_t weights) {
  begin_products();
#pragma unroll
  for (int k = 2 * kHalf; k < 2 * kHalf + 2; ++k) {
    if (kColumns == Columns::kBoth) {
      multiply<T>(first, fragments[k], whole_descriptor(weights + 2 * k));
      multiply<T>(second, fragments[k], whole_descriptor(weights + (kGroupWeightBytes >> 4) + 2 * k));
    } else {
      multiply<T>(second, fragments[k], whole_descriptor(weights + 2 * k));
    }
  }
  commit_products();
}

// All products of a run. Two halves of units are always on their way through the tensor cores: when a half has been
// issued, the one two before it has left its registers, which fetch the fragments of the half two after it. So a box is
// left only after the next one has been entered: where shared memory holds a single one, a run must end with it. When
// this returns, all sums are complete.
template <Columns kColumns, typename T>
__device__ __forceinline__ void multiply_run(const Program& program, const SharedMemory& shared,
                                             const FragmentRow& lane, const BoxRing& boxes, int unit, int count,
                                             RingPosition& ring, float (&first)[32], float (&second)[32]) {
  constexpr bool kTwoTaps = kColumns == Columns::kSecond;  // a stage holds two
  const bool elected = threadIdx.x % 32 == 0, tells = threadIdx.x % 32 < kPair;
  uint32_t even[4][4], odd[4][4];
  uint32_t box = 0, box_empty = 0;
  bool leaves = false;    // the unit located last is the last one of its box
  uint32_t previous = 0;  // the stage before, to be given back

  // Where the lane fetches its part of a unit: the tile's rows, moved by the tap. Neighbours outside the image come
  // from rows of zeros, those that lie in the same banks.
  const auto locate = [&](int index) {
    static_assert(sizeof(Unit) == 8 && offsetof(Unit, box) == 4, "all of a unit is read at once");
    const uint2 next = *reinterpret_cast<const uint2*>(&program.units[index]);
    const uint32_t flags = next.y >> 8;
    if ((flags & kEnterBox) != 0 || box == 0) {
      const BoxRing slot = boxes.at(program, next.y & 255);
      if ((flags & kAcquireBox) != 0) wait_watched(shared.box_full + 8 * slot.first, slot.phase);
      box = shared.boxes + slot.first * shared.box_bytes;
      box_empty = shared.box_empty + 8 * slot.first;
    }
    leaves = (flags & kReleaseBox) != 0;
    const int row = lane.row + static_cast<int16_t>(next.x);
    const bool inside = (lane.y_inside >> (next.x >> 16 & 255)) & (lane.x_inside >> (next.x >> 24)) & 1;
    const uint32_t address = inside ? box + row * kRowBytes : shared.zeros + (row & 7) * kRowBytes;
    return address + ((lane.half ^ (row & 7)) << 4);
  };

  uint32_t address = locate(unit);
  load_half<0>(even, address);
  load_half<1>(even, address);
  wait_watched(shared.stage_full + 8 * ring.index, ring.phase);
  int done = 0;
  // kOdd: the second unit of a pair. Returns whether it was the last one.
  const auto multiply_unit = [&](auto odd_one, const uint32_t (&fragments)[4][4], uint32_t (&next)[4][4]) {
    constexpr bool kOdd = decltype(odd_one)::value;
    constexpr bool kOpens = !(kTwoTaps && kOdd), kCloses = !kTwoTaps || kOdd;  // its stage
    const uint32_t weights =
        weights_descriptor(shared.stages + ring.index * kStageBytes + (kTwoTaps && kOdd ? kGroupWeightBytes : 0));
    multiply_half<kColumns, 0, T>(first, second, fragments, weights);
    const uint32_t left = leaves ? box_empty : 0;
    const bool more = ++done < count;
    if (more) address = locate(unit + done);
    wait_products<2>();
    if (more) load_half<0>(next, address);
    multiply_half<kColumns, 1, T>(first, second, fragments, weights);
    arrive_if(elected && left != 0, left);  // all of the unit's fragments are in registers by now
    if (!more) return true;
    const uint32_t open = shared.mate_empty + 8 * ring.index;
    bool ready = true;
    if (kCloses) {
      ring.advance(program.stages);
      ready = is_complete(shared.stage_full + 8 * ring.index, ring.phase);
    }
    wait_products<2>();
    if (kOpens) arrive_cluster_if(tells && previous != 0, previous);
    previous = kCloses ? open : 0;
    load_half<1>(next, address);
    if (!ready) wait_watched(shared.stage_full + 8 * ring.index, ring.phase);
    return false;
  };
#pragma unroll 1
  while (!multiply_unit(std::false_type{}, even, odd) && !multiply_unit(std::true_type{}, odd, even)) {
  }
  wait_products<0>();
  pin(first);
  pin(second);
  arrive_cluster_if(tells && previous != 0, previous);
  arrive_cluster_if(tells, shared.mate_empty + 8 * ring.index);
  ring.advance(program.stages);
}

}  // namespace mkconvlstm::sm90
