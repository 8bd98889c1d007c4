// The recurrence backward on Hopper, one persistent launch over all steps.
//
// An item is one piece of a tile: 128 pixels x 64 or 128 hidden channels of dh, summed over some of all gates and taps.
// Consumers leave its sums in memory, as their registers hold them. When all pieces of a tile are there, other warps of
// the same blocks fetch them, add them up, always in the same order, each block for a share of the channels, and make
// the gates of the step into their gradients. Blocks tell each other by counters what is there: one for each tile's
// sums, one for each pixel tile's gradients.
#pragma once

#include "../gates.cuh"
#include "backward.h"
#include "convolve.cuh"
#include "half_math.cuh"
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
                                               const CUtensorMap* first_part, const CUtensorMap* second_part) {
  const BackwardProgram& program = params.program;
  const int lane = threadIdx.x % 32, shares = params.tiles_n * min(program.piece_count, program.chunks);
  RingPosition ring;
  for_each_item(params, params.steps - 2, [&](int step, const Item& item) {
    const Tiling::Place place = program.tiling.place(item.m);
    const Neighbours near(program.tiling, place);
    near.wait(params.finished, kCounterStride, params.tiles_m, (params.steps - 1 - step) * shares);
    fence_proxy_async();
    __syncwarp();
    const Piece piece = program.pieces[item.piece];
    for (int i = 0; i < piece.boxes; ++i) {
      const GateBox box = program.boxes[piece.first_box + i];
      if (lane == 0) {
        wait(shared.box_empty + 8 * ring.index, ring.phase ^ 1);
        load_box(program, shared, box.part == 0 ? first_part : second_part, box.first, place,
                 (step + 1) * program.tiling.images, ring.index);
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

// What one thread makes of two rows of pixels, four neighbouring channels each.
template <typename T>
class GradientStep {
 public:
  __device__ GradientStep(const Backward& params, int thread) : params_(params) {
    row_ = 16 * (thread / 32) + thread % 32 / 4;
    channel_ = 4 * (thread % 4);
  }

  __device__ __forceinline__ void place(const Item& item) {
    const Tiling& tiling = params_.program.tiling;
    const Tiling::Place tile = tiling.place(item.m);
    pixel_ = tiling.pixel(tile, row_);
  }

  // Everything but the sums and what other blocks carry on, early enough that it is there when they are.
  __device__ __forceinline__ void load(int step, const Item& item, int chunk) {
    channel_at_ = (item.n * params_.program.chunks + chunk) * kChunkChannels + channel_;
    if (step < 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!there(half)) continue;
      const int element = element_of(half);
      const T* gates = gates_of(step, half);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        gates_[half][gate] = *reinterpret_cast<const uint2*>(gates + gate * part().channels);
      c_[half] = cells(step, element);
      c_prev_[half] = step > 0                 ? cells(step - 1, element)
                      : params_.c_0 != nullptr ? load4(params_.c_0 + element)
                                               : float4{};
      dc_[half] = step < params_.steps - 1 && !params_.shares_cells ? load4(params_.dc + element) : float4{};
      if (params_.dc_n != nullptr) {
        const int64_t length = params_.lengths == nullptr ? params_.steps : params_.lengths[image_of(half)];
        if (step == length - 1) dc_[half] = add(dc_[half], load4(params_.dc_n + element));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) dh_[half][k] = T(0);
      if (params_.dh == nullptr) continue;
      const T* dh = dh_of(step, half);
#pragma unroll
      for (int k = 0; k < 4; ++k) dh_[half][k] = dh[k * params_.dh_channel];
    }
  }

  // Where another block may have had the next step: what comes from there, once the sums' pieces are known to be there.
  __device__ __forceinline__ void load_carried(int step) {
    if (!params_.shares_cells || step < 0 || step == params_.steps - 1) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (there(half)) dc_[half] = add(dc_[half], load4(params_.dc + element_of(half)));
  }

  // Stores what step's gates become, or dh_0. dh: the gradient of h_t through step t + 1.
  __device__ __forceinline__ void finish(int step, const float4 (&dh)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!there(half)) continue;
      if (step < 0) {
        *reinterpret_cast<uint2*>(static_cast<T*>(params_.dh_0) + element_of(half)) = pack(dh[half]);
      } else {
        store(step, half, dh[half]);
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 load4(const float* values) {
    return *reinterpret_cast<const float4*>(values);
  }

  static __device__ __forceinline__ uint2 pack(float4 values) {
    return {HalfMath<T>::pack(values.x, values.y), HalfMath<T>::pack(values.z, values.w)};
  }

  static __device__ __forceinline__ float4 unpack(uint2 pairs) {
    const float2 low = HalfMath<T>::unpack(pairs.x), high = HalfMath<T>::unpack(pairs.y);
    return {low.x, low.y, high.x, high.y};
  }

  __device__ bool there(int half) const { return pixel_.index + 8 * half < pixel_.end && channel_at_ < params_.hidden; }

  __device__ int element_of(int half) const { return (pixel_.index + 8 * half) * params_.hidden + channel_at_; }

  __device__ const GatePart& part() const { return params_.parts[channel_at_ >= params_.parts[1].first_hidden]; }

  __device__ T* gates_of(int step, int half) const {
    const int64_t row = int64_t{step} * params_.pixels + pixel_.index + 8 * half;
    return static_cast<T*>(part().gates) + row * 4 * part().channels + (channel_at_ - part().first_hidden);
  }

  // A division: the other way takes registers that this kernel lacks.
  __device__ int image_of(int half) const { return (pixel_.index + 8 * half) / params_.images.pixels.value; }

  __device__ const T* dh_of(int step, int half) const {
    const int image = image_of(half), in_image = pixel_.index + 8 * half - image * params_.images.pixels.value;
    return static_cast<const T*>(params_.dh) + image * params_.dh_image + step * params_.dh_step +
           channel_at_ * params_.dh_channel + in_image * params_.dh_pixel;
  }

  __device__ float4 cells(int step, int element) const {
    const int64_t at = int64_t{step} * params_.pixels * params_.hidden + element;
    if (!params_.c_is_half) return load4(static_cast<const float*>(params_.c) + at);
    return unpack(*reinterpret_cast<const uint2*>(static_cast<const T*>(params_.c) + at));
  }

  __device__ __forceinline__ void store(int step, int half, float4 dh) {
    float4 gates[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) gates[gate] = unpack(gates_[half][gate]);
    float4 dc = dc_[half];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto at = [k](auto& values) -> auto& { return (&values.x)[k]; };
      const auto out = cell_backward<float, HalfMath<T>>(
          {at(gates[0]), at(gates[1]), at(gates[2]), at(gates[3])}, at(c_prev_[half]), at(c_[half]),
          at(dh) + static_cast<float>(dh_[half][k]), at(dc), {}, Peepholes::kNone);
      at(gates[0]) = out.dz.i;
      at(gates[1]) = out.dz.f;
      at(gates[2]) = out.dz.g;
      at(gates[3]) = out.dz.o;
      at(dc) = out.dc_prev;
    }
    T* target = gates_of(step, half);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) *reinterpret_cast<uint2*>(target + gate * part().channels) = pack(gates[gate]);
    *reinterpret_cast<float4*>(params_.dc + element_of(half)) = dc;
  }

  const Backward& params_;
  int row_, channel_;    // of a tile and a chunk; the second row is 8 later
  Tiling::Pixel pixel_;  // of the first row
  int channel_at_;       // the first of the four among all hidden channels
  uint2 gates_[2][4];
  float4 c_[2], c_prev_[2], dc_[2];
  T dh_[2][4];
};

// Two warpgroups: gates' gradients.
template <typename T>
__device__ __forceinline__ void finish_items(const Backward& params, const SharedMemory& shared) {
  const BackwardProgram& program = params.program;
  const int pieces = program.piece_count, shares = min(pieces, program.chunks);
  const int thread = threadIdx.x - (kBackwardThreads - kFinisherThreads);
  const bool elected = thread == 0;
  GradientStep<T> gradients(params, thread);
  SumBatches sums(params, shared, thread);
  for_each_item(params, params.steps - 1, [&](int step, const Item& item) {
    if (item.piece >= shares) return;
    const int first = program.chunks * item.piece / shares, last = program.chunks * (item.piece + 1) / shares;
    const bool has_sums = step < params.steps - 1;
    gradients.place(item);
    gradients.load(step, item, first);
    if (has_sums) {
      if (elected) {
        wait_counter(params.summed + item.tile * kCounterStride, (params.steps - 1 - step) * pieces);
        fence_proxy_async();
        sums.begin(item, first, last);
      }
      sync_threads(kFinishedBarrier, kFinisherThreads);  // the others sleep until then
    }
#pragma unroll 1
    for (int chunk = first; chunk < last; ++chunk) {
      if (chunk > first) gradients.load(step, item, chunk);
      gradients.load_carried(step);
      float4 dh[2] = {};
      if (has_sums) sums.add_up(elected, dh);
      gradients.finish(step, dh);
    }
    sync_threads(kFinishedBarrier, kFinisherThreads);
    if (elected) publish(params.finished + item.m * kCounterStride);
  });
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap first_part, const __grid_constant__ CUtensorMap second_part,
                    const __grid_constant__ Backward params) {
  extern __shared__ __align__(1024) char memory[];
  const SharedMemory shared(params.program, memory);
  if (threadIdx.x == 0) SumBatches(params, shared, 0).init();
  shared.init(params.program, memory);

  const int warp = threadIdx.x / 32;
  if (warp < kProducerWarps) {
    give_registers<32>();
    if (threadIdx.x == 0) {
      stream_items(params, shared);
    } else if (warp == 1) {
      load_gradients(params, shared, &first_part, &second_part);
    } else if (warp == 2) {
      publish_sums(params);
    } else if (threadIdx.x == 32 * 3) {
      const uint64_t rounds = 1 + params.items / gridDim.x;
      watch(shared.finished, kLongestTile * (100 + params.steps * rounds));
    }
  } else if (warp < kProducerWarps + 4 * kConsumers) {
    take_registers<136>();
    consume<T>(params, shared);
    arrive_if(threadIdx.x % 32 == 0, shared.finished);
  } else {
    give_registers<88>();
    finish_items<T>(params, shared);
  }
  __syncwarp();
  sync_blocks();  // the other may still write here
}

template <typename T>
void launch_backward(const Backward& backward, const CUtensorMap (&gates)[2], int blocks, int shared_memory,
                     cudaStream_t stream) {
  launch_cooperative(backward_kernel<T>, blocks, kPair, kBackwardThreads, shared_memory, stream, gates[0], gates[1],
                     backward);
}

}  // namespace mkconvlstm::sm90
