// A tile of a "same" convolution as a matrix product, on plain multiply-adds: what both passes are built around.
#pragma once

#include <cstdint>

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

// Shared memory of a block. The product goes through the depth in slices of 64 bytes a pixel; two of them are there,
// so that one is written while the other is read.
template <typename Scalar, int kPixels>
struct Slices {
  static constexpr int kDepth = 64 / sizeof(Scalar);
  static constexpr int kBlockPixels = kPixelGroups * kPixels;
  static constexpr int kPadding = 16 / sizeof(Scalar);  // spreads the banks that transposing stores hit

  alignas(16) Scalar image[2][kDepth][kBlockPixels + kPadding];
  alignas(16) Scalar weights[2][kDepth][kBlockColumns];
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

// Brings the slices of one convolution, in order, from global memory through registers to shared memory.
template <typename Scalar, int kPixels>
class Loader {
 public:
  using Shared = Slices<Scalar, kPixels>;

  __device__ Loader(const Sequence<Scalar>& s, const Convolution<Scalar>& convolution, unsigned column_block,
                    Shared& slices)
      : s_(s),
        convolution_(convolution),
        slices_(slices),
        weights_(convolution.weights + int64_t{convolution.columns} * (threadIdx.x / kWeightVectors) +
                 column_block * kBlockColumns + threadIdx.x % kWeightVectors * kVector) {
    find_sources();
  }

  // The next slice into registers.
  __device__ void load() {
    const int k = first_k_ + k_of_thread();
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) {
      const bool inside = sources_[i] != kOutside && k < convolution_.depth;
      image_[i] = inside ? convolution_.image[int64_t{sources_[i]} * convolution_.depth + k] : Scalar(0);
    }
#pragma unroll
    for (int i = 0; i < kWeightLoads; ++i) {
      const int64_t row = i * (kThreads / kWeightVectors);
      weight_[i] = *reinterpret_cast<const Vector<Scalar, kVector>*>(weights_ + row * convolution_.columns);
    }
    advance();
  }

  // What was loaded into one of the two slices.
  __device__ void store(int stage) {
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) slices_.image[stage][k_of_thread()][pixel_of_thread(i)] = image_[i];
#pragma unroll
    for (int i = 0; i < kWeightLoads; ++i) {
      const int row = threadIdx.x / kWeightVectors + i * (kThreads / kWeightVectors);
      Scalar* target = &slices_.weights[stage][row][threadIdx.x % kWeightVectors * kVector];
      *reinterpret_cast<Vector<Scalar, kVector>*>(target) = weight_[i];
    }
  }

 private:
  static constexpr int kDepth = Shared::kDepth;
  static constexpr int kImageLoads = Shared::kBlockPixels * kDepth / kThreads;
  static constexpr int kVector = 16 / sizeof(Scalar);
  static constexpr int kWeightVectors = kBlockColumns / kVector;  // in one row
  static constexpr int kWeightLoads = kDepth * kWeightVectors / kThreads;
  static constexpr uint32_t kOutside = UINT32_MAX;
  static_assert(kImageLoads * kThreads == Shared::kBlockPixels * kDepth, "threads must share out a slice evenly");
  static_assert(kWeightLoads * kThreads == kDepth * kWeightVectors, "threads must share out a slice evenly");
  static_assert(kPackedDepth % kDepth == 0, "packed weights must hold whole slices");

  // Neighbouring threads load neighbouring channels of a pixel.
  __device__ int k_of_thread() const { return threadIdx.x % kDepth; }
  __device__ int pixel_of_thread(int i) const { return threadIdx.x / kDepth + i * (kThreads / kDepth); }

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

  // Which pixels the tap reads for this thread's; those outside of the image, or of the batch, are zeros.
  __device__ void find_sources() {
    const int64_t dy = int64_t{tap_y_ - convolution_.kernel_height / 2} * convolution_.dilation_height;
    const int64_t dx = int64_t{tap_x_ - convolution_.kernel_width / 2} * convolution_.dilation_width;
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) {
      const int m = pixel_of_thread(i);
      const uint32_t pixel = first_pixel_of_block<kPixels>() + m;
      const int64_t y = slices_.row[m] + dy, x = slices_.column[m] + dx;
      const bool inside = pixel < s_.pixels && y >= 0 && y < s_.height && x >= 0 && x < s_.width;
      sources_[i] = inside ? static_cast<uint32_t>(pixel + dy * s_.width + dx) : kOutside;
    }
  }

  const Sequence<Scalar>& s_;
  const Convolution<Scalar>& convolution_;
  Shared& slices_;
  const Scalar* weights_;  // what this thread loads first of the next slice
  int first_k_ = 0, tap_y_ = 0, tap_x_ = 0;
  uint32_t sources_[kImageLoads];
  Scalar image_[kImageLoads];
  Vector<Scalar, kVector> weight_[kWeightLoads];
};

// Adds this block's tile of the convolution, kBlockColumns columns from column_block * kBlockColumns on, to sums. Sums
// are taken over taps, and within a tap over channels, in order. To be called by all threads.
template <typename Scalar, int kPixels>
__device__ void convolve(const Sequence<Scalar>& s, const Convolution<Scalar>& convolution, unsigned column_block,
                         Slices<Scalar, kPixels>& slices, Sums<Scalar, kPixels>& sums) {
  constexpr int kDepth = Slices<Scalar, kPixels>::kDepth;
  const int taps = convolution.kernel_height * convolution.kernel_width;
  const int count = taps * ((convolution.depth + kDepth - 1) / kDepth);
  const int first_pixel = threadIdx.x / kLanes * kPixels;

  Loader<Scalar, kPixels> loader(s, convolution, column_block, slices);
  loader.load();
  loader.store(0);
  __syncthreads();
  for (int n = 0; n < count; ++n) {
    if (n + 1 < count) loader.load();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const auto a = *reinterpret_cast<const Vector<Scalar, kPixels>*>(&slices.image[n % 2][k][first_pixel]);
      const auto b = *reinterpret_cast<const Vector<Scalar, kColumns>*>(&slices.weights[n % 2][k][lane() * kColumns]);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] += a.values[i] * b.values[j];
      }
    }
    if (n + 1 < count) loader.store((n + 1) % 2);
    __syncthreads();
  }
}

// The peephole weights of one hidden channel at one pixel of an image.
template <typename Scalar>
__device__ PeepholeWeights<Scalar> peephole_weights(const Sequence<Scalar>& s, int channel, uint32_t in_image) {
  if (s.peepholes == Peepholes::kNone) return {};
  const int64_t row = int64_t{s.hidden} * s.peephole_pixels;
  const Scalar* w = s.peephole + int64_t{channel} * s.peephole_pixels + (s.peephole_pixels == 1 ? 0 : in_image);
  return {w[0], w[row], w[2 * row]};
}

}  // namespace mkconvlstm::simt
