// Backward, what becomes of a chunk of a tile's channels once its sums are known.
#pragma once

#include "../gates.cuh"
#include "backward.h"
#include "convolve.cuh"
#include "half_math.cuh"
#include "sums.cuh"

namespace mkconvlstm::sm90 {

// Blocks that finish a tile: one for each piece, or for the first pieces, where there are more than chunks.
__device__ __forceinline__ int shares_of(const BackwardProgram& program) {
  return min(program.piece_count, program.chunks);
}

// Chunks of an item's tile that its block finishes, if any.
struct Chunks {
  int first, last;

  __device__ Chunks(const BackwardProgram& program, const Item& item) {
    const int shares = shares_of(program), share = min(item.piece, shares);
    first = program.chunks * share / shares;
    last = program.chunks * min(share + 1, shares) / shares;
  }
};

// The channels of a chunk: of one part, which has none of the last chunks that a tile may have.
struct ChunkChannels {
  int part, first;  // in the part
  bool exist;

  __device__ ChunkChannels(const Backward& params, const Item& item, int chunk) {
    const int number = item.n * params.program.chunks + chunk;
    part = number >= params.program.first_chunks;
    first = (number - part * params.program.first_chunks) * kChunkChannels;
    exist = first < params.parts[part].channels;
  }
};

// Gates and cells of a chunk on their way through shared memory, where the finishers put the gates' gradients in their
// place: gates [4][kTileRows][kChunkChannels] of T; c_t and c_{t-1} [kTileRows][kChunkChannels] of their type, c_0 of
// float.
struct StagedChunk {
  uint32_t gates, cells, cells_before, full, used;

  __device__ explicit StagedChunk(uint32_t memory)
      : gates(memory),
        cells(gates + kGatesBytes),
        cells_before(cells + kChunkBytes),
        full(cells_before + kChunkBytes),
        used(full + 8) {}

  // By one thread, before the block's first barrier.
  __device__ void init() const {
    init_barrier(full, 1);
    init_barrier(used, kFinisherThreads / 32);
  }
};

// One lane: brings gates and cells of every chunk that this block finishes, one after another, and sends off what the
// finishers have made of the gates. When a whole item is there, tells the other blocks.
class ChunkExchange {
 public:
  __device__ ChunkExchange(const Backward& params, const StagedChunk& staged, const BackwardMaps& maps)
      : params_(params), staged_(staged), maps_(maps) {}

  // The next chunk, once the finishers are done with the one before.
  __device__ __forceinline__ void next(int step, const Item& item, int chunk, bool last) {
    const bool pending = m_ >= 0;
    if (pending) send();
    const Tiling& tiling = params_.program.tiling;
    const Tiling::Place place = tiling.place(item.m);
    const ChunkChannels channels(params_, item, chunk);
    part_ = channels.part;
    channel_ = channels.first;
    x_ = place.x;
    y_ = place.y;
    image_ = step * tiling.images + place.image;
    exists_ = channels.exist && place.image < tiling.images;
    fetch(step > 0);
    if (pending && last_) publish_item();
    m_ = item.m;
    last_ = last;
  }

  // After the last one.
  __device__ __forceinline__ void end() {
    if (m_ < 0) return;
    send();
    publish_item();
  }

 private:
  __device__ __forceinline__ void fetch(bool after_first) const {
    wait_sources();  // of the chunk before
    if (!exists_) {
      expect_bytes(staged_.full, 0);
      return;
    }
    const bool has_before = after_first || params_.c_0 != nullptr;
    const int half = params_.c_is_half ? 2 : 1;
    expect_bytes(staged_.full,
                 kGatesBytes + kChunkBytes / half + (has_before ? kChunkBytes / (after_first ? half : 1) : 0));
    copy_tensor(staged_.gates, &maps_.gates[part_], {channel_, x_, y_, 0, image_}, staged_.full);
    const int hidden_channel = params_.parts[part_].first_hidden + channel_;
    copy_tensor(staged_.cells, &maps_.cells, {hidden_channel, x_, y_, image_}, staged_.full);
    if (!has_before) return;
    const int before = after_first ? image_ - params_.program.tiling.images : image_;
    copy_tensor(staged_.cells_before, after_first ? &maps_.cells : &maps_.c_0, {hidden_channel, x_, y_, before},
                staged_.full);
  }

  __device__ __forceinline__ void send() {
    wait(staged_.used, phase_);
    phase_ ^= 1;
    if (exists_) store_tensor(&maps_.gates[part_], {channel_, x_, y_, 0, image_}, staged_.gates);
  }

  __device__ __forceinline__ void publish_item() const {
    wait_stores();
    fence_proxy_async();
    publish(params_.finished + m_ * kCounterStride);
  }

  const Backward& params_;
  const StagedChunk& staged_;
  const BackwardMaps& maps_;
  // Of the chunk that is being finished: its pixels' tile, or -1; whether it is its item's last one; where it begins,
  // images counted through all steps.
  int m_ = -1;
  bool last_, exists_;
  int part_, channel_, x_, y_, image_;
  uint32_t phase_ = 0;
};

// What one thread makes of two rows of pixels, four neighbouring channels each.
template <typename T>
class GradientStep {
 public:
  // Of a chunk: what comes neither from its sums nor through shared memory.
  struct Loaded {
    int channel;  // the first of the four among all hidden channels, or beyond
    T dh[2][4];
    float4 dc[2];
  };

