// The recurrence backward on Hopper, one persistent launch over all steps.
//
// An item is one piece of a tile: 128 pixels x 64 or 128 hidden channels of dh, summed over some of all gates and taps.
// Consumers leave its sums in memory, as their registers hold them. When all pieces of a tile are there, other warps of
// the same blocks fetch them, add them up, always in the same order, each block for a share of the channels, and make
// the gates of the step into their gradients. Blocks tell each other by counters what is there: one for each tile's
// sums, one for each pixel tile's gradients.
#pragma once

#include "backward.h"
#include "convolve.cuh"
#include "gradient_step.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace mkconvlstm::sm90 {

// Each has 96 registers at the launch: producers and finishers give up as many as consumers take.
constexpr int kBackwardThreads = 32 * kProducerWarps + kConsumerThreads + kFinisherThreads;

// All items of this block, at each step from the first one down to the last. Those of a pair are of neighbouring tiles.
template <typename Body>
__device__ __forceinline__ void for_each_item(const Backward& params, int first_step, Body body) {
  const int pieces = params.program.piece_count;
  deal(params.steps + (params.dh_0 != nullptr), params.items / kPair, params.period, [&](int steps_before, int index) {
    const int step = params.steps - 1 - steps_before, piece = index % pieces, n = index / pieces % params.tiles_n;
    if (step > first_step) return;
    const int m = index / pieces / params.tiles_n * kPair + rank_in_pair(), tile = m * params.tiles_n + n;
    body(step, Item{tile * pieces + piece, tile, m, n, piece});
  });
}

// One lane: the weights of every item.
__device__ __forceinline__ void stream_items(const Backward& params, const SharedMemory& shared) {
  const BackwardProgram& program = params.program;
  RingPosition ring;
  for_each_item(params, params.steps - 2, [&](int, const Item& item) {
    const Piece piece = program.pieces[item.piece];
    const int64_t first = int64_t{item.n} * program.stages_per_tile + piece.first_unit / program.stage_units;
    const int stages = (piece.units + program.stage_units - 1) / program.stage_units;
    stream_weights(program, shared, params.packed + first * kStageBytes, stages, ring);
  });
}

// One warp: the boxes of every item, once the blocks that make them have published them.
__device__ __forceinline__ void load_gradients(const Backward& params, const SharedMemory& shared,
                                               const BackwardMaps& maps) {
  const BackwardProgram& program = params.program;
  const int lane = threadIdx.x % 32, shares = params.tiles_n * shares_of(program);
  RingPosition ring;
  for_each_item(params, params.steps - 2, [&](int step, const Item& item) {
    const Tiling::Place place = program.tiling.place(item.m);
    const Neighbours near(program.tiling, place);
    wait_neighbours(near, params.finished, kCounterStride, params.tiles_m, (params.steps - 1 - step) * shares);
    fence_proxy_async();
    __syncwarp();
    const Piece piece = program.pieces[item.piece];
    for (int i = 0; i < piece.boxes; ++i) {
      const GateBox box = program.boxes[piece.first_box + i];
      if (lane == 0) {
        wait(shared.box_empty + 8 * ring.index, ring.phase ^ 1);
        load_box(program, shared, &maps.boxes[box.part], box.first, place, (step + 1) * program.tiling.images,
                 ring.index);
      }
      ring.advance(program.box_slots);
    }
    __syncwarp();
  });
}

// One warp: tells the other blocks which sums are there, so that the consumers do not wait for memory.
__device__ __forceinline__ void publish_sums(const Backward& params) {
  for_each_item(params, params.steps - 2, [&](int, const Item& item) {
    sync_threads(kSummedBarrier, kSummedThreads);
    if (threadIdx.x % 32 == 0) publish(params.summed + item.tile * kCounterStride);
  });
}

// Units of a piece from this one on that are multiplied in one run.
__device__ __forceinline__ int run_length(const Program& program, int unit, int end) {
  if (program.box_slots > 1) return end - unit;
  int last = unit;
  while (last + 1 < end && (program.units[last].flags & kReleaseBox) == 0) ++last;
  return last + 1 - unit;
}

