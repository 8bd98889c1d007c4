// The recurrence forward on Hopper, one persistent launch over all steps.
//
// A block is dealt tiles of 128 pixels x 16 channels of each of two groups, with all four gates of them: a thread has
// the gates of its channels in its own registers. Blocks tell each other by counters, one for each pixel tile and
// group, that their part of h_t is there; a tile waits for the pixel tiles that its taps touch, and for no others.
#pragma once

#include "convolve.cuh"
#include "forward.h"
#include "gate_step.cuh"
#include "launch.cuh"

namespace mkconvlstm::sm90 {

constexpr int kThreads = 32 * (kProducerWarps + 4 * kConsumers);

__device__ __forceinline__ bool has_products(const Forward& params, int step) { return step > 0 || params.has_h_0; }

// All tiles of this block, step by step. Those of a pair are neighbours.
template <typename Body>
__device__ __forceinline__ void for_each_tile(const Forward& params, Body body) {
  const int pairs_m = params.tiles_m / kPair;
  deal(params.steps, pairs_m * params.tiles_n, params.period,
       [&](int step, int index) { body(Tile{step, index % pairs_m * kPair + rank_in_pair(), index / pairs_m}); });
}

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
          wait_neighbours(near, params.counters + group * params.tiles_m, 1, params.tiles_m,
                          tile.step * params.tiles_n);
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
class Exchange {
 public:
  __device__ Exchange(const Forward& params, const StagedGates& staged, const ForwardMaps& maps)
      : params_(params), staged_(staged), maps_(maps) {}

  __device__ __forceinline__ void run() {
    Turn before{};
    bool pending = false;
    for_each_tile(params_, [&](Tile tile) {
      for (int group = 0; group < kGroups; ++group) {
        const Turn turn{tile, group};
        if (elected_) fetch(turn);
        if (pending) send(before);
        before = turn;
        pending = true;
      }
    });
    if (pending) send(before);
    if (elected_) wait_stores();
  }

 private:
  struct Turn {
    Tile tile;
    int group;
  };

  __device__ Tiling::Place place(const Turn& turn) const { return params_.program.tiling.place(turn.tile.m); }
  __device__ int channel(const Turn& turn) const { return turn.tile.n * kTileChannels; }
  __device__ int images(int steps) const { return steps * params_.program.tiling.images; }
  __device__ uint32_t* counter(const Turn& turn) const {
    return params_.counters + turn.group * params_.tiles_m + turn.tile.m;
  }
  // Whether the tile has any pixels and channels of the group.
  __device__ bool exists(const Turn& turn) const {
    return channel(turn) < params_.groups[turn.group].channels && place(turn).image < images(1);
  }

  __device__ __forceinline__ void fetch(const Turn& turn) const {
    const uint32_t full = staged_.full + 8 * turn.group;
    wait_sources();  // the tile before's have left: consumers write there even where there is nothing to fetch
    if (!exists(turn)) {
      expect_bytes(full, 0);
      return;
    }
    const Tiling::Place at = place(turn);
    expect_bytes(full, kGatesBytes);
    copy_tensor(staged_.memory + turn.group * kGatesBytes, &maps_.gates[turn.group],
                {channel(turn), at.x, at.y, 0, images(turn.tile.step) + at.image}, full);
  }

  __device__ __forceinline__ void send(const Turn& turn) const {
    __syncwarp();
    sync_threads(finished_barrier(turn.group), kPublishThreads);
    if (!elected_) return;
    publish(counter(turn));
    const Tiling::Place at = place(turn);
    if (params_.keep && exists(turn))
      store_tensor(&maps_.gates[turn.group], {channel(turn), at.x, at.y, 0, images(turn.tile.step) + at.image},
                   staged_.memory + turn.group * kGatesBytes);
  }

  const Forward& params_;
  const StagedGates& staged_;
  const ForwardMaps& maps_;
  const bool elected_ = threadIdx.x % 32 == 0;
};

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
      lane.place(program, program.tiling.pixel(program.tiling.place(tile.m), fragment_row), params.images);
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
      if ((run.actions & kFinishSecond) != 0) {
        gates.place(program.tiling.place(tile.m));
        gates.load(tile, 0);
      }
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
      Exchange(params, staged, maps).run();
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
