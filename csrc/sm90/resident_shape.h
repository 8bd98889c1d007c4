// Where weights stay in shared memory: the problem as the kernels see it, and what a block has in shared memory. The
// plan and the kernels both compute it from here.
#pragma once

#include "program.h"

#ifdef __CUDACC__
#define MKCONVLSTM_BOTH __host__ __device__
#else
#define MKCONVLSTM_BOTH
#endif

namespace mkconvlstm::sm90 {

constexpr int kWindowPixels = 64;     // that a block owns, window_width x window_height
constexpr int kFinishedChannels = 8;  // of each block
constexpr int kWarpgroups = 4;        // each multiplies a share of the units; then each thread has one cell
constexpr int kResidentThreads = 128 * kWarpgroups;
constexpr int kMostBranches = 2;
constexpr int kPieceElements = 8;  // of 16 bytes, which are exchanged at once
constexpr int kBoxPieces = kBoxChannels / kPieceElements;
static_assert(kResidentThreads == kWindowPixels * kFinishedChannels, "each thread has one cell");

struct ResidentBranch {
  int kernel_height, kernel_width;
  int channels, first_hidden;
};

// pixels = batch * height * width, in this order.
struct ResidentProblem {
  int batch, height, width, hidden;
  int branch_count;
  ResidentBranch branches[kMostBranches];
  int window_width;  // of the pixels that a block owns: 8, 16, 32 or 64
  int split;         // blocks of a cluster; forward 1
  int groups;        // of 8 * split channels; forward, each of one branch

  MKCONVLSTM_BOTH int group_channels() const { return kFinishedChannels * split; }
  MKCONVLSTM_BOTH int window_height() const { return kWindowPixels / window_width; }
  MKCONVLSTM_BOTH int windows_x() const { return (width + window_width - 1) / window_width; }
  MKCONVLSTM_BOTH int windows_y() const { return (height + window_height() - 1) / window_height(); }
  MKCONVLSTM_BOTH int pixels() const { return batch * height * width; }
};

// What one block multiplies, and where it lies in shared memory. A unit is one tap of one box: 64 rows of the window,
// moved by the tap, x 64 of the elements summed over.
struct ResidentShape {
  int radius_y, radius_x;
  int pitch, rows;  // of the window, line after line
  int boxes, units;
  int columns;  // of the products
  int split;

  MKCONVLSTM_BOTH int box_bytes() const { return (rows + 7) / 8 * 8 * kRowBytes; }
  MKCONVLSTM_BOTH int unit_bytes() const { return columns * kRowBytes; }
  // Of a row of sums in floats: four rows and the columns that a quarter of a warp writes lie in all banks.
  MKCONVLSTM_BOTH int sums_pitch() const { return columns % 16 == 0 ? columns + 8 : columns; }
  MKCONVLSTM_BOTH int sums_bytes() const { return kWarpgroups * kWindowPixels * sums_pitch() * 4; }

  MKCONVLSTM_BOTH int weights_at() const { return boxes * box_bytes(); }
  MKCONVLSTM_BOTH int sums_at() const { return weights_at() + units * unit_bytes(); }
  // Other blocks of the cluster may still read the sums of the step before.
  MKCONVLSTM_BOTH int boxes_at() const { return sums_at() + (split > 1 ? 2 : 1) * sums_bytes(); }
  MKCONVLSTM_BOTH int units_at() const { return boxes_at() + boxes * 8; }
  MKCONVLSTM_BOTH int pixels_at() const { return units_at() + units * 4; }
  MKCONVLSTM_BOTH int bytes() const { return pixels_at() + rows * 4; }
};

MKCONVLSTM_BOTH inline int ceil_quotient(int a, int b) { return (a + b - 1) / b; }

MKCONVLSTM_BOTH inline ResidentShape window_shape(const ResidentProblem& problem, int radius_y, int radius_x) {
  ResidentShape shape{};
  shape.radius_y = radius_y;
  shape.radius_x = radius_x;
  shape.pitch = problem.window_width + 2 * radius_x;
  shape.rows = shape.pitch * (problem.window_height() + 2 * radius_y);
  shape.split = problem.split;
  return shape;
}

// Boxes that hold a block's share of so many pieces.
MKCONVLSTM_BOTH inline int share_boxes(int pieces, int split) {
  return ceil_quotient(ceil_quotient(pieces, split), kBoxPieces);
}

// Forward, of a block whose channels belong to that branch: sums over h's channels.
MKCONVLSTM_BOTH inline ResidentShape forward_shape(const ResidentProblem& problem, const ResidentBranch& branch) {
  ResidentShape shape = window_shape(problem, branch.kernel_height / 2, branch.kernel_width / 2);
  shape.boxes = share_boxes(problem.hidden / kPieceElements, 1);
  shape.units = branch.kernel_height * branch.kernel_width * shape.boxes;
  shape.columns = 4 * kFinishedChannels;
  return shape;
}

// Backward: sums over all gates, each branch's in boxes of their own.
MKCONVLSTM_BOTH inline int backward_boxes(const ResidentProblem& problem, const ResidentBranch& branch) {
  return share_boxes(4 * branch.channels / kPieceElements, problem.split);
}

MKCONVLSTM_BOTH inline ResidentShape backward_shape(const ResidentProblem& problem) {
  int radius_y = 0, radius_x = 0, boxes = 0, units = 0;
  for (int r = 0; r < problem.branch_count; ++r) {
    const ResidentBranch& branch = problem.branches[r];
    radius_y = branch.kernel_height / 2 > radius_y ? branch.kernel_height / 2 : radius_y;
    radius_x = branch.kernel_width / 2 > radius_x ? branch.kernel_width / 2 : radius_x;
    boxes += backward_boxes(problem, branch);
    units += backward_boxes(problem, branch) * branch.kernel_height * branch.kernel_width;
  }
  ResidentShape shape = window_shape(problem, radius_y, radius_x);
  shape.boxes = boxes;
  shape.units = units;
  shape.columns = problem.group_channels();
  return shape;
}

}  // namespace mkconvlstm::sm90
