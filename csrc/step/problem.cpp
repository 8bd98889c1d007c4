#include "problem.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "params.h"

namespace mkconvlstm::step {

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxSide = 1 << 15;  // of a kernel, and of a dilation: products of some of them stay far below 2^63
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxPadding = 64;  // channels with which a family of kernels may fill up a convolution's

template <typename... Words>
void require(bool fulfilled, const Words&... words) {
  if (fulfilled) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

void check(const BranchShape& branch) {
  const auto [channels, kernel_height, kernel_width, dilation_height, dilation_width] = branch;
  require(channels >= 1 && channels <= kMaxInt / 4, "a branch must have 1 to ", kMaxInt / 4, " channels, got ",
          channels);
  const auto is_side = [](int64_t size) { return size >= 1 && size <= kMaxSide; };
  require(is_side(kernel_height) && is_side(kernel_width) && kernel_height % 2 == 1 && kernel_width % 2 == 1,
          "kernel sizes must be odd and at most ", kMaxSide, ", got ", kernel_height, "x", kernel_width);
  require(is_side(dilation_height) && is_side(dilation_width), "dilations must be 1 to ", kMaxSide, ", got ",
          dilation_height, "x", dilation_width);
}

void check(const Problem& problem, int multiprocessors) {
  const auto& [batch, height, width, branches] = problem;
  require(multiprocessors >= 1, "the device needs a multiprocessor, got ", multiprocessors);
  require(batch >= 0 && height >= 1 && width >= 1, "batch must not be negative, height and width positive, got ", batch,
          ", ", height, ", ", width);
  int64_t pixels = 0;
  require(!__builtin_mul_overflow(height, width, &pixels) && !__builtin_mul_overflow(pixels, batch, &pixels) &&
              height * width <= kMaxInt && pixels <= kMaxInt,
          "batch * height * width must be below 2^31");
  require(!branches.empty() && branches.size() <= kMaxBranches, "there must be 1 to ", kMaxBranches,
          " hidden branches, got ", branches.size());
  for (const BranchShape& branch : branches) check(branch);
  for (const BranchShape& branch : branches) {
    const int64_t depth = std::max(problem.hidden(), 4 * branch.channels);
    require(branch.taps() * (depth + kMaxPadding) <= kMaxInt, "taps * channels of a convolution must be below 2^31");
  }
}

}  // namespace

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Problem::hidden() const {
  return std::accumulate(branches.begin(), branches.end(), int64_t{0},
                         [](int64_t sum, const BranchShape& branch) { return sum + branch.channels; });
}

Columns share_columns(const Problem& problem, int multiprocessors) {
  check(problem, multiprocessors);
  const auto& branches = problem.branches;
  Columns columns;
  columns.order.resize(branches.size());
  std::iota(columns.order.begin(), columns.order.end(), 0);
  std::stable_sort(columns.order.begin(), columns.order.end(),
                   [&](int a, int b) { return branches[a].taps() > branches[b].taps(); });
  int64_t blocks = 0;
  for (const int r : columns.order) {
    columns.first_blocks.push_back(static_cast<int>(blocks));
    blocks += ceil_div(branches[r].channels, kBlockChannels);
  }
  require(blocks <= kMaxGridY, "there must be at most ", kMaxGridY, " blocks of ", kBlockChannels,
          " hidden channels, got ", blocks);
  columns.forward_blocks = static_cast<int>(blocks);
  columns.backward_blocks = static_cast<int>(ceil_div(problem.hidden(), kBlockColumns));
  return columns;
}

}  // namespace mkconvlstm::step
