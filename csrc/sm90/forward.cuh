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

// Named barriers. No consumer arrives at one twice before the other has: between, it waits for staged gates that are
// fetched only when both have finished the group before.
__device__ __forceinline__ int finished_barrier(int group) { return 1 + group; }

__device__ __forceinline__ bool has_products(const Forward& params, int step) { return step > 0 || params.has_h_0; }

struct Tile {
  int step, m, n;
};

// All tiles of this block, step by step. Those of a pair are neighbours.
template <typename Body>
__device__ __forceinline__ void for_each_tile(const Forward& params, Body body) {
  const int pairs_m = params.tiles_m / kPair;
  deal(params.steps, pairs_m * params.tiles_n, params.period,
       [&](int step, int index) { body(Tile{step, index % pairs_m * kPair + rank_in_pair(), index / pairs_m}); });
}

// Gates of a tile's group, on their way through shared memory, [4][kTileRows][kTileChannels]: pre-activations come, the
// consumers put gates in their place. Each thread's own come from many lines of global memory, and loads and stores of
// so many lines would keep fragments waiting.
struct StagedGates {
  uint32_t full, memory;

  __device__ explicit StagedGates(const SharedMemory& shared)
      : full(shared.finished + 8), memory((full + 8 + 127) / 128 * 128) {}

  // By one thread, before the block's first barrier.
  __device__ void init() const { init_barrier(full, 1); }

  static __device__ constexpr int offset(int gate, int row, int channel) {
    return ((gate * kTileRows + row) * kTileChannels + channel) * 2;
  }
};

// What one thread knows of one group of a tile: two rows of pixels, four neighbouring channels. Addresses are computed
// once and without branches: one warp of each quarter of a multiprocessor is here at a time, and its instructions take
// their time.
template <typename T>
class GateStep {
 public:
  __device__ GateStep(const Forward& params, const StagedGates& staged, int warp) : params_(params), staged_(staged) {
    const int lane = threadIdx.x % 32;
    row_ = 16 * warp + lane / 4;
    channel_ = 4 * (lane % 4);
    own_ = staged.memory + StagedGates::offset(0, row_, channel_);
  }

  // Once a tile.
  __device__ __forceinline__ void place(const Tiling::Place& tile) {
    pixel_ = params_.program.tiling.pixel(tile, row_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_.index + 8 * half, image = params_.images.image(pixel);
      image_at_[half] = image * (params_.steps * params_.hidden - 1) * params_.images.pixels.value + pixel;
    }
  }

