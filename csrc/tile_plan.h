// What the plans of both passes on Hopper share: tiles of pixels, shared memory, who works at what.
#pragma once

#include <stdexcept>
#include <string>

#include "sequence_plan.h"

namespace mkconvlstm {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline int round_up(int64_t a, int64_t b) { return ceil_div(a, b) * static_cast<int>(b); }

[[noreturn]] inline void refuse(const std::string& reason) { throw std::invalid_argument("plan: " + reason); }

constexpr int kMinStages = 4;     // of the ring of weights
constexpr int kEnoughStages = 5;  // fewer, and consumers wait for weights more often than what else takes memory saves

// All throw as the plans do. `reserved`: bytes of shared memory that are not for boxes and weights.

// Of the images, for a program whose radii are known: the fewest tiles, and of these the smallest boxes, that fit; those
// of which no two boxes fit count for more.
void choose_tiling(const SequenceProblem& problem, const HopperLimits& limits, int reserved, sm90::Program& program);
// In pairs: the last one may be empty.
int pixel_tiles(const sm90::Program& program);
// Of a box, by which a tap moves.
int32_t offset_bytes(const sm90::Program& program, int dy, int dx);

// Stages of weights for which there is room beside so many boxes.
int stages_beside(const HopperLimits& limits, int reserved, int box_slots, const sm90::Program& program);
// At most that many boxes, as fit beside a sufficient ring of weights.
void divide_shared_memory(const HopperLimits& limits, int reserved, int box_slots, sm90::Program& program);
int shared_memory(const sm90::Program& program, int reserved);

// The same items for a block at every step; all of them in turn where that leaves many blocks idle, and `may_rotate`.
Dealing deal(int64_t items, int multiprocessors, bool may_rotate);

}  // namespace mkconvlstm
