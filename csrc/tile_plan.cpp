#include "tile_plan.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

namespace mkconvlstm {

using namespace sm90;

namespace {

constexpr int kMaxChunkWidth = 256;  // of one TMA load
constexpr int kMaxMargin = 1 << 15;  // rows of a box, far more than fit into shared memory

// Rows of pixels, and then patches, the widest first.
std::vector<Tiling> tilings(const SequenceProblem& problem, const Program& program) {
  const auto [batch, height, width] =
      std::array{static_cast<int>(problem.batch), static_cast<int>(problem.height), static_cast<int>(problem.width)};
  std::vector<Tiling> result;
  if (program.radius_y * problem.width + program.radius_x < kMaxMargin)
    result.push_back(Tiling::of_rows(batch, height, width, program.radius_y, program.radius_x));
  for (int bits = kTileRowBits; bits >= kLeastColumnBits; --bits)
    result.push_back(Tiling::of_patches(batch, height, width, program.radius_y, program.radius_x, bits));
  return result;
}

void use(const Tiling& tiling, Program& program) {
  program.tiling = tiling;
  program.box_chunks = ceil_div(tiling.box_width(), kMaxChunkWidth);
  program.chunk_width = ceil_div(tiling.box_width(), program.box_chunks);
  // Each chunk begins where the swizzle does; side by side, they are a box only where it has one line.
  if (program.box_chunks > 1) program.chunk_width = round_up(program.chunk_width, kBoxAlignment / kRowBytes);
}

}  // namespace

int stages_beside(const HopperLimits& limits, int reserved, int box_slots, const Program& program) {
  const int available = limits.shared_memory - reserved - kZeroBytes - kBarrierBytes;
  return (available - box_slots * program.box_bytes()) / kStageBytes;
}

void choose_tiling(const SequenceProblem& problem, const HopperLimits& limits, int reserved, Program& program) {
  std::optional<std::pair<int64_t, int>> least;
  Program candidate = program, best;
  for (const Tiling& tiling : tilings(problem, program)) {
    use(tiling, candidate);
    if (stages_beside(limits, reserved, 1, candidate) < kMinStages) continue;
    const bool two_fit = stages_beside(limits, reserved, 2, candidate) >= kMinStages;
    const std::pair<int64_t, int> cost{int64_t{tiling.tiles()} * (two_fit ? 2 : 3), candidate.box_bytes()};
    if (!least || cost < *least) least = cost, best = candidate;
  }
  if (!least) refuse("the kernel is too large: a tile and its margins do not fit into shared memory");
  program = best;
}

int pixel_tiles(const Program& program) { return round_up(program.tiling.tiles(), kPair); }

int32_t offset_bytes(const Program& program, int dy, int dx) { return (dy * program.tiling.line + dx) * kRowBytes; }

void divide_shared_memory(const HopperLimits& limits, int reserved, int box_slots, Program& program) {
  const auto stages = [&](int slots) { return stages_beside(limits, reserved, slots, program); };
  program.box_slots = box_slots;
  while (program.box_slots > 2 && stages(program.box_slots) < kEnoughStages) --program.box_slots;
  while (program.box_slots > 1 && stages(program.box_slots) < kMinStages) --program.box_slots;
  program.stages = std::min(kMaxStages, stages(program.box_slots));
}

int shared_memory(const Program& program, int reserved) {
  return program.box_slots * program.box_bytes() + kZeroBytes + program.stages * kStageBytes + kBarrierBytes + reserved;
}

Dealing deal(int64_t items, int multiprocessors, bool may_rotate) {
  if (multiprocessors < kPair) refuse("two multiprocessors work at a pair of tiles");
  const int64_t pairs = items / kPair, most = multiprocessors / kPair, rounds = ceil_div(pairs, most);
  if (may_rotate && 20 * rounds * most >= 21 * pairs && rounds > 1)
    return {static_cast<int>(most), static_cast<int>(pairs)};
  const int used = ceil_div(pairs, rounds);
  return {used, static_cast<int>(rounds * used)};
}

}  // namespace mkconvlstm