  // Biases and c_{t-1}, early enough that nobody waits for them when the same tile and group are finished. Where other
  // blocks may have made the cells, not before a box of the step before is there.
  __device__ __forceinline__ void load(Tile tile, int group) {
    const GroupChannels& g = params_.groups[group];
    const int channel = tile.n * kTileChannels + channel_;
    const int hidden_channel = g.first_hidden + channel, image = params_.images.pixels.value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_.index + 8 * half;
      there_[half] = channel < g.channels && pixel < pixel_.end;
      c_at_[half] = there_[half] ? pixel * params_.hidden + hidden_channel : 0;
      h_at_[half] = image_at_[half] + hidden_channel * image;
    }
    const float* c_prev = tile.step == 0 ? params_.c_0 : c_of(tile.step - 1);
    const float* bias = params_.bias == nullptr ? nullptr : params_.bias + (channel < g.channels ? hidden_channel : 0);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      bias_[gate] = bias == nullptr ? float4{} : *reinterpret_cast<const float4*>(bias + gate * params_.hidden);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      c_[half] = c_prev != nullptr && there_[half] ? *reinterpret_cast<const float4*>(c_prev + c_at_[half]) : float4{};
  }

  // sums: the hidden-to-hidden part of the pre-activations; overwritten. Publishes what other blocks read first, then
  // stores the rest.
  __device__ __forceinline__ void finish(float (&sums)[32], Tile tile, int group) {
    T* state = static_cast<T*>(params_.state) + (tile.step + 1) % 2 * params_.pixels * params_.hidden;
    uint2 z[2][4], h[2];
    wait_watched(staged_.full, staged_phase_);
    staged_phase_ ^= 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) load_shared(z[i / 4][i % 4], own_ + StagedGates::offset(i % 4, i / 4 * 8, 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[4], cells[4] = {c_[half].x, c_[half].y, c_[half].z, c_[half].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float* const i = sums + at(0, half, k);
        float* const f = sums + at(1, half, k);
        float* const g = sums + at(2, half, k);
        float* const o = sums + at(3, half, k);
        const Gates<float> sum{*i + bias_of(0, k) + of(z[half][0], k), *f + bias_of(1, k) + of(z[half][1], k),
                               *g + bias_of(2, k) + of(z[half][2], k), *o + bias_of(3, k) + of(z[half][3], k)};
        const auto out = cell_forward<float, HalfMath<T>>(sum, cells[k], {}, Peepholes::kNone);
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
    if (params_.keep) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const uint2 values = {HalfMath<T>::pack(sums[at(gate, half, 0)], sums[at(gate, half, 1)]),
                                HalfMath<T>::pack(sums[at(gate, half, 2)], sums[at(gate, half, 3)])};
          store_shared(own_ + StagedGates::offset(gate, 8 * half, 0), values);
        }
      }
      fence_proxy_async_shared();
    }
    if (params_.shares_cells) store_cells(tile.step);
    arrive_threads(finished_barrier(group), kPublishThreads);
    if (!params_.shares_cells) store_cells(tile.step);
    store(h, tile.step);
  }

 private:
  // Where the sum of (gate, row + 8 * half, channel + k) lies.
  static __device__ constexpr int at(int gate, int half, int k) { return (k / 2 * 4 + gate) * 4 + 2 * half + k % 2; }

  __device__ float* c_of(int step) const { return params_.c + step * params_.c_step; }

  // The k'th of four elements.
  static __device__ float of(uint2 elements, int k) {
    const float2 pair = HalfMath<T>::unpack(k < 2 ? elements.x : elements.y);
    return k % 2 == 0 ? pair.x : pair.y;
  }

  __device__ float bias_of(int gate, int k) const {
    const float4 b = bias_[gate];
    return k == 0 ? b.x : k == 1 ? b.y : k == 2 ? b.z : b.w;
  }

  __device__ __forceinline__ void store_cells(int step) {
    float* const c = c_of(step);
#pragma unroll
    for (int half = 0; half < 2; ++half) store_last_if(there_[half], c + c_at_[half], c_[half]);
  }

  __device__ __forceinline__ void store(const uint2 (&h)[2], int step) {
    const int image = params_.images.pixels.value;
    auto* const out = static_cast<uint16_t*>(params_.h) + step * params_.h_step;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t pair = k < 2 ? h[half].x : h[half].y;
        store_if(there_[half], out + (h_at_[half] + k * image), static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16));
      }
    }
  }

  const Forward& params_;
  const StagedGates& staged_;
  uint32_t own_, staged_phase_ = 0;  // where the thread's part of the staged gates begins
  int row_, channel_;
  Tiling::Pixel pixel_;  // of the tile last placed: the first row's
  int image_at_[2];      // both rows in channel 0 of h
  // Of the tile and group last loaded: whether the two rows are there, and where they lie in c and h of a step.
  bool there_[2];
  int c_at_[2], h_at_[2];
  float4 bias_[4], c_[2];
};