  __device__ GradientStep(const Backward& params, const StagedChunk& staged, int thread)
      : params_(params), staged_(staged) {
    row_ = 16 * (thread / 32) + thread % 32 / 4;
    channel_ = 4 * (thread % 4);
  }

  __device__ __forceinline__ void place(const Item& item) {
    const Tiling& tiling = params_.program.tiling;
    pixel_ = tiling.pixel(tiling.place(item.m), row_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_.index + 8 * half;
      const int image = params_.images.image(pixel), in_image = pixel - image * params_.images.pixels.value;
      dh_at_[half] = image * params_.dh_image + in_image * params_.dh_pixel;
    }
  }

  // All but dc.
  __device__ __forceinline__ Loaded load(int step, const Item& item, int chunk) const {
    const ChunkChannels channels(params_, item, chunk);
    const GatePart& part = params_.parts[channels.part];
    const int channel = channels.first + channel_;
    Loaded loaded{channel < part.channels ? part.first_hidden + channel : params_.hidden, {}, {}};
    if (step < 0 || params_.dh == nullptr) return loaded;
    const int64_t first = step * params_.dh_step + loaded.channel * params_.dh_channel;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!there(half, loaded.channel)) continue;
      const T* dh = static_cast<const T*>(params_.dh) + (dh_at_[half] + first);
#pragma unroll
      for (int k = 0; k < 4; ++k) loaded.dh[half][k] = dh[k * params_.dh_channel];
    }
    return loaded;
  }

  // dc, of which another block may have had the next step: once the item's sums are known to be there.
  __device__ __forceinline__ void load_carried(int step, Loaded& loaded) const {
    if (step < 0 || step == params_.steps - 1) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (there(half, loaded.channel)) loaded.dc[half] = load4(params_.dc + element_of(half, loaded.channel));
  }

  // Leaves what step's gates become in their place, or stores dh_0. dh: the gradient of h_t through step t + 1.
  __device__ __forceinline__ void finish(int step, const Loaded& loaded, const float4 (&dh)[2]) {
    if (step < 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (there(half, loaded.channel))
          *reinterpret_cast<uint2*>(static_cast<T*>(params_.dh_0) + element_of(half, loaded.channel)) = pack(dh[half]);
      }
      return;
    }
    wait(staged_.full, phase_);
    phase_ ^= 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) store(step, half, loaded, dh[half]);
    fence_proxy_async_shared();
    __syncwarp();
    arrive_if(threadIdx.x % 32 == 0, staged_.used);
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

  __device__ bool there(int half, int channel) const {
    return pixel_.index + 8 * half < pixel_.end && channel < params_.hidden;
  }

  __device__ int element_of(int half, int channel) const {
    return (pixel_.index + 8 * half) * params_.hidden + channel;
  }

  // Whether dc_n enters at a step.
  __device__ bool ends(int step, int half) const {
    return params_.dc_n != nullptr &&
           step + 1 == (params_.lengths == nullptr ? params_.steps
                                                   : params_.lengths[params_.images.image(pixel_.index + 8 * half)]);
  }

  __device__ float4 cells(uint32_t staged, bool are_half, int row) const {
    const int element = row * kChunkChannels + channel_;
    if (!are_half) return load_shared(staged + 4 * element);
    uint2 pairs;
    load_shared(pairs, staged + 2 * element);
    return unpack(pairs);
  }

  __device__ __forceinline__ void store(int step, int half, const Loaded& loaded, float4 dh) {
    const int row = row_ + 8 * half;
    const uint32_t staged = staged_.gates + (row * kChunkChannels + channel_) * 2;
    float4 gates[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      uint2 values;
      load_shared(values, staged + gate * kTileRows * kChunkChannels * 2);
      gates[gate] = unpack(values);
    }
    const float4 c = cells(staged_.cells, params_.c_is_half, row);
    const float4 c_prev = step == 0 && params_.c_0 == nullptr
                              ? float4{}
                              : cells(staged_.cells_before, params_.c_is_half && step > 0, row);
    if (!there(half, loaded.channel)) return;
    const int element = element_of(half, loaded.channel);
    float4 dc = loaded.dc[half];
    if (ends(step, half)) dc = add(dc, load4(params_.dc_n + element));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto at = [k](auto& values) -> auto& { return (&values.x)[k]; };
      const auto out = cell_backward<float, HalfMath<T>>(
          {at(gates[0]), at(gates[1]), at(gates[2]), at(gates[3])}, at(c_prev), at(c),
          at(dh) + static_cast<float>(loaded.dh[half][k]), at(dc), {}, Peepholes::kNone);
      at(gates[0]) = out.dz.i;
      at(gates[1]) = out.dz.f;
      at(gates[2]) = out.dz.g;
      at(gates[3]) = out.dz.o;
      at(dc) = out.dc_prev;
    }
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      store_shared(staged + gate * kTileRows * kChunkChannels * 2, pack(gates[gate]));
    *reinterpret_cast<float4*>(params_.dc + element) = dc;
  }

  const Backward& params_;
  const StagedChunk& staged_;
  int row_, channel_;    // of a tile and a chunk; the second row is 8 later
  Tiling::Pixel pixel_;  // of the first row
  int64_t dh_at_[2];     // where both rows' pixels are in channel 0 of dh of step 0
  uint32_t phase_ = 0;
};

}  // namespace mkconvlstm::sm90
