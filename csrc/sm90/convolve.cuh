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

constexpr int kNoChannel = 1 << 20;  // of any operand

__device__ __forceinline__ int rank_in_pair() { return blockIdx.x % kPair; }

// Where everything lies in shared memory.
struct SharedMemory {
  uint32_t boxes, zeros, stages, stage_full, stage_empty, box_full, box_empty, finished;
  uint32_t mate_empty;  // stage_empty of the block of the pair that this lane tells
  int box_bytes;

  __device__ SharedMemory(const Program& program, const void* base) {
    box_bytes = program.box_bytes();
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

// One lane: a box of an operand's channels from the first one on, around a tile of that many images; what lies outside
// of them is zero. before: images before those, of earlier steps.
__device__ __forceinline__ void load_box(const Program& program, const SharedMemory& shared, const CUtensorMap* map,
                                         int channel, const Tiling::Place& tile, int before, int slot) {
  const Tiling& tiling = program.tiling;
  const uint32_t barrier = shared.box_full + 8 * slot;
  int at[4] = {channel, tile.x - tiling.margin_x, tile.y - tiling.margin_y, before + tile.image};
  if (tile.image >= tiling.images) at[0] = kNoChannel;  // no such tile
  expect_bytes(barrier, program.loaded_bytes());
  for (int chunk = 0; chunk < program.box_chunks; ++chunk) {
    copy_tensor(shared.boxes + slot * shared.box_bytes + chunk * program.chunk_bytes(), map, at, barrier);
    at[1] += program.chunk_width;
  }
}

// A warp: until all neighbours have been published so often. counters: of all tiles, so far apart.
__device__ __forceinline__ void wait_neighbours(const Neighbours& near, const uint32_t* counters, int distance,
                                                int tiles, int wanted) {
  for (int i = threadIdx.x % 32; i < near.count(); i += 32)
    if (near.tile(i) < tiles) wait_counter(counters + near.tile(i) * distance, wanted);
}

// The row of the tile whose operand a lane fetches, and which of its neighbours lie inside the image.
struct FragmentRow {
  int row;        // in a box
  uint32_t half;  // which 8 of 16 channels
  uint32_t y_inside = 0, x_inside = 0;

  __device__ FragmentRow(const Program& program, int row_of_tile) {
    row = program.tiling.box_row(row_of_tile);
    half = threadIdx.x % 32 / 16;
  }

  // pixel: the lane's own; where there is none, nothing is inside.
  __device__ void place(const Program& program, const Tiling::Pixel& pixel, const Images& images) {
    const Images::Place at = images.place(pixel.index);
    y_inside = pixel.exists() ? inside(at.y, images.height.value, program.radius_y) : 0;
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

// Where a lane fetches its part of the units, one after another.
class UnitAddress {
 public:
  __device__ UnitAddress(const Program& program, const SharedMemory& shared, const FragmentRow& lane,
                         const BoxRing& boxes)
      : program_(program), shared_(shared), lane_(lane), boxes_(boxes) {}

  // All of a unit at once.
  __device__ __forceinline__ uint2 read(int unit) const {
    static_assert(sizeof(Unit) == 8 && offsetof(Unit, y) == 4, "offset in x; y, x, box and flags in y");
    return *reinterpret_cast<const uint2*>(&program_.units[unit]);
  }

  static __device__ bool is(uint2 unit, UnitFlag flag) { return (unit.y >> 24 & flag) != 0; }

  // The unit's box, from now on.
  __device__ __forceinline__ void enter(uint2 unit) {
    const BoxRing slot = boxes_.at(program_, unit.y >> 16 & 255);
    if (is(unit, kAcquireBox)) wait_watched(shared_.box_full + 8 * slot.first, slot.phase);
    own_ = shared_.boxes + slot.first * shared_.box_bytes + lane_.row * kRowBytes;
    empty_ = shared_.box_empty + 8 * slot.first;
  }

  // The tile's row, moved by the tap. Neighbours outside the image come from rows of zeros, those that lie in the same
  // banks.
  __device__ __forceinline__ uint32_t of(uint2 unit) const {
    const uint32_t row = own_ + unit.x;
    const bool inside = (lane_.y_inside >> (unit.y & 255) & lane_.x_inside >> (unit.y >> 8 & 255) & 1) != 0;
    return (inside ? row : shared_.zeros | (row & 7 * kRowBytes)) ^ (lane_.half << 4 ^ (row >> 3 & 0x70));
  }

  // The barrier by which the box is given back.
  __device__ uint32_t empty() const { return empty_; }

 private:
  const Program& program_;
  const SharedMemory& shared_;
  const FragmentRow& lane_;
  const BoxRing& boxes_;
  uint32_t own_ = 0;  // the lane's own row in the box
  uint32_t empty_ = 0;
};

// Products of kSteps times 16 channels of a unit, from the kFirst'th on: on their way when this returns.
template <Columns kColumns, int kFirst, int kSteps, typename T>
__device__ __forceinline__ void multiply_steps(float (&first)[32], float (&second)[32],
                                               const uint32_t (&fragments)[4][4], uint32_t weights) {
  begin_products();
#pragma unroll
  for (int k = kFirst; k < kFirst + kSteps; ++k) {
    if (kColumns == Columns::kBoth) {
      multiply<T>(first, fragments[k], whole_descriptor(weights + 2 * k));
      multiply<T>(second, fragments[k], whole_descriptor(weights + (kGroupWeightBytes >> 4) + 2 * k));
    } else {
      multiply<T>(second, fragments[k], whole_descriptor(weights + 2 * k));
    }
  }
  commit_products();
}

// Fragments of a unit, once the same ones of the unit before the last have been multiplied.
template <int kFirst, int kSteps>
__device__ __forceinline__ void load_steps(uint32_t (&fragments)[4][4], uint32_t address) {
  wait_products<4 / kSteps>();
#pragma unroll
  for (int k = kFirst; k < kFirst + kSteps; ++k) {
    pin(fragments[k]);
    load_matrices(fragments[k], address ^ (k << 5));
  }
}

// All products of a run. When a unit's products, or half of them, have been issued, those that were issued before have
// left the registers of their fragments, which take the fragments of the next unit. So a box is left only after the
// next one has been entered: where shared memory holds a single one, a run must end with it. When this returns, all
// sums are complete.
//
// What a consumer does between two issues lets the tensor cores wait, unless the other consumer has issued enough. So a
// unit's address is computed while the unit before is multiplied, and what is rare is done in a branch of its own; taps
// of the second group alone, which have half as many products, are issued whole, those of both in halves, since many
// loads of fragments at once keep the tensor cores from their weights.
template <Columns kColumns, typename T>
__device__ __forceinline__ void multiply_run(const Program& program, const SharedMemory& shared,
                                             const FragmentRow& lane, const BoxRing& boxes, int unit, int count,
                                             RingPosition& ring, float (&first)[32], float (&second)[32]) {
  constexpr bool kTwoTaps = kColumns == Columns::kSecond;  // a stage holds two
  constexpr int kSteps = kTwoTaps ? 4 : 2;                 // of 16 channels, issued together
  const bool elected = threadIdx.x % 32 == 0, tells = threadIdx.x % 32 < kPair;
  const int end = unit + count;
  uint32_t even[4][4], odd[4][4];
  uint32_t previous = 0;  // the stage before, to be given back

  UnitAddress units(program, shared, lane, boxes);
  uint2 here = units.read(unit), after = units.read(unit + 1);
  units.enter(here);
  load_fragments(even, units.of(here));
  uint32_t address = units.of(after);
  wait_watched(shared.stage_full + 8 * ring.index, ring.phase);
  // kOdd: the second unit of a pair. Returns whether it was the last one.
  const auto multiply_unit = [&](auto odd_one, const uint32_t (&fragments)[4][4], uint32_t (&next)[4][4]) {
    constexpr bool kOdd = decltype(odd_one)::value;
    constexpr bool kOpens = !(kTwoTaps && kOdd), kCloses = !kTwoTaps || kOdd;  // its stage
    const uint32_t weights =
        weights_descriptor(shared.stages + ring.index * kStageBytes + (kTwoTaps && kOdd ? kGroupWeightBytes : 0));
    multiply_steps<kColumns, 0, kSteps, T>(first, second, fragments, weights);
    const bool last = ++unit == end;
    uint32_t left = 0;  // the box that this unit is the last one to use
    if (__builtin_expect(last || UnitAddress::is(after, kEnterBox), 0)) {
      if (UnitAddress::is(here, kReleaseBox)) left = units.empty();
      if (kSteps == 4) {
        arrive_if(elected && left != 0, left);
        if (last) return true;
      }
      if (!last) {
        units.enter(after);
        address = units.of(after);
      }
    }
    if constexpr (kSteps < 4) {
      if (!last) load_steps<0, kSteps>(next, address);
      multiply_steps<kColumns, kSteps, kSteps, T>(first, second, fragments, weights);
      arrive_if(elected && left != 0, left);  // all of the unit's fragments are in registers by now
      if (last) return true;
    }
    const uint32_t open = shared.mate_empty + 8 * ring.index;
    bool ready = true;
    if (kCloses) {
      ring.advance(program.stages);
      ready = is_complete(shared.stage_full + 8 * ring.index, ring.phase);
    }
    load_steps<4 - kSteps, kSteps>(next, address);
    if (kOpens) arrive_cluster_if(tells && previous != 0, previous);
    previous = kCloses ? open : 0;
    here = after;
    after = units.read(unit + 1);
    address = units.of(after);
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
