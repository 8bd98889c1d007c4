// Forward, what becomes of a group of a tile's channels once its sums are known.
#pragma once

#include "../gates.cuh"
#include "convolve.cuh"
#include "forward.h"
#include "half_math.cuh"

namespace mkconvlstm::sm90 {

constexpr int kTileChannels = kGroupColumns / 4;
static_assert(kTileChannels == kChunkChannels, "TMA brings as many forward and backward");
constexpr int kPublishThreads = 128 * kConsumers + 32;

// Named barriers. No consumer arrives at one twice before the other has: between, it waits for gates of the same group,
// which come only when both have finished those before.
__device__ __forceinline__ int finished_barrier(int group) { return 1 + group; }

struct Tile {
  int step, m, n;
};

// Gates of a tile's group, on their way through shared memory, [4][kTileRows][kTileChannels]: pre-activations come, the
// consumers put gates in their place. Each thread's own come from many lines of global memory, and loads and stores of
// so many lines would keep fragments waiting. Each group has its own: while one is finished, the other's are on their
// way.
struct StagedGates {
  uint32_t full, memory;  // of the first group

  __device__ explicit StagedGates(const SharedMemory& shared)
      : full(shared.finished + 8), memory((full + 8 * kGroups + 127) / 128 * 128) {}

  // By one thread, before the block's first barrier.
  __device__ void init() const {
    for (int group = 0; group < kGroups; ++group) init_barrier(full + 8 * group, 1);
  }

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

  // Once a tile, when the tile before is finished.
  __device__ __forceinline__ void place(const Tiling::Place& tile) {
    pixel_ = params_.program.tiling.pixel(tile, row_);
    const int quad = threadIdx.x % 4, row = row_ / 16 * 16 + 8 * (quad % 2) + 4 * (quad / 2);
    out_ = params_.quads ? params_.program.tiling.pixel(tile, row) : pixel_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = out_.index + 8 * half;
      const uint32_t image = params_.images.image(pixel);
      image_at_[half] = image * (params_.steps * params_.hidden - 1u) * params_.images.pixels.value + pixel;
    }
  }

  // Biases and c_{t-1}, early enough that nobody waits for them when the same tile and group are finished. Where other
  // blocks may have made the cells, not before a box of the step before is there.
  __device__ __forceinline__ void load(Tile tile, int group) {
    const GroupChannels& g = params_.groups[group];
    const int channel = tile.n * kTileChannels + channel_;
    hidden_channel_ = g.first_hidden + channel;
    channels_left_ = g.channels - tile.n * kTileChannels;
    const float* bias = params_.bias == nullptr ? nullptr : params_.bias + (channel < g.channels ? hidden_channel_ : 0);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      bias_[gate] = bias == nullptr ? float4{} : *reinterpret_cast<const float4*>(bias + gate * params_.hidden);
    const float* c_prev = tile.step == 0 ? params_.c_0 : c_of(tile.step - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_.index + 8 * half;
      there_[half] = channel < g.channels && pixel < pixel_.end;
      c_at_[half] = there_[half] ? pixel * params_.hidden + hidden_channel_ : 0;
      c_[half] = c_prev != nullptr && there_[half] ? *reinterpret_cast<const float4*>(c_prev + c_at_[half]) : float4{};
    }
  }

  // sums: the hidden-to-hidden part of the pre-activations; overwritten. Publishes what other blocks read first, then
  // stores the rest.
  __device__ __forceinline__ void finish(float (&sums)[32], Tile tile, int group) {
    T* state = static_cast<T*>(params_.state) + (tile.step + 1) % 2 * params_.pixels * params_.hidden;
    uint2 z[2][4], h[2];
    const uint32_t own = own_ + group * kGatesBytes;
    wait_watched(staged_.full + 8 * group, phase_);
    phase_ ^= group;  // the second of a tile's groups is finished after the first
#pragma unroll
    for (int i = 0; i < 8; ++i) load_shared(z[i / 4][i % 4], own + StagedGates::offset(i % 4, i / 4 * 8, 0));
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
          store_shared(own + StagedGates::offset(gate, 8 * half, 0), values);
        }
      }
    }
    fence_proxy_async_shared();  // whether gates go by TMA from there, or only the next ones come
    if (params_.shares_cells) store_cells(tile.step);
    arrive_threads(finished_barrier(group), kPublishThreads);
    if (!params_.shares_cells) store_cells(tile.step);
    auto* const output = static_cast<uint16_t*>(params_.h) + tile.step * params_.h_step;
    if (params_.quads)
      store_quads(h, output);
    else
      store_each(h, output);
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

  // h of the warp's 16 rows and channels, four neighbouring pixels of a channel at a time: transposed, a lane has two
  // rows of a channel, and another two 8 rows on; it trades either for the neighbouring lane's.
  __device__ __forceinline__ void store_quads(const uint2 (&h)[2], uint16_t* output) {
    const int lane = threadIdx.x % 32, first_channel = hidden_channel_ - channel_;
    const bool odd = lane % 2 != 0;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const uint32_t above = transpose(p == 0 ? h[0].x : h[0].y), below = transpose(p == 0 ? h[1].x : h[1].y);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? above : below, 1);
      const int channel = lane / 8 * 4 + 2 * p + lane / 4 % 2;
      const bool there = channel < channels_left_ && out_.exists();
      store_if(there, output + (image_at_[0] + (first_channel + channel) * params_.images.pixels.value),
               odd ? make_uint2(other, below) : make_uint2(above, other));
    }
  }

  __device__ __forceinline__ void store_each(const uint2 (&h)[2], uint16_t* output) {
    const int image = params_.images.pixels.value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = channel_ < channels_left_ && out_.index + 8 * half < out_.end;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t pair = k < 2 ? h[half].x : h[half].y;
        store_if(there, output + (image_at_[half] + (hidden_channel_ + k) * image),
                 static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16));
      }
    }
  }

  const Forward& params_;
  const StagedGates& staged_;
  uint32_t own_, phase_ = 0;  // where the thread's part of the first group's gates begins
  int row_, channel_;
  // Of the tile last placed: the first row's pixel; the first one whose h the thread stores; in channel 0 of h, that
  // and the one 8 rows on.
  Tiling::Pixel pixel_, out_;
  int image_at_[2];
  // Of the tile and group last loaded: the thread's first channel; how many the tile has; whether the two rows are
  // there, and where they lie in c of a step.
  int hidden_channel_, channels_left_;
  bool there_[2];
  int c_at_[2];
  float4 bias_[4], c_[2];
};

}  // namespace mkconvlstm::sm90
