// Sums of a tile's pieces, from the consumers that multiply them to the finishers that add them up.
#pragma once

#include "backward.h"
#include "convolve.cuh"

namespace mkconvlstm::sm90 {

constexpr int kConsumerThreads = 128 * kConsumers;
constexpr int kFinisherThreads = kConsumerThreads;  // one for each consumer's thread, whose sums it adds up

// Named barriers.
constexpr int kSummedBarrier = 1, kFinishedBarrier = 2;
constexpr int kSummedThreads = kConsumerThreads + 32;

struct Item {
  int index, tile, m, n, piece;
};

__device__ __forceinline__ float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// A group's sums: of every 16 channels both rows of the thread, four neighbouring channels each.
__device__ __forceinline__ void store_sums(const float (&sums)[32], float4* partial) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* values = sums + i / 2 * 8 + i % 2 * 2;
    __stcg(partial + i * kConsumerThreads, make_float4(values[0], values[1], values[4], values[5]));
  }
}

// A chunk's sums of all pieces on their way to the finishers, some pieces at a time. Registers would hold too few of
// them to hide how long each is on its way.
class SumBatches {
 public:
  __device__ SumBatches(const Backward& params, const SharedMemory& shared, int thread)
      : params_(params), per_chunk_((params.program.piece_count + params.program.batch - 1) / params.program.batch) {
    barriers_ = shared.finished + 8;
    memory_ = (barriers_ + 8 * kSumBatches + 127) / 128 * 128;
    own_ = memory_ + 16 * thread;
  }

  // By one thread, before the block's first barrier.
  __device__ void init() const {
    for (int i = 0; i < kSumBatches; ++i) init_barrier(barriers_ + 8 * i, 1);
  }

  // Where shared memory goes on.
  __device__ uint32_t end() const { return memory_ + kSumBatches * params_.program.batch * kChunkBytes; }

  // By one thread: chunks [first, last) of an item's tile, from now on; the first batches at once.
  __device__ __forceinline__ void begin(const Item& item, int first, int last) {
    item_ = item.index - item.piece;
    next_ = first * per_chunk_;
    end_ = last * per_chunk_;
#pragma unroll 1
    for (int i = 0; i < kSumBatches; ++i) request();
  }

  // By one thread: the next batch, if there is one, where all finishers have taken the one before.
  __device__ __forceinline__ void request() {
    if (next_ == end_) return;
    const int chunk = next_ / per_chunk_, first = next_ % per_chunk_ * params_.program.batch;
    const int count = min(params_.program.batch, params_.program.piece_count - first);
    const uint32_t barrier = barriers_ + 8 * filled_.index;
    expect_bytes(barrier, count * kChunkBytes);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int64_t source = int64_t{item_ + first + i} * params_.program.chunks + chunk;
      copy_bulk(memory_ + (filled_.index * params_.program.batch + i) * kChunkBytes,
                reinterpret_cast<const char*>(params_.partial) + source * kChunkBytes, kChunkBytes, barrier);
    }
    filled_.advance(kSumBatches);
    ++next_;
  }

  // By all finishers: this thread's sums of a chunk, both rows.
  __device__ __forceinline__ void add_up(bool elected, float4 (&sums)[2]) {
    for (int first = 0; first < params_.program.piece_count; first += params_.program.batch) {
      const int count = min(params_.program.batch, params_.program.piece_count - first);
      wait(barriers_ + 8 * taken_.index, taken_.phase);
      uint32_t address = own_ + taken_.index * params_.program.batch * kChunkBytes;
      for (int i = 0; i < count; ++i, address += kChunkBytes) {
        sums[0] = add(sums[0], load_shared(address));
        sums[1] = add(sums[1], load_shared(address + kChunkBytes / 2));
      }
      taken_.advance(kSumBatches);
      sync_threads(kFinishedBarrier, kFinisherThreads);
      if (elected) request();
    }
  }

 private:
  const Backward& params_;
  int per_chunk_;  // batches
  uint32_t barriers_, memory_, own_;
  int item_ = 0, next_ = 0, end_ = 0;  // of the thread that requests: the tile's first item, batches of all chunks
  RingPosition filled_, taken_;
};

}  // namespace mkconvlstm::sm90
