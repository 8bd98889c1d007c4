// A tile of a "same" convolution as a matrix product, on plain multiply-adds: what both passes are built around.
#pragma once

#include <cstdint>

#include "../copy_async.cuh"
#include "../vector.cuh"
#include "params.h"

namespace mkconvlstm::simt {

template <typename Scalar>
struct Convolution {
  const Scalar* image;    // [pixels, depth], channels innermost
  const Scalar* weights;  // [taps, depth padded, columns], columns padded
  int depth;
  int columns;
  int kernel_height, kernel_width, dilation_height, dilation_width;
};

// Shared memory of a block. The product goes through the depth in slices of 64 bytes a pixel, slice n at stage
// n % kStages: while one is multiplied, the next ones are on their way.
template <typename Scalar, int kPixels>
struct Slices {
  static constexpr int kDepth = 64 / sizeof(Scalar);
  static constexpr int kBlockPixels = kPixelGroups * kPixels;
  static constexpr int kPadding = 16 / sizeof(Scalar);  // spreads the banks that transposing copies hit
  static constexpr int kStages = 4;

  alignas(16) Scalar image[kStages][kDepth][kBlockPixels + kPadding];
  alignas(16) Scalar weights[kStages][kDepth][kBlockColumns];
  uint32_t row[kBlockPixels], column[kBlockPixels];  // of each pixel in its image
};

// What a thread holds of the tile: kPixels neighbouring pixels by kColumns columns.
template <typename Scalar, int kPixels>
using Sums = Scalar[kPixels][kColumns];

__device__ inline int lane() { return threadIdx.x % kLanes; }

template <int kPixels>
__device__ uint32_t first_pixel_of_block() {
  return blockIdx.x * (kPixelGroups * kPixels);
}

template <int kPixels>
__device__ uint32_t first_pixel_of_thread() {
  return first_pixel_of_block<kPixels>() + threadIdx.x / kLanes * kPixels;
}

// To be called once, by all threads, before the first convolution.
template <typename Scalar, int kPixels>
__device__ void locate_pixels(const Sequence<Scalar>& s, Slices<Scalar, kPixels>& slices) {
  for (int m = threadIdx.x; m < slices.kBlockPixels; m += kThreads) {
    const uint32_t in_image = (first_pixel_of_block<kPixels>() + m) % (s.height * s.width);
    slices.row[m] = in_image / s.width;
    slices.column[m] = in_image % s.width;
  }
  __syncthreads();
}

// Brings the slices of one convolution, in order, from global to shared memory.
template <typename Scalar, int kPixels>
class Loader {
 public:
  using Shared = Slices<Scalar, kPixels>;

  __device__ Loader(const Sequence<Scalar>& s, const Convolution<Scalar>& convolution, unsigned column_block,
                    Shared& slices)
      : s_(s),
        convolution_(convolution),
        slices_(slices),
        weights_(convolution.weights + int64_t{convolution.columns} * row_of_thread() + column_block * kBlockColumns +
                 column_of_thread()) {
    find_sources();
  }

  // Starts to copy this thread's share of the next slice.
  __device__ void load(int stage) {
    const int k = first_k_ + k_of_thread();
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) {
      const bool there = (inside_ >> i & 1) && k < convolution_.depth;
      copy_async<sizeof(Scalar)>(&slices_.image[stage][k_of_thread()][pixel_of_thread(i)], sources_[i] + k,
                                 there ? sizeof(Scalar) : 0);
    }
#pragma unroll
    for (int i = 0; i < kWeightLoads; ++i) {
      copy_async<16>(&slices_.weights[stage][row_of_thread() + i * kRows][column_of_thread()],
                     weights_ + int64_t{i * kRows} * convolution_.columns);
    }
    advance();
  }

 private:
  static constexpr int kDepth = Shared::kDepth;
  static constexpr int kImageLoads = Shared::kBlockPixels * kDepth / kThreads;
  static constexpr int kVector = 16 / sizeof(Scalar);
  static constexpr int kRows = kThreads / (kBlockColumns / kVector);  // of the weights, that all threads copy at once
  static constexpr int kWeightLoads = kDepth / kRows;
  static_assert(kImageLoads * kThreads == Shared::kBlockPixels * kDepth, "threads must share out a slice evenly");
  static_assert(kWeightLoads * kRows == kDepth, "threads must share out a slice evenly");
  static_assert(kPackedDepth % kDepth == 0, "packed weights must hold whole slices");

