// The recurrence forward on Hopper, one persistent launch over all steps.
//
// A block is dealt tiles of 128 pixels x 16 channels of each of two groups, with all four gates of them: a thread has
// the gates of its channels in its own registers. Blocks tell each other by counters, one for each pixel tile and
// group, that their part of h_t is there; a tile waits for the pixel tiles that its taps touch, and for no others.
#pragma once

#include "../gates.cuh"
#include "convolve.cuh"
#include "forward.h"
#include "half_math.cuh"
#include "launch.cuh"

namespace mkconvlstm::sm90 {

constexpr int kThreads = 32 * (kProducerWarps + 4 * kConsumers);
constexpr int kTileChannels = kGroupColumns / 4;
constexpr int kPublishThreads = 128 * kConsumers + 32;

// Named barriers: 1 + group, and one after each short tile, which is all that keeps consumers from being a tile ahead
// of one another and of what publishes their tiles.
__device__ __forceinline__ int finished_barrier(int group) { return 1 + group; }
constexpr int kTileBarrier = 3;
// Stages of weights: more of them take longer than it takes to publish two groups. Where tiles rotate, a consumer may
// finish a tile's second group after the next one's first unit and that of the next before, with fewer stages between.
constexpr int kShortTile = 8, kShortRotatingTile = 16;
static_assert(kShortRotatingTile >= kMaxStages + 1);

__device__ __forceinline__ bool has_products(const Forward& params, int step) { return step > 0 || params.has_h_0; }

__device__ __forceinline__ bool ends_at_barrier(const Forward& params, int step) {
  const int longest = params.shares_cells ? kShortRotatingTile : kShortTile;
  return !has_products(params, step) || params.program.stages_per_tile <= longest;
}

struct Tile {
  int step, m, n;
};

// All tiles of this block, step by step. Those of a pair are neighbours.
template <typename Body>
__device__ __forceinline__ void for_each_tile(const Forward& params, Body body) {
  const int pairs_m = params.tiles_m / kPair;
  deal(params.steps, pairs_m * params.tiles_n, params.period, [&](int step, int index) {
    body(Tile{step, index % pairs_m * kPair + rank_in_pair(), index / pairs_m});
  });
}

// What one thread knows of one group of a tile: two rows of pixels, four neighbouring channels. Addresses are computed
// once and without branches: one warp of each quarter of a multiprocessor is here at a time, and its instructions take
// their time.
template <typename T>
class GateStep {
 public:
  __device__ GateStep(const Forward& params, int warp) : params_(params) {
    const int lane = threadIdx.x % 32;
    row_ = 16 * warp + lane / 4;
    channel_ = 4 * (lane % 4);
  }

  // Once a tile.
  __device__ __forceinline__ void place(int tile_m) {
    pixel_ = tile_m * kTileRows + row_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_ + 8 * half, image = params_.images.image(pixel);
      image_at_[half] = image * (params_.steps * params_.hidden - 1) * params_.images.pixels.value + pixel;
    }
  }

