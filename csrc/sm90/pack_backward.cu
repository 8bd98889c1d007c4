// Weights in the order in which backward's products take them, swizzled as the tensor cores read them: a product's
// columns are hidden channels, and it sums over gates.
#include "backward.h"

namespace mkconvlstm::sm90 {

namespace {

constexpr int kChannels = 8;  // hidden channels and gates that a block takes at a time
constexpr int kGates = 16;
constexpr int kThreads = 128;

struct Pack {
  const uint16_t* weights;  // [gates, hidden, positions]
  int gates, hidden, positions;
  int first_channels, first_columns;  // of the first branch: hidden channels, and these rounded up to chunks
  int first_unit;                     // of the branch
  int stages_per_tile, stage_units, tile_channels;
  char* packed;
};

// Grid: [tiles_n * tile_channels / kChannels, gates in boxes / kGates]. Columns are hidden channels, each branch's
// rounded up to chunks. All taps are read together, as they lie, and written tap by tap, each where the tap on the
// other side of the kernel's centre would be.
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Pack p) {
  extern __shared__ uint4 tile[];  // [kGates, kChannels, positions] 16-bit elements
  const int first_column = blockIdx.x * kChannels, first_gate = blockIdx.y * kGates;
  const bool second = first_column >= p.first_columns;
  const int first_channel = first_column - (second ? p.first_columns - p.first_channels : 0);
  for (int i = threadIdx.x; i < kGates * p.positions; i += kThreads) {
    const int gate = first_gate + i / p.positions;
    const uint16_t* row = p.weights + (int64_t{gate} * p.hidden + first_channel) * p.positions;
    const bool there = gate < p.gates && first_channel < (second ? p.hidden : p.first_channels);
    tile[i] = there ? reinterpret_cast<const uint4*>(row)[i % p.positions] : uint4{};
  }
  __syncthreads();

  const auto* elements = reinterpret_cast<const uint16_t*>(tile);
  for (int i = threadIdx.x; i < p.positions * kChannels * (kGates / 8); i += kThreads) {
    const int tap = i / (kChannels * (kGates / 8)), channel = i / (kGates / 8) % kChannels, piece = i % (kGates / 8);
    union {
      uint16_t values[8];
      uint4 vector;
    } out;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      out.values[k] = elements[((piece * 8 + k) * kChannels + channel) * p.positions + p.positions - 1 - tap];

    const int unit = p.first_unit + first_gate / kBoxChannels * p.positions + tap;
    const int in_tile = (first_column + channel) % p.tile_channels;
    const int half = p.stage_units == 1 ? in_tile / kGroupColumns : unit % 2;
    // Column 8 j + 2 q + e of a group is channel 16 (j / 2) + 4 q + 2 (j % 2) + e: a thread has four neighbours.
    const int column = in_tile % kGroupColumns / 16 * 16 + in_tile / 2 % 2 * 8 + in_tile / 4 % 4 * 2 + in_tile % 2;
    const int64_t stage = int64_t{first_column / p.tile_channels} * p.stages_per_tile + unit / p.stage_units;
    const int swizzled = (first_gate % kBoxChannels / 8 + piece) ^ (column % 8);
    char* target = p.packed + stage * kStageBytes + half * kGroupWeightBytes + column * kRowBytes + swizzled * 16;
    *reinterpret_cast<uint4*>(target) = out.vector;
  }
}

}  // namespace

void pack(const BackwardPlan& plan, const SequenceProblem& problem, const void* const* weights, char* packed,
          cudaStream_t stream) {
  Pack p{};
  p.hidden = static_cast<int>(problem.hidden());
  p.stages_per_tile = plan.program.stages_per_tile;
  p.stage_units = plan.program.stage_units;
  p.tile_channels = plan.program.chunks * kChunkChannels;
  p.first_channels = static_cast<int>(problem.branches[0].channels);
  p.first_columns = plan.program.first_chunks * kChunkChannels;
  p.packed = packed;
  for (size_t branch = 0; branch < problem.branches.size(); ++branch) {
    const BranchShape& shape = problem.branches[branch];
    p.weights = static_cast<const uint16_t*>(weights[branch]);
    p.gates = static_cast<int>(4 * shape.channels);
    p.positions = static_cast<int>(shape.kernel_height * shape.kernel_width);
    const int boxes = (p.gates + kBoxChannels - 1) / kBoxChannels;
    const dim3 grid(plan.tiles_n * p.tile_channels / kChannels, boxes * kBoxChannels / kGates);
    pack_kernel<<<grid, kThreads, kGates * kChannels * p.positions * sizeof(uint16_t), stream>>>(p);
    p.first_unit += boxes * p.positions;
  }
}

}  // namespace mkconvlstm::sm90
