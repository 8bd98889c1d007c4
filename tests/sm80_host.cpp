// The tensor-core kernels on a CPU, for test_sm80.py. Warps' instructions are noted down and carried out at the next
// barrier, when all lanes have brought their part.
#include <algorithm>
#include <cmath>

#include "host_bfloat16.h"
#include "host_block.h"

namespace {

struct float2 {
  float x, y;
};

}  // namespace

#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "step_host.h"

namespace {

using namespace sm80;

constexpr int kWarp = 32;
constexpr size_t kSharedBytes = 1 << 18;
alignas(128) unsigned char memory[kSharedBytes];

// One lane's part in an instruction: loads have no sums. A fragment that is not loaded yet holds the index of its value.
struct Part {
  int row;
  float* sums;
  uint32_t rows[4], columns[2];
  size_t element_bytes;
};

std::vector<Part> parts[kThreads];
std::vector<uint32_t> values[kThreads];

void load(int warp, size_t n) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = parts[warp * kWarp + matrix * 8 + lane / 4][n].row + lane % 4 * 4;
      if (row < 0 || row + 4 > static_cast<int>(kSharedBytes)) std::abort();
      std::memcpy(&values[warp * kWarp + lane][n * 4 + matrix], memory + row, 4);
    }
  }
}

// Elements of a 32-bit register as floats.
void unpack(uint32_t value, size_t element_bytes, float (&elements)[2]) {
  std::memcpy(elements, &value, 4);
  if (element_bytes == 4) return;
  Brain pair[2];
  std::memcpy(pair, &value, 4);
  for (int e = 0; e < 2; ++e) elements[e] = static_cast<float>(pair[e]);
}

void multiply(int warp, size_t n) {
  const size_t bytes = parts[warp * kWarp][n].element_bytes;
  const int in_register = 4 / bytes;
  float rows[16][16] = {}, columns[8][16] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    const Part& part = parts[warp * kWarp + lane][n];
    const auto& known = values[warp * kWarp + lane];
    for (int r = 0; r < 4; ++r) {
      float elements[2];
      unpack(known[part.rows[r]], bytes, elements);
      for (int e = 0; e < in_register; ++e)
        rows[lane / 4 + r % 2 * 8][(lane % 4 + r / 2 * 4) * in_register + e] = elements[e];
      if (r >= 2) continue;
      unpack(known[part.columns[r]], bytes, elements);
      for (int e = 0; e < in_register; ++e) columns[lane / 4][(lane % 4 + r * 4) * in_register + e] = elements[e];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 8 * in_register; ++k)
        parts[warp * kWarp + lane][n].sums[e] += rows[row][k] * columns[column][k];
    }
  }
}

void carry_out() {
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    const size_t count = parts[warp * kWarp].size();
    for (int lane = 0; lane < kWarp; ++lane) {
      if (parts[warp * kWarp + lane].size() != count) std::abort();
      values[warp * kWarp + lane].resize(count * 4);
    }
    for (size_t n = 0; n < count; ++n) parts[warp * kWarp][n].sums == nullptr ? load(warp, n) : multiply(warp, n);
    for (int lane = 0; lane < kWarp; ++lane) parts[warp * kWarp + lane].clear();
  }
}

}  // namespace

namespace mkconvlstm::sm80 {

unsigned char* shared_memory() { return memory; }

void load_matrices(Fragment& fragment, int row) {
  auto& known = parts[threadIdx.x];
  for (uint32_t i = 0; i < 4; ++i) fragment[i] = known.size() * 4 + i;
  known.push_back({row, nullptr, {}, {}, 0});
}

template <typename T>
void multiply(float (&sums)[4], const Fragment& rows, const uint32_t* columns) {
  parts[threadIdx.x].push_back({0, sums, {rows[0], rows[1], rows[2], rows[3]}, {columns[0], columns[1]}, sizeof(T)});
}

}  // namespace mkconvlstm::sm80

namespace {

template <int kBlockPixels, typename T>
void run_kernel(const Index& blocks, const Forward<T>& p, const Tiling& tiling, int64_t t) {
  run_grid(kThreads, blocks, [&] { forward_kernel<T, kBlockPixels>(p, tiling, t); });
}

template <int kBlockPixels, typename T>
void run_kernel(const Index& blocks, const Backward<T>& p, const Tiling& tiling, int64_t t) {
  run_grid(kThreads, blocks, [&] { backward_kernel<T, kBlockPixels>(p, tiling, t); });
}

template <typename T>
void run_finish(const Index& blocks, const Forward<T>& p, const Tiling& tiling, int64_t t) {
  run_grid(kThreads, blocks, [&] { forward_finish_kernel<T>(p, tiling, t); });
}

template <typename T>
void run_finish(const Index& blocks, const Backward<T>& p, const Tiling& tiling, int64_t t) {
  run_grid(kThreads, blocks, [&] { backward_finish_kernel<T>(p, tiling, t); });
}

template <typename T>
int64_t most_products(const Forward<T>& p, int64_t t) {
  int64_t most = 0;
  for (int r = 0; r < p.branch_count; ++r) most = std::max(most, count_products<T>(p, t, r, r + 1));
  return most;
}

template <typename T>
int64_t most_products(const Backward<T>& p, int64_t t) {
  return count_products<T>(p, t, 0, p.branch_count);
}

template <typename Params>
void run_step(const Sizes& sizes, const Params& p, int64_t t) {
  const auto [block_pixels, share, band_slots, band_rows] = sizes.family;
  const int64_t rows = sizes.blocks_x * block_pixels;
  const int64_t splits = step::convolves(p, t) ? split_count(most_products(p, t), share) : 1;
  std::vector<float> partial_sums(splits * rows * sizes.blocks_y * kBlockColumns, NAN);
  const Tiling tiling{static_cast<int>(band_slots), static_cast<int>(band_rows), static_cast<int>(share), rows,
                      partial_sums.data()};
  at_barrier = carry_out;
  std::memset(memory, 0xff, kSharedBytes);  // NaN
  const auto columns = static_cast<unsigned>(sizes.blocks_y);
  const Index blocks{static_cast<unsigned>(sizes.blocks_x), columns, static_cast<unsigned>(splits)};
  block_pixels == 128 ? run_kernel<128>(blocks, p, tiling, t) : run_kernel<64>(blocks, p, tiling, t);
  if (splits > 1) run_finish({(p.pixels + kFinishPixels - 1) / kFinishPixels, columns, 1}, p, tiling, t);
}

template <typename Function>
void with_element(int64_t bytes, Function function) {
  bytes == 4 ? function(float()) : function(Brain());
}

}  // namespace

extern "C" void sm80_forward(int64_t bytes, const Sizes* sizes, const int64_t* branches, void** gates, void** weights,
                             void** operands) {
  with_element(bytes, [&](auto element) {
    run_forward<decltype(element)>(*sizes, branches, gates, weights, operands,
                                   [&](const auto& p, int64_t t) { run_step(*sizes, p, t); });
  });
}

extern "C" void sm80_backward(int64_t bytes, const Sizes* sizes, const int64_t* branches, void** gates, void** weights,
                              void** operands, const int64_t* dh_strides) {
  with_element(bytes, [&](auto element) {
    run_backward<decltype(element)>(*sizes, branches, gates, weights, operands, dh_strides,
                                    [&](const auto& p, int64_t t) { run_step(*sizes, p, t); });
  });
}