// Two warpgroups: products.
template <typename T>
__device__ __forceinline__ void consume(const Backward& params, const SharedMemory& shared) {
  const BackwardProgram& program = params.program;
  const int warp = uniform(threadIdx.x / 32) - kProducerWarps;
  const int fragment_row = 16 * warp + threadIdx.x % 16;
  FragmentRow lane(program, fragment_row);
  RingPosition weights;
  BoxRing boxes;
  float first[32], second[32];
  int placed = -1;

  for_each_item(params, params.steps - 2, [&](int, const Item& item) {
    if (item.m != placed) {
      placed = item.m;
      lane.place(program, program.tiling.pixel(program.tiling.place(item.m), fragment_row), params.images);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) first[i] = second[i] = 0;

    const Piece piece = program.pieces[item.piece];
    float4* partial = params.partial + int64_t{item.index} * 2 * program.chunks * kConsumerThreads +
                      (threadIdx.x - 32 * kProducerWarps);
    for (int unit = piece.first_unit, end = unit + piece.units, count; unit < end; unit += count) {
      count = run_length(program, unit, end);
      if (program.columns == Columns::kBoth) {
        multiply_run<Columns::kBoth, T>(program, shared, lane, boxes, unit, count, weights, first, second);
      } else {
        multiply_run<Columns::kSecond, T>(program, shared, lane, boxes, unit, count, weights, first, second);
      }
    }
    if (program.columns == Columns::kBoth) {
      store_sums(first, partial);
      partial += 8 * kConsumerThreads;
    }
    store_sums(second, partial);
    boxes = boxes.at(program, piece.boxes);
    sync_threads(kSummedBarrier, kSummedThreads);  // no consumer is ever an item ahead of the other
  });
}

// One lane: what the finishers start from and what they make.
__device__ __forceinline__ void exchange_chunks(const Backward& params, const StagedChunk& staged,
                                                const BackwardMaps& maps) {
  ChunkExchange exchange(params, staged, maps);
  for_each_item(params, params.steps - 1, [&](int step, const Item& item) {
    if (step < 0) return;
    const Chunks chunks(params.program, item);
    for (int chunk = chunks.first; chunk < chunks.last; ++chunk)
      exchange.next(step, item, chunk, chunk + 1 == chunks.last);
  });
  exchange.end();
}

// Two warpgroups: gates' gradients.
template <typename T>
__device__ __forceinline__ void finish_items(const Backward& params, const SharedMemory& shared,
                                             const StagedChunk& staged) {
  const int thread = threadIdx.x - (kBackwardThreads - kFinisherThreads);
  const bool elected = thread == 0;
  GradientStep<T> gradients(params, staged, thread);
  SumBatches sums(params, shared, thread);
  for_each_item(params, params.steps - 1, [&](int step, const Item& item) {
    const Chunks chunks(params.program, item);
    if (chunks.first == chunks.last) return;
    const bool has_sums = step < params.steps - 1;
    gradients.place(item);
    auto next = gradients.load(step, item, chunks.first);
    if (has_sums) {
      if (elected) {
        wait_counter(params.summed + item.tile * kCounterStride,
                     (params.steps - 1 - step) * params.program.piece_count);
        fence_proxy_async();
        sums.begin(item, chunks.first, chunks.last);
      }
      sync_threads(kFinishedBarrier, kFinisherThreads);  // the others sleep until then
    }
    gradients.load_carried(step, next);
#pragma unroll 1
    for (int chunk = chunks.first; chunk < chunks.last; ++chunk) {
      const auto now = next;
      if (chunk + 1 < chunks.last) {
        next = gradients.load(step, item, chunk + 1);
        gradients.load_carried(step, next);
      }
      float4 dh[2] = {};
      if (has_sums) sums.add_up(elected, dh);
      gradients.finish(step, now, dh);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ Backward params) {
  extern __shared__ __align__(1024) char memory[];
  const SharedMemory shared(params.program, memory);
  const SumBatches sums(params, shared, 0);
  const StagedChunk staged(sums.end());
  if (threadIdx.x == 0) {
    sums.init();
    staged.init();
  }
  shared.init(params.program, memory);

  const int warp = threadIdx.x / 32;
  if (warp < kProducerWarps) {
    give_registers<32>();
    if (threadIdx.x == 0) {
      stream_items(params, shared);
    } else if (warp == 1) {
      load_gradients(params, shared, maps);
    } else if (warp == 2) {
      publish_sums(params);
    } else if (threadIdx.x == 32 * 3) {
      exchange_chunks(params, staged, maps);  // as long as finishers wait, and no longer than these may
      const uint64_t rounds = 1 + params.items / gridDim.x;
      watch(shared.finished, kLongestTile * (100 + params.steps * rounds));
    }
  } else if (warp < kProducerWarps + 4 * kConsumers) {
    take_registers<136>();
    consume<T>(params, shared);
    arrive_if(threadIdx.x % 32 == 0, shared.finished);
  } else {
    give_registers<88>();
    finish_items<T>(params, shared, staged);
  }
  __syncwarp();
  sync_blocks();  // the other may still write here
}

template <typename T>
void launch_backward(const Backward& backward, const BackwardMaps& maps, int blocks, int shared_memory,
                     cudaStream_t stream) {
  launch_cooperative(backward_kernel<T>, blocks, kPair, kBackwardThreads, shared_memory, stream, maps, backward);
}

}  // namespace mkconvlstm::sm90
