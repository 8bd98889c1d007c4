#include "plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "params.h"

namespace mkconvlstm::simt {

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxSide = 1 << 15;  // of a kernel, and of a dilation: products of some of them stay far below 2^63
constexpr int64_t kMaxGridY = 65535;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  const auto [batch, height, width, branches] = problem;
  require(multiprocessors >= 1, "the device needs a multiprocessor, got ", multiprocessors);
  require(batch >= 0 && height >= 1 && width >= 1, "batch must not be negative, height and width positive, got ", batch,
          ", ", height, ", ", width);
  int64_t pixels = 0;
  require(!__builtin_mul_overflow(height, width, &pixels) && !__builtin_mul_overflow(pixels, batch, &pixels) &&
              height * width <= kMaxInt && pixels <= kMaxInt,
          "batch * height * width must be below 2^31");
  require(!branches.empty() && branches.size() <= kMaxBranches, "there must be 1 to ", kMaxBranches,
          " hidden branches, got ", branches.size());
  int64_t hidden = 0, channel_blocks = 0;
  for (const BranchShape& branch : branches) {
    check(branch);
    hidden += branch.channels;
    channel_blocks += ceil_div(branch.channels, kLanes);
  }
  require(channel_blocks <= kMaxGridY, "there must be at most ", kMaxGridY, " blocks of ", kLanes,
          " hidden channels, got ", channel_blocks);
  for (const BranchShape& branch : branches) {
    const int64_t depth = std::max(hidden, 4 * branch.channels);
    require(branch.taps() * (depth + kPackedDepth) <= kMaxInt, "taps * channels of a convolution must be below 2^31");
  }
}

// The largest tile with which few multiprocessors are idle: measured, a larger tile beats more blocks.
Pass plan_pass(int64_t pixels, int64_t blocks_y, int multiprocessors) {
  Pass pass{8, 0, static_cast<int>(blocks_y)};
  const auto blocks_x = [&] { return ceil_div(pixels, kPixelGroups * pass.pixels_per_thread); };
  while (pass.pixels_per_thread > 2 && 8 * blocks_x() * blocks_y < 7 * multiprocessors) pass.pixels_per_thread /= 2;
  pass.blocks_x = blocks_x();
  return pass;
}

}  // namespace

Plan plan(const Problem& problem, int multiprocessors) {
  check(problem, multiprocessors);
  const int64_t pixels = problem.batch * problem.height * problem.width;
  const auto& branches = problem.branches;

  Plan plan;
  plan.order.resize(branches.size());
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](int a, int b) { return branches[a].taps() > branches[b].taps(); });

  int64_t hidden = 0, blocks = 0;
  for (const int r : plan.order) {
    plan.first_blocks.push_back(static_cast<int>(blocks));
    blocks += ceil_div(branches[r].channels, kLanes);
    hidden += branches[r].channels;
  }
  plan.forward = plan_pass(pixels, blocks, multiprocessors);
  plan.backward = plan_pass(pixels, ceil_div(hidden, kBlockColumns), multiprocessors);
  return plan;
}

}  // namespace mkconvlstm::simt
