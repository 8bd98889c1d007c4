// Brings the operands of a tile's products, in order, from global to shared memory: for every branch, for every slice
// of its channels, for every tap.
#pragma once

#include <cstdint>

#include "../copy_async.cuh"
#include "../step/update.cuh"
#include "params.h"
#include "tensor_core.cuh"

namespace mkconvlstm::sm80 {

// Places in shared memory, in bytes. Of rows of kRowBytes, chunks are permuted so that the same chunk of 8 neighbouring
// rows lies in all banks.
__device__ inline int chunk_offset(int row, int chunk) { return row * kRowBytes + (chunk ^ row % 8) * kChunkBytes; }
__device__ inline int weights_begin(const Tiling& tiling, int stage) {
  return kBandsBegin + tiling.band_slots * tiling.band_rows * kRowBytes + stage * kWeightBytes;
}
__device__ inline Product& product_at(int stage) {
  return reinterpret_cast<Product*>(shared_memory() + kProductsBegin)[stage];
}

// What a branch's convolution reads.
template <typename T>
struct Image {
  const T* data;  // [pixels, row]
  int row;        // elements of a pixel
  int depth;      // of those, channels
};

template <typename T>
__device__ Image<T> convolved(const Forward<T>& p, const Branch<T>&, int64_t t) {
  return {step::previous_h(p, t), p.state_row, p.hidden};
}

template <typename T>
__device__ Image<T> convolved(const Backward<T>& p, const Branch<T>& branch, int64_t t) {
  return {branch.gates + (t + 1) * p.pixels * 4 * branch.channels, 4 * branch.channels, 4 * branch.channels};
}

template <typename T>
__device__ int product_count(const Branch<T>& branch, int depth) {
  return branch.kernel_height * branch.kernel_width * ((depth + kSlice<T> - 1) / kSlice<T>);
}

template <typename Params, typename T, int kBlockPixels>
class Loader {
 public:
  // first: the product to begin with, counted from those of branch `branch` on.
  __device__ Loader(const Params& p, int64_t t, const Tiling& tiling, int branch, unsigned column_block, int first)
      : p_(p), t_(t), tiling_(tiling), column_block_(column_block), r_(branch) {
    enter_branch();
    for (int count; first >= (count = product_count(p_.branches[r_], image_.depth)); first -= count) {
      ++r_;
      enter_branch();
    }
    const Branch<T>& branch_now = p_.branches[r_];
    weights_ += int64_t{first} * kBlockColumns * kSlice<T>;
    tap_x_ = first % branch_now.kernel_width;
    tap_y_ = first / branch_now.kernel_width % branch_now.kernel_height;
    first_channel_ = first / branch_now.kernel_width / branch_now.kernel_height * kSlice<T>;
  }

  // Starts to copy this thread's share of the next product's operands.
  __device__ void load(int stage) {
    const Branch<T>& branch = p_.branches[r_];
    unsigned char* weights = shared_memory() + weights_begin(tiling_, stage);
    const int in_band = tap_x_ % band_taps_;
    if (in_band == 0 || starts_) {
      load_band(branch, in_band);
      band_tap_ = tap_x_;
      starts_ = false;
    }
    if (threadIdx.x == 0) {
      product_at(stage) = {(tap_y_ - branch.kernel_height / 2) * branch.dilation_height, dx(branch),
                           slot_ * tiling_.band_rows + (tap_x_ - band_tap_) * branch.dilation_width};
    }
#pragma unroll
    for (int i = 0; i < kBlockColumns * kChunks / kThreads; ++i) {
      const int chunk = i * kThreads + threadIdx.x;
      copy_async_streaming(weights + chunk_offset(chunk / kChunks, chunk % kChunks), weights_ + chunk * kChunk);
    }
    advance(branch);
  }

 private:
  static constexpr int kChunks = kRowBytes / kChunkBytes;    // of a row
  static constexpr int kChunk = kChunkBytes / sizeof(T);     // elements

  __device__ int dx(const Branch<T>& branch) const {
    return (tap_x_ - branch.kernel_width / 2) * branch.dilation_width;
  }

  __device__ void enter_branch() {
    const Branch<T>& branch = p_.branches[r_];
    image_ = convolved(p_, branch, t_);
    band_taps_ = taps_per_band(branch.kernel_width, branch.dilation_width);
    weights_ =
        branch.weights + int64_t{column_block_} * product_count(branch, image_.depth) * (kBlockColumns * kSlice<T>);
    first_channel_ = tap_y_ = tap_x_ = 0;
  }

  // The pixels that this tap and the band's taps after it read, as far as there are such pixels. Which of them lie in
  // the same image as a tile's pixel is for the products to say.
  __device__ void load_band(const Branch<T>& branch, int in_band) {
    if (++slot_ == tiling_.band_slots) slot_ = 0;
    const int left = branch.kernel_width - tap_x_, taps = left < band_taps_ - in_band ? left : band_taps_ - in_band;
    const int rows = kBlockPixels + (taps - 1) * branch.dilation_width;
    const int64_t first = int64_t{blockIdx.x} * kBlockPixels + dx(branch) +
                          int64_t{tap_y_ - branch.kernel_height / 2} * branch.dilation_height * p_.width;
    unsigned char* target = shared_memory() + kBandsBegin + slot_ * tiling_.band_rows * kRowBytes;
    const bool aligned = (reinterpret_cast<uintptr_t>(image_.data) | image_.row * sizeof(T)) % kChunkBytes == 0;

    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int64_t pixel = first + i / kChunks;
      if (pixel < 0 || pixel >= p_.pixels) continue;
      const int channel = first_channel_ + i % kChunks * kChunk;
      const int left_bytes = (image_.depth - channel) * static_cast<int>(sizeof(T));
      const int bytes = left_bytes < 0 ? 0 : left_bytes < kChunkBytes ? left_bytes : kChunkBytes;
      const T* source = image_.data + (bytes == 0 ? 0 : pixel * image_.row + channel);
      unsigned char* chunk = target + chunk_offset(i / kChunks, i % kChunks);
      if (aligned) {
        copy_async<kChunkBytes>(chunk, source, bytes);
      } else {
        constexpr int kHalf = kChunkBytes / 2;
        copy_async<kHalf>(chunk, source, bytes < kHalf ? bytes : kHalf);
        copy_async<kHalf>(chunk + kHalf, bytes > kHalf ? source + kChunk / 2 : image_.data,
                          bytes > kHalf ? bytes - kHalf : 0);
      }
    }
  }

  __device__ void advance(const Branch<T>& branch) {
    weights_ += kBlockColumns * kSlice<T>;
    if (++tap_x_ < branch.kernel_width) return;
    tap_x_ = 0;
    if (++tap_y_ < branch.kernel_height) return;
    tap_y_ = 0;
    first_channel_ += kSlice<T>;
    if (first_channel_ < image_.depth || r_ + 1 == p_.branch_count) return;
    ++r_;
    enter_branch();
  }

  const Params& p_;
  const int64_t t_;
  const Tiling& tiling_;
  const unsigned column_block_;
  int r_;
  Image<T> image_{};
  const T* weights_ = nullptr;  // of the next product
  int first_channel_ = 0, tap_y_ = 0, tap_x_ = 0;
  int band_taps_ = 1;
  int slot_ = -1, band_tap_ = 0;  // the latest band's, and the tap at which it begins
  bool starts_ = true;
};

}  // namespace mkconvlstm::sm80