  // Pre-activations, biases and c_{t-1}, early enough that nobody waits for them when the same tile and group are
  // finished. Where other blocks may have made the cells, not before a box of the step before is there.
  __device__ __forceinline__ void load(Tile tile, int group) {
    const GroupOperands& g = params_.groups[group];
    const int channel = tile.n * kTileChannels + channel_;
    const int hidden_channel = g.first_hidden + channel, image = params_.images.pixels.value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_ + 8 * half;
      there_[half] = channel < g.channels && pixel < params_.pixels;
      // What is not there reads another's pre-activations, and stores nothing.
      z_at_[half] = there_[half] ? pixel * 4 * g.branch_channels + g.first_in_branch + channel : 0;
      c_at_[half] = there_[half] ? pixel * params_.hidden + hidden_channel : 0;
      h_at_[half] = image_at_[half] + hidden_channel * image;
    }
    const T* z = z_of(g, tile.step);
    const float* c_prev = tile.step == 0 ? params_.c_0 : c_of(tile.step - 1);
    const float* bias = params_.bias == nullptr ? nullptr : params_.bias + (channel < g.channels ? hidden_channel : 0);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        z_[half][gate] = *reinterpret_cast<const uint2*>(z + (z_at_[half] + gate * g.branch_channels));
      bias_[gate] = bias == nullptr ? float4{} : *reinterpret_cast<const float4*>(bias + gate * params_.hidden);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      c_[half] = c_prev != nullptr && there_[half] ? *reinterpret_cast<const float4*>(c_prev + c_at_[half]) : float4{};
  }

  // sums: the hidden-to-hidden part of the pre-activations; overwritten. Publishes what other blocks read first, then
  // stores the rest.
  __device__ __forceinline__ void finish(float (&sums)[32], Tile tile, int group) {
    T* state = static_cast<T*>(params_.state) + (tile.step + 1) % 2 * params_.pixels * params_.hidden;
    uint2 h[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[4], cells[4] = {c_[half].x, c_[half].y, c_[half].z, c_[half].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float* const i = sums + at(0, half, k);
        float* const f = sums + at(1, half, k);
        float* const g = sums + at(2, half, k);
        float* const o = sums + at(3, half, k);
        const Gates<float> z{*i + bias_of(0, k) + z_of(half, 0, k), *f + bias_of(1, k) + z_of(half, 1, k),
                             *g + bias_of(2, k) + z_of(half, 2, k), *o + bias_of(3, k) + z_of(half, 3, k)};
        const auto out = cell_forward<float, HalfMath<T>>(z, cells[k], {}, Peepholes::kNone);
        *i = out.gates.i;
        *f = out.gates.f;
        *g = out.gates.g;
        *o = out.gates.o;
        cells[k] = out.c;
        values[k] = out.h;
      }
      c_[half] = {cells[0], cells[1], cells[2], cells[3]};
      h[half] = {HalfMath<T>::pack(values[0], values[1]), HalfMath<T>::pack(values[2], values[3])};
      store_if(there_[half], state + c_at_[half], h[half]);
    }
    if (params_.shares_cells) store_cells(tile.step);
    arrive_threads(finished_barrier(group), kPublishThreads);
    if (!params_.shares_cells) store_cells(tile.step);
    store(sums, h, tile.step, params_.groups[group]);
  }

 private:
  // Where the sum of (gate, row + 8 * half, channel + k) lies.
  static __device__ constexpr int at(int gate, int half, int k) { return (k / 2 * 4 + gate) * 4 + 2 * half + k % 2; }

  __device__ float* c_of(int step) const { return params_.c + step * params_.c_step; }

  __device__ T* z_of(const GroupOperands& g, int step) const { return static_cast<T*>(g.z) + step * g.z_step; }

  __device__ float z_of(int half, int gate, int k) const {
    const uint2 z = z_[half][gate];
    const float2 pair = HalfMath<T>::unpack(k < 2 ? z.x : z.y);
    return k % 2 == 0 ? pair.x : pair.y;
  }

  __device__ float bias_of(int gate, int k) const {
    const float4 b = bias_[gate];
    return k == 0 ? b.x : k == 1 ? b.y : k == 2 ? b.z : b.w;
  }

  __device__ __forceinline__ void store_cells(int step) {
    float* const c = c_of(step);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_last_if(there_[half], c + c_at_[half], c_[half]);
  }

  __device__ __forceinline__ void store(const float (&sums)[32], const uint2 (&h)[2], int step,
                                        const GroupOperands& g) {
    T* const gates = z_of(g, step);
    if (params_.keep) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const uint2 values = {HalfMath<T>::pack(sums[at(gate, half, 0)], sums[at(gate, half, 1)]),
                                HalfMath<T>::pack(sums[at(gate, half, 2)], sums[at(gate, half, 3)])};
          store_last_if(there_[half], gates + (z_at_[half] + gate * g.branch_channels), values);
        }
      }
    }
    const int image = params_.images.pixels.value;
    auto* const out = static_cast<uint16_t*>(params_.h) + step * params_.h_step;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t pair = k < 2 ? h[half].x : h[half].y;
        store_if(there_[half], out + (h_at_[half] + k * image),
                 static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16));
      }
    }
  }

  const Forward& params_;
  int row_, channel_;
  int pixel_, image_at_[2];  // of the tile last placed: the first row's pixel, and both rows in channel 0 of h
  // Of the tile and group last loaded: whether the two rows are there, and where they lie in z, c and h of a step.
  bool there_[2];
  int z_at_[2], c_at_[2], h_at_[2];
  uint2 z_[2][4];
  float4 bias_[4], c_[2];
};

// One warp: the boxes of every tile, once the blocks that make them have published them.
__device__ __forceinline__ void load_images(const Forward& params, const SharedMemory& shared, const CUtensorMap* map) {
  const ForwardProgram& program = params.program;
  const int lane = threadIdx.x % 32;
  RingPosition ring;
  for_each_tile(params, [&](Tile tile) {
    if (!has_products(params, tile.step)) return;
    const Neighbours near(program, tile.m, params.tiles_m);
    for (int box = 0; box < program.box_count; ++box) {
      wait(shared.box_empty + 8 * ring.index, ring.phase ^ 1);
      for (int group = 0; group < 2; ++group) {
        if ((program.boxes[box].groups >> group & 1) == 0) continue;
        for (int m = near.first + lane; m <= near.last; m += 32)
          wait_counter(params.counters + group * params.tiles_m + m, tile.step * params.tiles_n);
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0)
        load_box(program, shared, map, program.boxes[box].channel, tile.step % 2 * params.pixels + near.first_row,
                 ring.index);
      __syncwarp();
      ring.advance(program.box_slots);
    }
  });
}

