// What a Hopper kernel does for one tile, as data: the plan writes it on the host, the kernels only follow it.
//
// A tile is kTileRows pixels, see Tiling, times one or two groups of kGroupColumns output columns. The operand, h or
// dz, is read in boxes of kBoxChannels channels, each with all pixels that any tap of the tile touches. A tap is one
// position of a kernel: the same rows of a box, moved.
#pragma once

#include <cstdint>

#include "tiling.h"

namespace mkconvlstm::sm90 {

constexpr int kGroups = 2;
constexpr int kGroupColumns = 64;
constexpr int kBoxChannels = 64;
constexpr int kGroupWeightBytes = kGroupColumns * kBoxChannels * 2;  // of one tap
constexpr int kStageBytes = 2 * kGroupWeightBytes;                   // one tap of both groups, or two taps of one
constexpr int kRowBytes = kBoxChannels * 2;
constexpr int kBoxAlignment = 8 * kRowBytes;  // the swizzle of shared memory repeats after 8 rows

// Blocks of a cluster: neighbouring tiles of pixels of the same columns, so that weights come from L2 once for both.
constexpr int kPair = 2;
constexpr int kConsumers = 2;  // warpgroups that multiply, 64 pixels of the tile each
constexpr int kMaxBoxes = 32;
constexpr int kMaxUnits = 1024;
constexpr int kMaxRuns = 80;
constexpr int kMaxStages = 8;
constexpr int kMaxPieces = 32;
constexpr int kMaxPieceBoxes = 256;
constexpr int kChunkChannels = 16;  // that four neighbouring threads of a consumer have backward
constexpr int kChunkBytes = kTileRows * kChunkChannels * 4;  // of sums or cells, in float
constexpr int kSumBatches = 2;                               // of chunks' sums in shared memory, one on its way

// What one tap of one box is multiplied into: both groups' sums or the second's alone.
enum class Columns : uint8_t { kBoth, kSecond };

enum UnitFlag : uint8_t {
  kEnterBox = 1,    // another box than the unit before
  kAcquireBox = 2,  // the first use of the box: wait until it is there
  kReleaseBox = 4,  // the last use of the box
};

// One tap of one box.
struct alignas(8) Unit {
  int32_t offset;  // by which it moves rows of a box, in bytes
  uint8_t y, x;    // bits that say whether the neighbour lies inside the image
  uint8_t box;
  uint8_t flags;
};

// What a consumer does before a run of units.
enum Action : uint8_t {
  kFinishFirst = 1,        // the first group's sums of this tile are complete
  kFinishSecond = 2,       // the previous tile's second, unless that has been done; this tile's cells are there
  kFinishSecondEarly = 4,  // the same, where this tile may have to wait for what the previous one has to publish
};

// Neighbouring units with the same columns, and nothing to do between them.
struct Run {
  uint16_t first, count;
  Columns columns;
  uint8_t actions;
};

struct Box {
  int16_t channel;  // its first
  uint8_t groups;   // bit g: group g's part of the previous step is in it
};

// What forward and backward have in common.
struct Program {
  Unit units[kMaxUnits + 1];  // the next one is read ahead
  Tiling tiling;
  int box_slots;           // boxes that shared memory holds at a time
  int box_chunks;          // TMA loads that fill a box, side by side
  int chunk_width;         // columns of one load; it has all lines
  int radius_y, radius_x;  // of the largest kernel
  int stages;              // of the weights' ring
  int stages_per_tile;

  MKCONVLSTM_IMAGES int chunk_bytes() const { return chunk_width * tiling.box_height() * kRowBytes; }
  MKCONVLSTM_IMAGES int loaded_bytes() const { return box_chunks * chunk_bytes(); }  // of a box
  MKCONVLSTM_IMAGES int box_bytes() const {
    return (loaded_bytes() + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
  }
};

struct ForwardProgram : Program {
  Run runs[kConsumers][kMaxRuns];
  Box boxes[kMaxBoxes];
  int run_count[kConsumers];
  int box_count;
};

// 64 gates of one part, whose gradients backward multiplies.
struct GateBox {
  int16_t part;
  int16_t first;  // gate
};

// What one block multiplies of a tile: neighbouring units, and the boxes that these have.
struct Piece {
  uint16_t first_unit, units;
  uint16_t first_box, boxes;  // a unit's box counts from the first
};

struct BackwardProgram : Program {
  GateBox boxes[kMaxPieceBoxes];
  Piece pieces[kMaxPieces];
  int piece_count;
  Columns columns;   // all units have the same
  int stage_units;   // taps in a stage of weights
  int chunks;        // a tile's columns in units of kChunkChannels
  int batch;         // pieces whose sums of a chunk are fetched at a time
  int first_chunks;  // of the first part, whose channels are rounded up to chunks; after these come the second's
};

// Shared memory: boxes, 8 rows of zeros, the weights' ring, barriers.
constexpr int kZeroBytes = 8 * kRowBytes;
constexpr int kBarrierBytes = 8 * (2 * (kMaxStages + kMaxBoxes) + 1);
constexpr int kGatesBytes = 4 * kTileRows * kChunkChannels * 2;  // of so many hidden channels
// After these, forward: barriers of both groups' gates, what aligns these, these.
constexpr int kStagedBytes = kGroups * (8 + kGatesBytes) + 128;
// After these, backward: barriers of the batches, what aligns these, batches, a chunk's gates, c_t and c_{t-1}, their
// barriers.
constexpr int kSumBarrierBytes = 8 * kSumBatches + 128;
constexpr int kStagedChunkBytes = kGatesBytes + 2 * kChunkBytes + 8 * 2;

}  // namespace mkconvlstm::sm90
