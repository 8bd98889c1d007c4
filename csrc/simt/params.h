// The tiles of the SIMT kernels, and how their weights are packed. "padded" says that zeros were added up to a multiple
// of a block's size. Scalar is float or double.
//
// Forward: branch.weights [taps, hidden padded, channels padded, 4]. Backward: [taps in reverse, 4 * channels padded,
// blocks of columns, kLanes, kColumns]; column [lane, k] of a block is its hidden channel k * kLanes + lane.
#pragma once

#include "../step/params.h"

namespace mkconvlstm::simt {

using step::Backward;
using step::Branch;
using step::Forward;
using step::kBlockColumns;
using step::Sequence;

// A block of kThreads computes kPixelGroups * (pixels of a thread) pixels by kBlockColumns columns of a convolution's
// output; a thread kColumns columns, which follow one another in packed weights.
constexpr int kThreads = 128;
constexpr int kColumns = 4;
constexpr int kLanes = kBlockColumns / kColumns;
constexpr int kPixelGroups = kThreads / kLanes;
constexpr int kPackedDepth = 16;  // a convolution's input channels are padded to a multiple of it

}  // namespace mkconvlstm::simt
