// A tile of "same" convolutions as a matrix product on tensor cores: what both passes are built around. Rows are
// pixels, columns are four gates of some channels (forward) or hidden channels (backward).
#pragma once

#include "load.cuh"

namespace mkconvlstm::sm80 {

// Four warps: two along the pixels by two along the columns. Fragments of 16 pixels by 8 columns.
template <int kBlockPixels>
struct WarpTile {
  static constexpr int kPixels = kBlockPixels / 2;
  static constexpr int kRows = kPixels / 16;
  static constexpr int kColumns = kBlockColumns / 2 / 8;
  static_assert(kColumns == 4, "a warp loads the columns' fragments two at a time");

  float sums[kRows][kColumns][4];

  __device__ static int first_pixel() { return threadIdx.x / 32 % 2 * kPixels; }
  __device__ static int first_column() { return threadIdx.x / 64 * (kBlockColumns / 2); }
};

// Multiplies by whatever product a stage holds.
template <typename T, int kBlockPixels>
class Multiplier {
 public:
  using Tile = WarpTile<kBlockPixels>;

  __device__ Multiplier(const Sequence<T>& s, const Tiling& tiling) : s_(s), tiling_(tiling) {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const uint32_t pixel = blockIdx.x * kBlockPixels + row_of_lane(i);
      const uint32_t in_image = pixel % (s.height * s.width);
      y_[i] = pixel < s.pixels ? in_image / s.width : kOutside;
      x_[i] = in_image % s.width;
    }
  }

  __device__ void multiply(int stage, Tile& tile) const {
    const int lane = threadIdx.x % 32;
    const Product product = product_at(stage);
    int rows[Tile::kRows];
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const bool inside = y_[i] + product.dy < s_.height && x_[i] + product.dx < s_.width;
      rows[i] = inside ? kBandsBegin + (product.row + row_of_lane(i)) * kRowBytes : kZerosBegin;
    }
    const int swizzle = (product.row + row_of_lane(0)) % 8;
    const int weights = weights_begin(tiling_, stage);
    const int column = Tile::first_column() + lane / 16 * 8 + lane % 8;

#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {
      Fragment fragments[Tile::kRows], columns[Tile::kColumns / 2];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        load_matrices(fragments[i], rows[i] + ((2 * k + lane / 16) ^ swizzle) * kChunkBytes);
        round_fragment<T>(fragments[i]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kColumns / 2; ++j)
        load_matrices(columns[j], weights + chunk_offset(column + 16 * j, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j)
          sm80::multiply<T>(tile.sums[i][j], fragments[i], &columns[j / 2][j % 2 * 2]);
      }
    }
  }

 private:
  // Coordinates are unsigned and wrap around: what lies before an image lies far behind it. A tap reaches less than
  // 2^30 pixels far, so that this is outside of every image with any tap.
  static constexpr uint32_t kOutside = 3u << 30;

  __device__ static int row_of_lane(int i) { return Tile::first_pixel() + i * 16 + threadIdx.x % 16; }

  const Sequence<T>& s_;
  const Tiling& tiling_;
  uint32_t y_[Tile::kRows], x_[Tile::kRows];
};

__device__ inline float* sums_memory() { return reinterpret_cast<float*>(shared_memory() + kBandsBegin); }

// Calls put(pixel, column, sum, sum of the next column) for all sums of this thread, as the tile has them.
template <int kBlockPixels, typename Put>
__device__ void for_each_sum(const WarpTile<kBlockPixels>& tile, Put put) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < tile.kRows; ++i) {
#pragma unroll
    for (int j = 0; j < tile.kColumns; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        put(tile.first_pixel() + i * 16 + half * 8 + lane / 4, tile.first_column() + j * 8 + lane % 4 * 2,
            tile.sums[i][j][2 * half], tile.sums[i][j][2 * half + 1]);
    }
  }
}

