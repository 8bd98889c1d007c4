// Weights in the order in which a tile's products take them, swizzled as the tensor cores read them.
#include <algorithm>

#include "forward.h"

namespace mkconvlstm::sm90 {

namespace {

constexpr int kRows = 8;    // of a swizzle atom: one gate of 8 channels
constexpr int kChunk = 16;  // channels of h that a block takes at a time
constexpr int kThreads = 128;

struct Pack {
  const uint16_t* weights[2];  // of each group's branch
  ColumnGroup groups[2];
  int branch_channels[2], group_taps[2];
  int hidden, stages_per_tile, shared_taps;
  Tap taps[kMaxTaps];
  Box boxes[kMaxBoxes];
  int both_stage[kMaxBoxes], second_stage[kMaxBoxes];
  char* packed;
};

// Grid: [tiles_n, both groups' atoms, boxes * kBoxChannels / kChunk]. Rows of weights are read as they lie, all taps of
// kChunk channels together, and written tap by tap.
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Pack p) {
  extern __shared__ uint4 tile[];  // [kRows, kChunk, kernel positions] 16-bit elements
  constexpr int kAtoms = kGroupColumns / kRows;
  const int group = blockIdx.y / kAtoms, atom = blockIdx.y % kAtoms;
  const int box = blockIdx.z / (kBoxChannels / kChunk), part = blockIdx.z % (kBoxChannels / kChunk);
  const ColumnGroup& g = p.groups[group];
  const int positions = g.kernel_height * g.kernel_width;
  const int first_channel = p.boxes[box].channel + part * kChunk;
  const int row_vectors = kChunk * positions / 8;  // hidden is a multiple of 8, so that vectors never straddle its end
  const int there = max(0, min(kChunk, p.hidden - first_channel)) * positions / 8;

  // Columns 8 j + 2 q + e of the product are gate j % 4 of channel 4 q + 2 (j / 4) + e: one thread's channels are four
  // neighbours.
  for (int i = threadIdx.x; i < kRows * row_vectors; i += kThreads) {
    const int row = i / row_vectors, vector = i % row_vectors;
    const int channel = blockIdx.x * (kGroupColumns / 4) + 4 * (row / 2) + 2 * (atom / 4) + row % 2;
    const int64_t source = int64_t{atom % 4} * p.branch_channels[group] + g.first_in_branch + channel;
    const uint16_t* begin = p.weights[group] + (source * p.hidden + first_channel) * positions;
    tile[i] = channel < g.channels && vector < there ? reinterpret_cast<const uint4*>(begin)[vector] : uint4{};
  }
  __syncthreads();

  const auto* elements = reinterpret_cast<const uint16_t*>(tile);
  for (int i = threadIdx.x; i < p.group_taps[group] * kRows * (kChunk / 8); i += kThreads) {
    const int tap = i / (kRows * (kChunk / 8)), row = i / (kChunk / 8) % kRows, piece = i % (kChunk / 8);
    const int y = p.taps[tap].dy + g.kernel_height / 2;
    const int x = p.taps[tap].dx + g.kernel_width / 2;
    union {
      uint16_t values[8];
      uint4 vector;
    } out;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      out.values[k] = elements[(row * kChunk + piece * 8 + k) * positions + y * g.kernel_width + x];

    const int extra = tap - p.shared_taps;  // taps of the second group alone lie two in a stage
    const int stage = extra < 0 ? p.both_stage[box] + tap : p.second_stage[box] + extra / 2;
    const int half = extra < 0 ? group : extra % 2;
    const int64_t target = (int64_t{blockIdx.x} * p.stages_per_tile + stage) * kStageBytes + half * kGroupWeightBytes;
    const int swizzled = (part * (kChunk / 8) + piece) ^ row;
    *reinterpret_cast<uint4*>(p.packed + target + (atom * kRows + row) * kRowBytes + swizzled * 16) = out.vector;
  }
}

}  // namespace

void pack(const ForwardPlan& plan, const SequenceProblem& problem, const void* const* weights, char* packed,
          cudaStream_t stream) {
  const ForwardProgram& program = plan.program;
  Pack p{};
  int positions = 0;
  for (int group = 0; group < 2; ++group) {
    const ColumnGroup& g = p.groups[group] = plan.groups[group];
    p.weights[group] = static_cast<const uint16_t*>(weights[g.branch]);
    p.branch_channels[group] = static_cast<int>(problem.branches[g.branch].channels);
    p.group_taps[group] = g.kernel_height * g.kernel_width;
    positions = std::max(positions, p.group_taps[group]);
  }
  p.hidden = static_cast<int>(problem.hidden());
  p.stages_per_tile = program.stages_per_tile;
  p.shared_taps = p.group_taps[0];
  std::copy(plan.taps.begin(), plan.taps.end(), p.taps);
  std::copy_n(program.boxes, kMaxBoxes, p.boxes);
  std::copy_n(plan.both_stage.begin(), kMaxBoxes, p.both_stage);
  std::copy_n(plan.second_stage.begin(), kMaxBoxes, p.second_stage);
  p.packed = packed;
  const dim3 grid(plan.tiles_n, 2 * kGroupColumns / kRows, program.box_count * (kBoxChannels / kChunk));
  pack_kernel<<<grid, kThreads, kRows * kChunk * positions * sizeof(uint16_t), stream>>>(p);
}

}  // namespace mkconvlstm::sm90