// One warp: the boxes of every tile, once the blocks that make them have published them.
__device__ __forceinline__ void load_images(const Forward& params, const SharedMemory& shared, const CUtensorMap* map) {
  const ForwardProgram& program = params.program;
  RingPosition ring;
  for_each_tile(params, [&](Tile tile) {
    if (!has_products(params, tile.step)) return;
    const Tiling::Place place = program.tiling.place(tile.m);
    const Neighbours near(program.tiling, place);
    for (int box = 0; box < program.box_count; ++box) {
      wait(shared.box_empty + 8 * ring.index, ring.phase ^ 1);
      for (int group = 0; group < 2; ++group) {
        if ((program.boxes[box].groups >> group & 1) != 0)
          near.wait(params.counters + group * params.tiles_m, 1, params.tiles_m, tile.step * params.tiles_n);
      }
      fence_proxy_async();
      __syncwarp();
      if (threadIdx.x % 32 == 0)
        load_box(program, shared, map, program.boxes[box].channel, place, tile.step % 2 * program.tiling.images,
                 ring.index);
      __syncwarp();
      ring.advance(program.box_slots);
    }
  });
}

// One warp: brings the pre-activations of each tile's groups, one after another. When the consumers have finished one,
// tells the other blocks, so that the consumers do not wait for memory, and sends off the gates.
__device__ __forceinline__ void exchange_tiles(const Forward& params, const StagedGates& staged,
                                               const ForwardMaps& maps) {
  const bool elected = threadIdx.x % 32 == 0;
  for_each_tile(params, [&](Tile tile) {
    const Tiling& tiling = params.program.tiling;
    const Tiling::Place place = tiling.place(tile.m);
    const int at[5] = {tile.n * kTileChannels, place.x, place.y, 0, tile.step * tiling.images + place.image};
    for (int group = 0; group < 2; ++group) {
      const bool has_gates = at[0] < params.groups[group].channels && place.image < tiling.images;
      if (elected) {
        wait_sources();
        expect_bytes(staged.full, has_gates ? kGatesBytes : 0);
        if (has_gates) copy_tensor(staged.memory, &maps.gates[group], at, staged.full);
      }
      __syncwarp();
      sync_threads(finished_barrier(group), kPublishThreads);
      if (elected) {
        publish(params.counters + group * params.tiles_m + tile.m);
        if (has_gates && params.keep) store_tensor(&maps.gates[group], at, staged.memory);
      }
    }
  });
  if (elected) wait_stores();
}

// Two warpgroups: products and gates.
template <typename T>
__device__ __forceinline__ void consume(const Forward& params, const SharedMemory& shared, const StagedGates& staged) {
  const ForwardProgram& program = params.program;
  const int warp = uniform(threadIdx.x / 32) - kProducerWarps, consumer = warp / 4;
  const int fragment_row = 16 * warp + threadIdx.x % 16;
  FragmentRow lane(program, fragment_row);
  GateStep<T> gates(params, staged, warp);
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
      const Tiling::Place place = program.tiling.place(tile.m);
      gates.place(place);
      lane.place(program, program.tiling.pixel(place, fragment_row), params.images);
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
#pragma unroll
    for (int i = 0; i < 32; ++i) finished[i] = second[i];
    before = tile;
    pending = true;
  });
  if (pending) gates.finish(finished, before, 1);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const __grid_constant__ Forward params) {
  extern __shared__ __align__(1024) char memory[];
  const SharedMemory shared(params.program, memory);
  const StagedGates staged(shared);
  if (threadIdx.x == 0) staged.init();
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
      load_images(params, shared, &maps.state);
    } else if (warp == 2) {
      exchange_tiles(params, staged, maps);
    } else if (threadIdx.x == 32 * 3) {
      watch(shared.finished, kLongestTile * (100 + static_cast<uint64_t>(params.steps) * (1 + tiles / gridDim.x)));
    }
  } else {
    take_registers<232>();
    consume<T>(params, shared, staged);
    arrive_if(threadIdx.x % 32 == 0, shared.finished);
  }
  __syncwarp();
  sync_blocks();  // the other may still write here
}

template <typename T>
void launch_forward(const Forward& forward, const ForwardMaps& maps, int blocks, int shared_memory,
                    cudaStream_t stream) {
  launch_cooperative(forward_kernel<T>, blocks, kPair, kThreads, shared_memory, stream, maps, forward);
}

}  // namespace mkconvlstm::sm90