// Products of branches [first, end).
template <typename T, typename Params>
__device__ int64_t count_products(const Params& p, int64_t t, int first, int end) {
  int64_t count = 0;
  for (int r = first; r < end; ++r) count += product_count(p.branches[r], convolved(p, p.branches[r], t).depth);
  return count;
}

// This block's share of the products of branches [first, end). True where it is all of them: then the sums are in
// sums_memory, [block pixels, kSumsRow]. Else they are in tiling.partial_sums. To be called by all threads.
template <int kBlockPixels, typename T, typename Params>
__device__ bool convolve(const Params& p, int64_t t, const Tiling& tiling, int first_branch, int end_branch,
                         unsigned column_block) {
  const int64_t count = count_products<T>(p, t, first_branch, end_branch);
  const int64_t splits = split_count(count, tiling.share);
  if (blockIdx.z >= splits) return false;
  const int begin = static_cast<int>(count * blockIdx.z / splits);
  const int products = static_cast<int>(count * (blockIdx.z + 1) / splits) - begin;
  if (threadIdx.x < kRowBytes / sizeof(float)) reinterpret_cast<float*>(shared_memory())[threadIdx.x] = 0;

  WarpTile<kBlockPixels> tile = {};
  Loader<Params, T, kBlockPixels> loader(p, t, tiling, first_branch, column_block, begin);
  const Multiplier<T, kBlockPixels> multiplier(p, tiling);
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < products) loader.load(n);
    end_copy_group();
  }
  for (int n = 0; n < products; ++n) {
    wait_for_copies<kStages - 2>();  // product n is there as far as this thread copied it,
    __syncthreads();                 // all of it is there, and product n - 1 used up
    if (n + kStages - 1 < products) loader.load((n + kStages - 1) % kStages);
    end_copy_group();
    multiplier.multiply(n % kStages, tile);
  }

  __syncthreads();
  if (splits > 1) {
    const int64_t row = int64_t{gridDim.y} * kBlockColumns;
    float* target = tiling.partial_sums + blockIdx.z * tiling.partial_rows * row +
                    int64_t{blockIdx.x} * kBlockPixels * row + blockIdx.y * kBlockColumns;
    for_each_sum(tile, [&](int m, int column, float sum, float next) {
      *reinterpret_cast<float2*>(target + m * row + column) = {sum, next};
    });
    return false;
  }
  for_each_sum(tile, [&](int m, int column, float sum, float next) {
    float* target = sums_memory() + m * kSumsRow + column;
    target[0] = sum, target[1] = next;
  });
  __syncthreads();
  return true;
}

// In place of `convolve` where there is nothing to convolve.
template <int kBlockPixels>
__device__ bool clear_sums() {
  if (blockIdx.z > 0) return false;
  for (int i = threadIdx.x; i < kBlockPixels * kSumsRow; i += kThreads) sums_memory()[i] = 0;
  __syncthreads();
  return true;
}

// Adds up, in the order of the products, what the blocks that shared out a tile have left, for kFinishPixels of its
// pixels: to sums_memory. False where the tile was not shared out.
__device__ inline bool add_partial_sums(const Tiling& tiling, int64_t products) {
  const int64_t splits = split_count(products, tiling.share), row = int64_t{gridDim.y} * kBlockColumns;
  if (splits == 1) return false;
  constexpr int kPerThread = kFinishPixels * kBlockColumns / kThreads, kPixelsAtOnce = kThreads / kBlockColumns;
  const int m = threadIdx.x / kBlockColumns, column = threadIdx.x % kBlockColumns;
  const float* partial = tiling.partial_sums + (int64_t{blockIdx.x} * kFinishPixels + m) * row +
                         blockIdx.y * kBlockColumns + column;
  float sums[kPerThread] = {};
  for (int64_t split = 0; split < splits; ++split, partial += tiling.partial_rows * row) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sums[i] += partial[i * kPixelsAtOnce * row];
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sums_memory()[(m + i * kPixelsAtOnce) * kSumsRow + column] = sums[i];
  __syncthreads();
  return true;
}

}  // namespace mkconvlstm::sm80
