#include "sequence_plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "tile_plan.h"

namespace mkconvlstm {

using namespace sm90;

namespace {

constexpr int kGroupChannels = kGroupColumns / 4;
constexpr int kMaxRadius = 15;  // of a kernel; bits of a word say which neighbours lie inside the image
// How many taps the second consumer multiplies before it finishes a group. The first one finishes at once, or after a
// tap, so that one of them keeps the tensor cores busy while the other computes gates.
constexpr int kDelayBoth = 4;
constexpr int kDelaySecond = 8;
constexpr int kBackwardBoxes = 2;  // at a time: one is multiplied, the next is on its way
constexpr int kMostBatch = 4;      // pieces whose sums backward fetches at a time

}  // namespace

void check_served(const SequenceProblem& problem) {
  if (std::min({problem.batch, problem.height, problem.width}) < 1) refuse("the problem is empty");
  if (problem.branches.empty() || problem.branches.size() > 2) refuse("one or two branches are served");
  for (const BranchShape& branch : problem.branches) {
    if (branch.kernel_height % 2 == 0 || branch.kernel_width % 2 == 0) refuse("kernel sizes must be odd");
    if (std::max(branch.kernel_height, branch.kernel_width) > 2 * kMaxRadius + 1) refuse("the kernel is too large");
    if (branch.channels < 8 || branch.channels % 8 != 0) refuse("hidden channels must be a multiple of 8 per branch");
  }
  if (problem.hidden() > kMaxBoxes * kBoxChannels) refuse("too many hidden channels");
  const int64_t most = std::numeric_limits<int32_t>::max() / (8 * problem.hidden());
  if (problem.batch > most / problem.height / problem.width) refuse("a step has too many elements");
}

namespace {

// The smaller kernel first; one branch cut in two.
std::array<ColumnGroup, 2> column_groups(const SequenceProblem& problem) {
  const auto group = [&](int branch, int64_t first_hidden) {
    const BranchShape& shape = problem.branches[branch];
    return ColumnGroup{branch,
                       0,
                       static_cast<int>(first_hidden),
                       static_cast<int>(shape.channels),
                       static_cast<int>(shape.kernel_height),
                       static_cast<int>(shape.kernel_width)};
  };
  std::array<ColumnGroup, 2> groups;
  if (problem.branches.size() == 1) {
    groups = {group(0, 0), group(0, 0)};
    groups[0].channels = std::min(groups[0].channels, round_up(ceil_div(groups[0].channels, 2), kGroupChannels));
    groups[1].first_in_branch = groups[1].first_hidden = groups[0].channels;
    groups[1].channels -= groups[0].channels;
  } else {
    groups = {group(0, 0), group(1, problem.branches[0].channels)};
    if (groups[0].kernel_height > groups[1].kernel_height || groups[0].kernel_width > groups[1].kernel_width)
      std::swap(groups[0], groups[1]);
    if (groups[0].kernel_height > groups[1].kernel_height || groups[0].kernel_width > groups[1].kernel_width)
      refuse("one kernel must lie within the other");
  }
  return groups;
}

// Taps of the second group's kernel, those that the first shares before the others.
std::vector<Tap> list_taps(const std::array<ColumnGroup, 2>& groups) {
  const int radius_y = groups[1].kernel_height / 2, radius_x = groups[1].kernel_width / 2;
  std::vector<Tap> taps;
  for (const bool shared : {true, false}) {
    for (int dy = -radius_y; dy <= radius_y; ++dy) {
      for (int dx = -radius_x; dx <= radius_x; ++dx) {
        const bool in_first = std::abs(dy) <= groups[0].kernel_height / 2 && std::abs(dx) <= groups[0].kernel_width / 2;
        if (in_first == shared) taps.push_back({dy, dx});
      }
    }
  }
  return taps;
}

// Blocks of channels, those that hold only the first group's first: they are published first.
void fill_boxes(const std::array<ColumnGroup, 2>& groups, int64_t hidden, ForwardProgram& program) {
  program.box_count = 0;
  for (const int wanted : {1, 3, 2}) {
    for (int channel = 0; channel < hidden; channel += kBoxChannels) {
      const auto holds = [&](const ColumnGroup& group) {
        return group.first_hidden < channel + kBoxChannels && channel < group.first_hidden + group.channels;
      };
      const int mask = (holds(groups[0]) ? 1 : 0) | (holds(groups[1]) ? 2 : 0);
      if (mask == wanted)
        program.boxes[program.box_count++] = {static_cast<int16_t>(channel), static_cast<uint8_t>(mask)};
    }
  }
}

struct Step {
  Columns columns;
  int box, first_tap, taps;
};

// The first boxes with all of their taps, then the shared taps of the others, then their remaining taps. So the first
// group is complete, and on its way to the other blocks, while the second is still multiplied; and what other blocks
// publish last is needed last. `whole` boxes are not kept for the remaining taps.
std::vector<Step> order_products(const ForwardProgram& program, int shared, int taps) {
  const int boxes = program.box_count;
  int first_only = 0;
  while (first_only < boxes && program.boxes[first_only].groups == 1) ++first_only;
  const int whole = shared == taps ? boxes : std::max(first_only / 2, boxes - program.box_slots);
  std::vector<Step> steps;
  const auto add = [&](int box, bool both) {
    if (both)
      steps.push_back({Columns::kBoth, box, 0, shared});
    else if (taps > shared)
      steps.push_back({Columns::kSecond, box, shared, taps - shared});
  };
  for (int box = 0; box < whole; ++box) add(box, true), add(box, false);
  for (int box = whole; box < boxes; ++box) add(box, true);
  for (int box = whole; box < boxes; ++box) add(box, false);
  return steps;
}

int stages_of(const Step& step) { return step.columns == Columns::kBoth ? step.taps : ceil_div(step.taps, 2); }

void fill_units(const std::vector<Step>& steps, const std::vector<Tap>& taps, ForwardProgram& program) {
  int count = 0;
  std::array<bool, kMaxBoxes> seen{};
  std::array<int, kMaxBoxes> last_use{};
  for (const Step& step : steps) {
    for (int i = 0; i < step.taps; ++i) {
      if (count == kMaxUnits) refuse("too many products");
      const Tap tap = taps[step.first_tap + i];
      uint8_t flags = i == 0 ? kEnterBox : 0;
      if (!seen[step.box]) flags |= kAcquireBox;
      seen[step.box] = true;
      last_use[step.box] = count;
      program.units[count++] = {offset_bytes(program, tap.dy, tap.dx), static_cast<uint8_t>(tap.dy + program.radius_y),
                                static_cast<uint8_t>(tap.dx + program.radius_x), static_cast<uint8_t>(step.box), flags};
    }
  }
  for (int box = 0; box < program.box_count; ++box) program.units[last_use[box]].flags |= kReleaseBox;
}

// The order of products as a consumer follows it, cut where it finishes a group, and after each box where there is room
// for one alone. waits_for_cells: a tile's first box tells that its cells are there.
void fill_runs(const std::vector<Step>& steps, int consumer, bool waits_for_cells, ForwardProgram& program) {
  int& count = program.run_count[consumer];
  count = 0;
  int unit = 0;
  const auto add = [&](Columns columns, int units, int actions) {
    const bool same = count > 0 && program.runs[consumer][count - 1].columns == columns && program.box_slots > 1;
    if (actions == 0 && same) {
      program.runs[consumer][count - 1].count += units;
    } else {
      if (count == kMaxRuns) refuse("too many hidden channels");
      program.runs[consumer][count++] = {static_cast<uint16_t>(unit), static_cast<uint16_t>(units), columns,
                                         static_cast<uint8_t>(actions)};
    }
    unit += units;
  };
  // A consumer may be ahead of the other by the whole ring of weights.
  const bool may_delay = consumer > 0 && program.stages_per_tile > 2 * program.stages;
  size_t last_both = 0;
  for (size_t i = 0; i < steps.size(); ++i)
    if (steps[i].columns == Columns::kBoth) last_both = i;

  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    const int finish = (i == 0 ? kFinishSecond : 0) | (i == last_both + 1 ? kFinishFirst : 0);
    int delay = finish == 0 || !may_delay ? 0 : step.columns == Columns::kBoth ? kDelayBoth : kDelaySecond;
    if (delay >= step.taps) delay = 0;
    if (i == 0 && waits_for_cells) delay = std::max(delay, 1);
    // The box may hold what the previous tile of some block still has to publish.
    if (delay > 0) add(step.columns, delay, i == 0 && program.boxes[step.box].groups != 1 ? kFinishSecondEarly : 0);
    add(step.columns, step.taps - delay, finish);
  }
  if (last_both + 1 == steps.size()) add(Columns::kSecond, 0, kFinishFirst);
}

// Every tap of every 64 gates; where dz is read, a tap's neighbour lies on the other side. Returns each unit's gates.
std::vector<GateBox> fill_backward_units(const SequenceProblem& problem, Program& program) {
  std::vector<GateBox> boxes;
  for (size_t part = 0; part < problem.branches.size(); ++part) {
    const BranchShape& branch = problem.branches[part];
    const int radius_y = branch.kernel_height / 2, radius_x = branch.kernel_width / 2;
    for (int gate = 0; gate < 4 * branch.channels; gate += kBoxChannels) {
      for (int dy = -radius_y; dy <= radius_y; ++dy) {
        for (int dx = -radius_x; dx <= radius_x; ++dx) {
          if (boxes.size() == kMaxUnits) refuse("too many products");
          program.units[boxes.size()] = {offset_bytes(program, dy, dx), static_cast<uint8_t>(dy + program.radius_y),
                                         static_cast<uint8_t>(dx + program.radius_x), 0, 0};
          boxes.push_back({static_cast<int16_t>(part), static_cast<int16_t>(gate)});
        }
      }
    }
  }
  return boxes;
}

// What finishers have in shared memory.
int finisher_bytes(int batch) { return kSumBarrierBytes + kSumBatches * batch * kChunkBytes + kStagedChunkBytes; }

// Of all hidden channels, each branch's by themselves: TMA fetches what is of one branch. Where both have an odd number
// of eights, that is a chunk more than it could be, and at worst a tile.
int all_chunks(const SequenceProblem& problem) {
  int chunks = 0;
  for (const BranchShape& branch : problem.branches) chunks += ceil_div(branch.channels, kChunkChannels);
  return chunks;
}

int most_pieces(const Program& program) { return std::min(kMaxPieces, program.stages_per_tile); }

// Cycles of a step, roughly as measured. What comes between a tile's products and those of its next step, the way of
// its sums and gradients from block to block, is hidden only behind the block's other items.
int64_t step_cycles(const BackwardProgram& program, int64_t tiles, int pieces, int multiprocessors) {
  const int64_t items = tiles * pieces;
  const Dealing dealing = deal(items, multiprocessors, true);
  const int64_t item =
      ceil_div(program.stages_per_tile, pieces) * (program.columns == Columns::kBoth ? 550 : 800) + 3000;
  const int64_t between = 6000 + ceil_div(program.chunks, pieces) * (2000 + 700 * pieces);
  // Where items rotate, blocks wait for each other more often.
  const int64_t of_a_block =
      dealing.rotates() ? items * item * 11 / (10 * dealing.blocks()) : dealing.period / dealing.pairs * item;
  return std::max(of_a_block, item + between);
}

int choose_pieces(const BackwardProgram& program, int64_t tiles, int multiprocessors) {
  int best = 1;
  for (int pieces = 2; pieces <= most_pieces(program); ++pieces) {
    if (step_cycles(program, tiles, pieces, multiprocessors) < step_cycles(program, tiles, best, multiprocessors))
      best = pieces;
  }
  return best;
}

// Pieces of whole stages, as equal as can be. A box belongs to as many pieces as have units of it.
void cut(const std::vector<GateBox>& boxes, int pieces, BackwardProgram& program) {
  int used = 0;
  program.piece_count = pieces;
  for (int p = 0; p < pieces; ++p) {
    const int stages = program.stages_per_tile;
    const int first = stages * p / pieces * program.stage_units;
    const int last = std::min(stages * (p + 1) / pieces * program.stage_units, static_cast<int>(boxes.size()));
    const int first_box = used;
    for (int i = first; i < last; ++i) {
      const auto same = [&](int other) {
        return other >= first && other < last && boxes[i].part == boxes[other].part &&
               boxes[i].first == boxes[other].first;
      };
      Unit& unit = program.units[i];
      unit.flags = same(i + 1) ? 0 : kReleaseBox;
      if (!same(i - 1)) {
        if (used == kMaxPieceBoxes || used - first_box > std::numeric_limits<uint8_t>::max()) refuse("too many gates");
        program.boxes[used++] = boxes[i];
        unit.flags |= kEnterBox | kAcquireBox;
      }
      unit.box = static_cast<uint8_t>(used - 1 - first_box);
    }
    program.pieces[p] = {static_cast<uint16_t>(first), static_cast<uint16_t>(last - first),
                         static_cast<uint16_t>(first_box), static_cast<uint16_t>(used - first_box)};
  }
}

BackwardPlan plan_columns(const SequenceProblem& problem, const HopperLimits& limits, int pieces, Columns columns) {
  BackwardPlan plan;
  BackwardProgram& program = plan.program;
  for (const BranchShape& branch : problem.branches) {
    program.radius_y = std::max(program.radius_y, static_cast<int>(branch.kernel_height / 2));
    program.radius_x = std::max(program.radius_x, static_cast<int>(branch.kernel_width / 2));
    if (branch.kernel_height * branch.kernel_width > kMaxTaps) refuse("the kernel is too large");
  }
  choose_tiling(problem, limits, finisher_bytes(1), program);
  program.columns = columns;
  program.stage_units = program.columns == Columns::kBoth ? 1 : 2;
  program.chunks = (program.columns == Columns::kBoth ? 2 : 1) * kGroupColumns / kChunkChannels;
  plan.tiles_m = pixel_tiles(program);
  program.first_chunks = ceil_div(problem.branches[0].channels, kChunkChannels);
  plan.tiles_n = ceil_div(all_chunks(problem), program.chunks);

  const std::vector<GateBox> boxes = fill_backward_units(problem, program);
  const int units = static_cast<int>(boxes.size());
  program.stages_per_tile = ceil_div(units, program.stage_units);
  const int64_t tiles = int64_t{plan.tiles_m} * plan.tiles_n;
  if (pieces == 0) pieces = choose_pieces(program, tiles, limits.multiprocessors);
  if (pieces < 1 || pieces > most_pieces(program)) refuse("a tile cannot be cut into so many pieces");
  cut(boxes, pieces, program);
  program.batch = std::min(ceil_div(pieces, kSumBatches), kMostBatch);
  const auto reserved = [&] { return finisher_bytes(program.batch); };
  const auto stages = [&] { return stages_beside(limits, reserved(), kBackwardBoxes, program); };
  while (program.batch > 1 && stages() < kEnoughStages) --program.batch;
  divide_shared_memory(limits, reserved(), kBackwardBoxes, program);

  const int64_t items = tiles * pieces;
  if (items > std::numeric_limits<int32_t>::max() / (kTileRows * program.chunks * kChunkChannels))
    refuse("too many tiles");
  plan.dealing = deal(items, limits.multiprocessors, true);
  plan.shared_memory = shared_memory(program, reserved());
  return plan;
}

}  // namespace

