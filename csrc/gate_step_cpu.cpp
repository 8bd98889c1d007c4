// The pointwise step on a CPU. A tile is widened into arrays [pixels, channels], computed there and written back, so
// that the loop with the mathematics has neither strides nor dtypes and becomes vector code.
#include "gate_step_cpu.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "vector_math.h"
#include "versions.h"

namespace mkconvlstm {

namespace {

template <typename Scalar>
using accumulate_t = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename T>
MKCONVLSTM_INLINE T* address(const Operand& operand, const Tile& tile, int64_t channel_offset = 0) {
  return static_cast<T*>(operand.data) + tile.image * operand.batch +
         (channel_offset + tile.channel) * operand.channel + tile.pixel * operand.pixel;
}

// `walk` where channels lie side by side, kMany of them at a time: as many as a vector takes, so that few channels are no
// loop of their own at every pixel.
template <int kMany, typename Visit>
MKCONVLSTM_INLINE void walk_channels(const Operand& operand, const Tile& tile, Visit visit) {
  for (int64_t p = 0; p < tile.pixels; ++p) {
    for (int64_t c = 0; c < tile.channels; c += kMany) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < kMany; ++k) visit(p * tile.channels + c + k, p * operand.pixel + c + k);
    }
  }
}

// Calls visit(k, at) for each element: k counts within the tile, `at` within the operand. Innermost is what lies
// closest in memory.
template <typename Visit>
MKCONVLSTM_INLINE void walk(const Operand& operand, const Tile& tile, Visit visit) {
  if (operand.channel != 1) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      for (int64_t p = 0; p < tile.pixels; ++p)
        visit(p * tile.channels + c, p * operand.pixel + c * operand.channel);
    }
  } else if (tile.channels % 16 == 0) {
    walk_channels<16>(operand, tile, visit);
  } else if (tile.channels % 8 == 0) {
    walk_channels<8>(operand, tile, visit);
  } else {
    walk_channels<1>(operand, tile, visit);
  }
}

template <typename Stored, typename Accumulate>
MKCONVLSTM_INLINE void load(Accumulate* target, const Operand& operand, const Tile& tile, int64_t channel_offset = 0) {
  const Stored* source = address<const Stored>(operand, tile, channel_offset);
  walk(operand, tile, [=](int64_t k, int64_t at) __attribute__((always_inline)) {
    target[k] = static_cast<Accumulate>(source[at]);
  });
}

template <typename Stored, typename Accumulate>
MKCONVLSTM_INLINE void add(Accumulate* target, const Operand& operand, const Tile& tile, int64_t channel_offset = 0) {
  if (operand.data == nullptr) return;
  const Stored* source = address<const Stored>(operand, tile, channel_offset);
  walk(operand, tile, [=](int64_t k, int64_t at) __attribute__((always_inline)) {
    target[k] += static_cast<Accumulate>(source[at]);
  });
}

template <typename Stored, typename Accumulate>
MKCONVLSTM_INLINE void store(const Operand& operand, const Tile& tile, const Accumulate* values,
                             int64_t channel_offset = 0) {
  Stored* target = address<Stored>(operand, tile, channel_offset);
  walk(operand, tile, [=](int64_t k, int64_t at) __attribute__((always_inline)) {
    target[at] = static_cast<Stored>(values[k]);
  });
}

// [3, pixels, channels], rows i f o.
template <typename Accumulate>
struct PeepholeTile {
  Accumulate rows[3][Tile::kElements];

  MKCONVLSTM_INLINE void load(const Operand& operand, const Tile& tile) {
    Tile row = tile;  // the weights' "images" are their rows
    for (row.image = 0; row.image < 3; ++row.image) mkconvlstm::load<Accumulate>(rows[row.image], operand, row);
  }

  MKCONVLSTM_INLINE PeepholeWeights<Accumulate> operator[](int64_t k) const {
    return {rows[0][k], rows[1][k], rows[2][k]};
  }
};

template <typename Accumulate>
struct ForwardTile {
  Accumulate gates[4][Tile::kElements];
  Accumulate c[Tile::kElements], h[Tile::kElements];
  PeepholeTile<Accumulate> w;

  template <Peepholes kPeepholes>
  MKCONVLSTM_INLINE void compute(int64_t elements) {
    for (int64_t k = 0; k < elements; ++k) {
      const PeepholeWeights<Accumulate> weights =
          kPeepholes == Peepholes::kNone ? PeepholeWeights<Accumulate>{} : w[k];
      const CellOutput<Accumulate> cell = cell_forward<Accumulate, VectorMath>(
          {gates[0][k], gates[1][k], gates[2][k], gates[3][k]}, c[k], weights, kPeepholes);
      gates[0][k] = cell.gates.i;
      gates[1][k] = cell.gates.f;
      gates[2][k] = cell.gates.g;
      gates[3][k] = cell.gates.o;
      c[k] = cell.c;
      h[k] = cell.h;
    }
  }
};

template <typename Accumulate>
struct BackwardTile {
  Accumulate gates[4][Tile::kElements];
  Accumulate c_prev[Tile::kElements], c[Tile::kElements], dh[Tile::kElements], dc[Tile::kElements];
  PeepholeTile<Accumulate> w;