  // Of the image, neighbouring threads copy neighbouring channels of a pixel; of the weights, neighbouring vectors.
  __device__ static int k_of_thread() { return threadIdx.x % kDepth; }
  __device__ static int pixel_of_thread(int i) { return threadIdx.x / kDepth + i * (kThreads / kDepth); }
  __device__ static int row_of_thread() { return threadIdx.x / (kBlockColumns / kVector); }
  __device__ static int column_of_thread() { return threadIdx.x % (kBlockColumns / kVector) * kVector; }

  __device__ void advance() {
    first_k_ += kDepth;
    weights_ += int64_t{kDepth} * convolution_.columns;
    if (first_k_ < convolution_.depth) return;
    // Zeros that complete kPackedDepth are skipped.
    const int padded = (first_k_ + kPackedDepth - 1) / kPackedDepth * kPackedDepth;
    weights_ += int64_t{padded - first_k_} * convolution_.columns;
    first_k_ = 0;
    if (++tap_x_ == convolution_.kernel_width) tap_x_ = 0, ++tap_y_;
    find_sources();
  }

  // The pixels that the tap reads for this thread's; those outside of the image, or of the batch, are zeros.
  __device__ void find_sources() {
    const int64_t dy = int64_t{tap_y_ - convolution_.kernel_height / 2} * convolution_.dilation_height;
    const int64_t dx = int64_t{tap_x_ - convolution_.kernel_width / 2} * convolution_.dilation_width;
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) {
      const int m = pixel_of_thread(i);
      const uint32_t pixel = first_pixel_of_block<kPixels>() + m;
      const int64_t y = slices_.row[m] + dy, x = slices_.column[m] + dx;
      const bool inside = pixel < s_.pixels && y >= 0 && y < s_.height && x >= 0 && x < s_.width;
      sources_[i] = convolution_.image + (inside ? (pixel + dy * s_.width + dx) * convolution_.depth : 0);
      inside_ |= unsigned{inside} << i;
    }
  }

  const Sequence<Scalar>& s_;
  const Convolution<Scalar>& convolution_;
  Shared& slices_;
  const Scalar* weights_;  // what this thread copies first of the next slice
  int first_k_ = 0, tap_y_ = 0, tap_x_ = 0;
  const Scalar* sources_[kImageLoads];
  unsigned inside_ = 0;  // bit i: whether source i is there
};

// Adds this block's tile of the convolution, kBlockColumns columns from column_block * kBlockColumns on, to sums. Sums
// are taken over taps, and within a tap over channels, in order. To be called by all threads.
template <typename Scalar, int kPixels>
__device__ void convolve(const Sequence<Scalar>& s, const Convolution<Scalar>& convolution, unsigned column_block,
                         Slices<Scalar, kPixels>& slices, Sums<Scalar, kPixels>& sums) {
  constexpr int kDepth = Slices<Scalar, kPixels>::kDepth;
  constexpr int kStages = Slices<Scalar, kPixels>::kStages;
  const int taps = convolution.kernel_height * convolution.kernel_width;
  const int count = taps * ((convolution.depth + kDepth - 1) / kDepth);
  const int first_pixel = threadIdx.x / kLanes * kPixels;

  Loader<Scalar, kPixels> loader(s, convolution, column_block, slices);
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < count) loader.load(n);
    end_copy_group();
  }
  for (int n = 0; n < count; ++n) {
    wait_for_copies<kStages - 2>();  // slice n is there as far as this thread copied it,
    __syncthreads();                 // all of it is there, and slice n - 1 used up
    if (n + kStages - 1 < count) loader.load((n + kStages - 1) % kStages);
    end_copy_group();

    const int stage = n % kStages;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const auto a = *reinterpret_cast<const Vector<Scalar, kPixels>*>(&slices.image[stage][k][first_pixel]);
      const auto b = *reinterpret_cast<const Vector<Scalar, kColumns>*>(&slices.weights[stage][k][lane() * kColumns]);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] += a.values[i] * b.values[j];
      }
    }
  }
  __syncthreads();
}

}  // namespace mkconvlstm::simt