// One warp: tells the other blocks what the consumers have finished, so that these do not wait for memory.
__device__ __forceinline__ void publish_tiles(const Forward& params) {
  for_each_tile(params, [&](Tile tile) {
    for (int group = 0; group < 2; ++group) {
      sync_threads(finished_barrier(group), kPublishThreads);
      if (threadIdx.x % 32 == 0) publish(params.counters + group * params.tiles_m + tile.m);
      if (group == 0 && ends_at_barrier(params, tile.step)) sync_threads(kTileBarrier, kPublishThreads);
    }
  });
}

// Two warpgroups: products and gates.
template <typename T>
__device__ __forceinline__ void consume(const Forward& params, const SharedMemory& shared) {
  const ForwardProgram& program = params.program;
  const int warp = uniform(threadIdx.x / 32) - kProducerWarps, consumer = warp / 4;
  FragmentRow lane(program, warp);
  GateStep<T> gates(params, warp);
  RingPosition weights;
  BoxRing boxes;
  float first[32], second[32], finished[32];  // finished: the second group of the tile before
  Tile before{};
  bool pending = false;
  int placed = -1;  // pixels of the tile last placed: many blocks have one tile alone

  for_each_tile(params, [&](Tile tile) {
    const bool multiplies = has_products(params, tile.step);
    if (tile.m != placed) {
      placed = tile.m;
      gates.place(tile.m);
      lane.place(program, tile.m * kTileRows + 16 * warp + threadIdx.x % 16, params.pixels, params.images);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) first[i] = second[i] = 0;

#pragma unroll 1
    for (int r = 0; r < program.run_count[consumer]; ++r) {
      const Run run = program.runs[consumer][r];
      const bool early = (run.actions & kFinishSecondEarly) != 0 && tile.step != before.step;
      if (pending && (early || (run.actions & kFinishSecond) != 0)) {
        gates.finish(finished, before, 1);
        pending = false;
      }
      if ((run.actions & kFinishSecond) != 0) gates.load(tile, 0);
      if ((run.actions & kFinishFirst) != 0) {
        gates.finish(first, tile, 0);
        gates.load(tile, 1);
      }
      if (!multiplies || run.count == 0) continue;
      if (run.columns == Columns::kBoth) {
        multiply_run<Columns::kBoth, T>(program, shared, lane, boxes, run.first, run.count, weights, first, second);
      } else {
        multiply_run<Columns::kSecond, T>(program, shared, lane, boxes, run.first, run.count, weights, first, second);
      }
    }
    if (multiplies) boxes = boxes.at(program, program.box_count);
    if (ends_at_barrier(params, tile.step)) sync_threads(kTileBarrier, kPublishThreads);
#pragma unroll
    for (int i = 0; i < 32; ++i) finished[i] = second[i];
    before = tile;
    pending = true;
  });
  if (pending) gates.finish(finished, before, 1);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap state, const __grid_constant__ Forward params) {
  extern __shared__ __align__(1024) char memory[];
  const SharedMemory shared(params.program, memory);
  shared.init(params.program, memory);

  const int warp = threadIdx.x / 32, tiles = params.tiles_m * params.tiles_n;
  if (warp < kProducerWarps) {
    give_registers<40>();
    if (warp == 0 && threadIdx.x == 0) {
      RingPosition ring;
      for_each_tile(params, [&](Tile tile) {
        if (!has_products(params, tile.step)) return;
        const int64_t stages = int64_t{tile.n} * params.program.stages_per_tile;
        stream_weights(params.program, shared, params.packed + stages * kStageBytes, params.program.stages_per_tile,
                       ring);
      });
    } else if (warp == 1) {
      load_images(params, shared, &state);
    } else if (warp == 2) {
      publish_tiles(params);
    } else if (threadIdx.x == 32 * 3) {
      watch(shared.finished, kLongestTile * (100 + static_cast<uint64_t>(params.steps) * (1 + tiles / gridDim.x)));
    }
  } else {
    take_registers<232>();
    consume<T>(params, shared);
    arrive_if(threadIdx.x % 32 == 0, shared.finished);
  }
  __syncwarp();
  sync_blocks();  // the other may still write here
}

template <typename T>
void launch_forward(const Forward& forward, const CUtensorMap& state, int blocks, int shared_memory,
                    cudaStream_t stream) {
  launch_cooperative(forward_kernel<T>, blocks, kPair, kThreads, shared_memory, stream, state, forward);
}

}  // namespace mkconvlstm::sm90