  template <Peepholes kPeepholes>
  MKCONVLSTM_INLINE void compute(int64_t elements) {
    for (int64_t k = 0; k < elements; ++k) {
      const PeepholeWeights<Accumulate> weights =
          kPeepholes == Peepholes::kNone ? PeepholeWeights<Accumulate>{} : w[k];
      const CellGradient<Accumulate> gradient = cell_backward<Accumulate, VectorMath>(
          {gates[0][k], gates[1][k], gates[2][k], gates[3][k]}, c_prev[k], c[k], dh[k], dc[k], weights, kPeepholes);
      gates[0][k] = gradient.dz.i;
      gates[1][k] = gradient.dz.f;
      gates[2][k] = gradient.dz.g;
      gates[3][k] = gradient.dz.o;
      dc[k] = gradient.dc_prev;
    }
  }
};

template <typename Block>
MKCONVLSTM_INLINE void compute(Block& block, const GateStep& step, const Tile& tile) {
  if (step.peepholes != Peepholes::kNone) block.w.load(step.peephole, tile);
  const int64_t elements = tile.pixels * tile.channels;
  switch (step.peepholes) {
    case Peepholes::kNone:
      return block.template compute<Peepholes::kNone>(elements);
    case Peepholes::kPreviousOutput:
      return block.template compute<Peepholes::kPreviousOutput>(elements);
    case Peepholes::kCurrentOutput:
      return block.template compute<Peepholes::kCurrentOutput>(elements);
  }
}

template <typename Scalar>
MKCONVLSTM_INLINE void advance_tile(const GateStepForward& step, const Tile& tile) {
  using Accumulate = accumulate_t<Scalar>;
  ForwardTile<Accumulate> block;
  for (int64_t gate = 0; gate < 4; ++gate) {
    load<Scalar>(block.gates[gate], step.z, tile, gate * step.channels);
    add<Scalar>(block.gates[gate], step.u, tile, gate * step.channels);
  }
  load<Accumulate>(block.c, step.c_prev, tile);
  compute(block, step, tile);
  for (int64_t gate = 0; gate < 4; ++gate) store<Scalar>(step.z, tile, block.gates[gate], gate * step.channels);
  store<Accumulate>(step.c, tile, block.c);
  store<Scalar>(step.h, tile, block.h);
}

template <typename Scalar>
MKCONVLSTM_INLINE void advance_tile(const GateStepBackward& step, const Tile& tile) {
  using Accumulate = accumulate_t<Scalar>;
  BackwardTile<Accumulate> block;
  for (int64_t gate = 0; gate < 4; ++gate) load<Scalar>(block.gates[gate], step.z, tile, gate * step.channels);
  load<Accumulate>(block.c_prev, step.c_prev, tile);
  load<Accumulate>(block.c, step.c, tile);
  load<Accumulate>(block.dc, step.dc, tile);
  std::fill_n(block.dh, tile.pixels * tile.channels, Accumulate(0));
  for (const Operand* dh : {&step.dh_out, &step.dh_rec}) {
    if (dh->wide) {
      add<Accumulate>(block.dh, *dh, tile);
    } else {
      add<Scalar>(block.dh, *dh, tile);
    }
  }
  compute(block, step, tile);
  for (int64_t gate = 0; gate < 4; ++gate) store<Scalar>(step.z, tile, block.gates[gate], gate * step.channels);
  store<Accumulate>(step.dc, tile, block.dc);
}

template <typename Step>
MKCONVLSTM_INLINE void advance_dtype(const Step& step, DType dtype, const Tile& tile) {
  switch (dtype) {
    case DType::kFloat64:
      return advance_tile<double>(step, tile);
    case DType::kFloat32:
      return advance_tile<float>(step, tile);
    case DType::kFloat16:
      return advance_tile<c10::Half>(step, tile);
    case DType::kBFloat16:
      return advance_tile<c10::BFloat16>(step, tile);
  }
}

struct TileSizes {
  int64_t pixels, channels;  // of a tile in the middle
  int64_t rows, columns;     // tiles of one image
};

TileSizes tile_sizes(const GateStep& step) {
  const int64_t channels = std::min<int64_t>(step.channels, Tile::kMaxChannels);
  const int64_t pixels = Tile::kElements / channels;
  return {pixels, channels, (step.pixels + pixels - 1) / pixels, (step.channels + channels - 1) / channels};
}

}  // namespace

int64_t count_tiles(const GateStep& step) {
  if (step.channels == 0) return 0;
  const TileSizes sizes = tile_sizes(step);
  return step.batch * sizes.rows * sizes.columns;
}

Tile tile_at(const GateStep& step, int64_t index) {
  const TileSizes sizes = tile_sizes(step);
  const int64_t channel = index % sizes.columns * sizes.channels;
  const int64_t pixel = index / sizes.columns % sizes.rows * sizes.pixels;
  return {index / (sizes.columns * sizes.rows), pixel, channel, std::min(step.pixels - pixel, sizes.pixels),
          std::min(step.channels - channel, sizes.channels)};
}

MKCONVLSTM_VERSIONS void advance(const GateStepForward& step, DType dtype, const Tile& tile) {
  advance_dtype(step, dtype, tile);
}

MKCONVLSTM_VERSIONS void advance(const GateStepBackward& step, DType dtype, const Tile& tile) {
  advance_dtype(step, dtype, tile);
}

}  // namespace mkconvlstm
