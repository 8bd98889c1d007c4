// The pointwise step on a CPU, one tile at a time: tiles may be worked on by several threads at once.
#pragma once

#include <cstdint>

#include "gate_step.h"
#include "plan.h"

namespace mkconvlstm {

// A block of one image, small enough for a tile of every operand to stay in the first-level cache.
struct Tile {
  static constexpr int64_t kElements = 1024, kMaxChannels = 64;

  int64_t image, pixel, channel;  // where it begins
  int64_t pixels, channels;       // its sizes
};

int64_t count_tiles(const GateStep& step);
Tile tile_at(const GateStep& step, int64_t index);

// Every tile reads all that it needs before it writes: c may be c_prev.
void advance(const GateStepForward& step, DType dtype, const Tile& tile);
void advance(const GateStepBackward& step, DType dtype, const Tile& tile);

}  // namespace mkconvlstm
