#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "params.h"

namespace mkconvlstm::sm80 {

namespace {

using step::BranchShape;
using step::ceil_div;

constexpr int kMostBlocks = 3;      // of a multiprocessor at once, for their registers
constexpr int kFewestProducts = 8;  // of a block: below, adding up takes longer than what is saved
constexpr int kMaxSplits = 8;

// Blocks of columns whose tiles have so many products each.
struct Work {
  int64_t products;
  int64_t blocks_y;
};

// Bands that hold what the products in flight read, and the rows of a band.
void divide_shared_memory(const step::Problem& problem, Pass& pass) {
  int shortest = kStages, halo = 0;
  for (const BranchShape& branch : problem.branches) {
    const int width = static_cast<int>(branch.kernel_width), dilation = static_cast<int>(branch.dilation_width);
    const int taps = taps_per_band(width, dilation);
    halo = std::max(halo, (taps - 1) * dilation);
    shortest = std::min(shortest, width % taps == 0 ? taps : width % taps);
  }
  // Of the kStages products in flight, the first may be a band's last; others have at least `shortest` in a band.
  pass.band_slots = 1 + static_cast<int>(ceil_div(kStages - 1, shortest));
  pass.band_rows = static_cast<int>(ceil_div(pass.block_pixels + halo, 8) * 8);
  const int operands = pass.band_slots * pass.band_rows * kRowBytes + kStages * kWeightBytes;
  const int sums = pass.block_pixels * kSumsRow * static_cast<int>(sizeof(float));
  pass.shared_memory = kBandsBegin + std::max(operands, sums);
}

// Shares out the products of the tiles that have most, as long as all blocks run at once.
void share_out(const std::vector<Work>& work, const Limits& limits, Pass& pass) {
  const int64_t at_once =
      limits.multiprocessors * std::clamp<int64_t>(limits.shared_memory / pass.shared_memory, 1, kMostBlocks);
  int64_t most = 0;
  for (const Work& w : work) most = std::max(most, w.products);
  for (int wanted = kMaxSplits; wanted >= 1; --wanted) {
    const int64_t share = ceil_div(most, wanted);
    if (wanted > 1 && share < kFewestProducts) continue;
    int64_t blocks = 0, splits = 1;
    for (const Work& w : work) {
      blocks += pass.blocks_x * w.blocks_y * split_count(w.products, share);
      splits = std::max(splits, split_count(w.products, share));
    }
    if (wanted > 1 && blocks > at_once) continue;
    pass.share = static_cast<int>(share);
    pass.splits = static_cast<int>(splits);
    return;
  }
}

// The larger tile reads each weight half as often. Where it gives too few blocks, their products are shared out first,
// and then tiles become smaller.
Pass plan_pass(const step::Problem& problem, int blocks_y, const std::vector<Work>& work, const Limits& limits) {
  for (const int pixels : {kLargeTile, kSmallTile}) {
    Pass pass;
    pass.block_pixels = pixels;
    pass.blocks_x = ceil_div(problem.pixels(), pixels);
    pass.blocks_y = blocks_y;
    divide_shared_memory(problem, pass);
    share_out(work, limits, pass);
    const bool fits = pass.shared_memory <= limits.shared_memory;
    if (pixels == kSmallTile && !fits) throw std::invalid_argument("the device has too little shared memory");
    if (fits && (pixels == kSmallTile || 8 * pass.blocks_x * blocks_y * pass.splits >= 7 * limits.multiprocessors))
      return pass;
  }
  throw std::logic_error("unreachable");
}

}  // namespace

Plan plan(const step::Problem& problem, int element_bytes, const Limits& limits) {
  Plan plan{step::share_columns(problem, limits.multiprocessors), {}, {}};
  const int slice = kRowBytes / element_bytes;
  std::vector<Work> forward;
  Work backward{0, plan.backward_blocks};
  for (const BranchShape& branch : problem.branches) {
    forward.push_back(
        {branch.taps() * ceil_div(problem.hidden(), slice), ceil_div(branch.channels, kBlockChannels)});
    backward.products += branch.taps() * ceil_div(4 * branch.channels, slice);
  }
  plan.forward = plan_pass(problem, plan.forward_blocks, forward, limits);
  plan.backward = plan_pass(problem, plan.backward_blocks, {backward}, limits);
  return plan;
}

}  // namespace mkconvlstm::sm80