int64_t SequenceProblem::hidden() const {
  int64_t sum = 0;
  for (const BranchShape& branch : branches) sum += branch.channels;
  return sum;
}

int64_t ForwardPlan::packed_bytes() const { return int64_t{tiles_n} * program.stages_per_tile * kStageBytes; }
int64_t BackwardPlan::packed_bytes() const { return int64_t{tiles_n} * program.stages_per_tile * kStageBytes; }
int64_t BackwardPlan::partial_bytes() const {
  return int64_t{items()} * kTileRows * program.chunks * kChunkChannels * 4;
}

ForwardPlan plan_forward(const SequenceProblem& problem, const HopperLimits& limits) {
  check_served(problem);
  ForwardPlan plan;
  ForwardProgram& program = plan.program;
  plan.groups = column_groups(problem);
  const ColumnGroup& largest = plan.groups[1];
  program.radius_y = largest.kernel_height / 2;
  program.radius_x = largest.kernel_width / 2;
  choose_tiling(problem, limits, kStagedBytes, program);
  plan.taps = list_taps(plan.groups);
  if (plan.taps.size() > kMaxTaps) refuse("the kernel is too large");
  const int taps = static_cast<int>(plan.taps.size());
  const int shared = plan.groups[0].kernel_height * plan.groups[0].kernel_width;
  fill_boxes(plan.groups, problem.hidden(), program);
  // All of a tile, or at least two, so that the next tile's first box arrives while this one is multiplied.
  divide_shared_memory(limits, kStagedBytes, std::max(program.box_count, 2), program);

  const std::vector<Step> steps = order_products(program, shared, taps);
  program.stages_per_tile = 0;
  for (const Step& step : steps) {
    (step.columns == Columns::kBoth ? plan.both_stage : plan.second_stage)[step.box] = program.stages_per_tile;
    program.stages_per_tile += stages_of(step);
  }
  fill_units(steps, plan.taps, program);

  plan.tiles_m = pixel_tiles(program);
  plan.tiles_n = ceil_div(std::max(plan.groups[0].channels, plan.groups[1].channels), kGroupChannels);
  plan.dealing = deal(int64_t{plan.tiles_m} * plan.tiles_n, limits.multiprocessors, steps[0].taps > 1);
  for (int i = 0; i < kConsumers; ++i) fill_runs(steps, i, plan.dealing.rotates(), program);
  plan.shared_memory = shared_memory(program, kStagedBytes);
  return plan;
}

BackwardPlan plan_backward(const SequenceProblem& problem, const HopperLimits& limits, int pieces) {
  check_served(problem);
  if (all_chunks(problem) * kChunkChannels <= kGroupColumns) {
    // Two taps share a stage of weights there, so that a run could not end with each box.
    const BackwardPlan plan = plan_columns(problem, limits, pieces, Columns::kSecond);
    if (plan.program.box_slots > 1) return plan;
  }
  return plan_columns(problem, limits, pieces, Columns::kBoth);
}

}  // namespace mkconvlstm
