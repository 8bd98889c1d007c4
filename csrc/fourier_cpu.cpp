// A transform is two passes of short sums, along one axis and then along the other, over kLanes channels at a time: on
// tiles this small that is as fast as a fast Fourier transform, and vectors need no shuffling.
#include "fourier_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "versions.h"

namespace mkconvlstm {

namespace {

constexpr int kLanes = 16;  // channels at a time
constexpr int kColumns = kMaxSide / 2 + 1;

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

// cos and sin of 2 pi j k / side; rows are longer than side so that blocks of four may read past its end.
struct Turns {
  float cos[kMaxSide + 4][kMaxSide + 4], sin[kMaxSide + 4][kMaxSide + 4];

  explicit Turns(int side) {
    for (int j = 0; j < kMaxSide + 4; ++j) {
      for (int k = 0; k < kMaxSide + 4; ++k) {
        const double angle = 2 * M_PI / side * (j * k % side);
        cos[j][k] = static_cast<float>(std::cos(angle));
        sin[j][k] = static_cast<float>(std::sin(angle));
      }
    }
  }
};

const Turns& turns(int side) {
  static const auto table = [] {
    std::array<std::unique_ptr<Turns>, kMaxSide + 1> all;
    for (int s = 1; s <= kMaxSide; ++s) all[s] = std::make_unique<Turns>(s);
    return all;
  }();
  return *table[side];
}

// Columns v = 0 and side / 2 are their own conjugates: half of their u are kept. The others are kept whole.
MKCONVLSTM_INLINE bool is_own_conjugate(int v, int side) { return v == 0 || 2 * v == side; }

// Where column v begins among the frequencies; u follow one another.
MKCONVLSTM_INLINE int64_t first_frequency(int v, int side) {
  return v == 0 ? 0 : side / 2 + 1 + (v - 1) * int64_t{side};
}

struct Unit {
  int64_t tile, image, channel;
  int64_t top, left;  // pixel at which the tile's outputs begin
  int channels;
};

MKCONVLSTM_INLINE Unit unit_at(const TiledImages& images, int64_t index) {
  const int64_t chunks = (images.channels + kLanes - 1) / kLanes;
  const int64_t tile = index / chunks, channel = index % chunks * kLanes;
  const int64_t row = tile / images.columns % images.rows, column = tile % images.columns;
  return {tile,
          tile / (images.rows * images.columns),
          channel,
          row * images.step,
          column * images.step,
          static_cast<int>(std::min<int64_t>(kLanes, images.channels - channel))};
}

MKCONVLSTM_INLINE Lanes load(const float* source, int channels) {
  Lanes lanes{};
  if (channels == kLanes) {
    std::memcpy(&lanes, source, sizeof(lanes));
  } else {
    std::memcpy(&lanes, source, channels * sizeof(float));
  }
  return lanes;
}

MKCONVLSTM_INLINE void store(float* target, const Lanes& lanes, int channels) {
  if (channels == kLanes) {
    std::memcpy(target, &lanes, sizeof(lanes));
  } else {
    std::memcpy(target, &lanes, channels * sizeof(float));
  }
}

struct Complex {
  Lanes real, imaginary;
};

MKCONVLSTM_INLINE void put(const Spectrum& spectrum, const Unit& unit, int64_t frequency, const Lanes& real,
                           const Lanes& imaginary) {
  float* target = spectrum.data + frequency * spectrum.frequency + unit.tile * spectrum.tile + unit.channel;
  store(target, real, unit.channels);
  store(target + spectrum.plane, imaginary, unit.channels);
}

MKCONVLSTM_INLINE Complex get(const SpectrumProducts& products, const Unit& unit, int64_t frequency) {
  const float* source = products.data + frequency * products.frequency + unit.tile * products.tile + unit.channel;
  const auto part = [&](int a, int b) __attribute__((always_inline)) {
    return load(source + a * products.first + b * products.second, unit.channels);
  };
  return {part(0, 0) + part(1, 1), part(1, 0) - part(0, 1)};
}

}  // namespace

int64_t count_frequencies(int side) { return (side * int64_t{side} + (side % 2 == 0 ? 4 : 1)) / 2; }

int64_t count_units(const TiledImages& images) { return images.tiles() * ((images.channels + kLanes - 1) / kLanes); }

MKCONVLSTM_VERSIONS void analyze(const TiledImages& images, int before, int extent, const Spectrum& spectrum,
                                 int64_t index) {
  const Unit unit = unit_at(images, index);
  const int side = spectrum.side;
  const Turns& turn = turns(side);
  const auto inside = [=](int64_t start, int64_t size) __attribute__((always_inline)) {
    const int first = static_cast<int>(std::max<int64_t>(0, -start));
    return std::pair<int, int>(first, static_cast<int>(std::min<int64_t>(extent, size - start)));
  };
  const int64_t top = unit.top - before, left = unit.left - before;
  const auto [first_row, last_row] = inside(top, images.height);
  const auto [first_column, last_column] = inside(left, images.width);

  // Along the rows: half[r][v] = sum over columns of x[r][column] exp(-i column v).
  Complex half[kMaxSide][kColumns + 3];
  for (int r = first_row; r < last_row; ++r) {
    const float* row = images.data + unit.image * images.image + (top + r) * images.row + left * images.column +
                       unit.channel;
    Lanes pixels[kMaxSide];
    for (int column = first_column; column < last_column; ++column)
      pixels[column] = load(row + column * images.column, unit.channels);
    for (int v = 0; v <= side / 2; v += 4) {
      Complex sum[4] = {};
      for (int column = first_column; column < last_column; ++column) {
        for (int k = 0; k < 4; ++k) {
          sum[k].real += turn.cos[column][v + k] * pixels[column];
          sum[k].imaginary -= turn.sin[column][v + k] * pixels[column];
        }
      }
      for (int k = 0; k < 4; ++k) half[r][v + k] = sum[k];
    }
  }

  // Along the columns: u and -u share their products.
  for (int v = 0; v <= side / 2; ++v) {
    const int64_t first = first_frequency(v, side);
    const bool whole = !is_own_conjugate(v, side);
    for (int u = 0; u <= side / 2; u += 2) {
      Complex cosine[2] = {}, sine[2] = {};
      for (int r = first_row; r < last_row; ++r) {
        for (int k = 0; k < 2; ++k) {
          cosine[k].real += turn.cos[r][u + k] * half[r][v].real;
          cosine[k].imaginary += turn.cos[r][u + k] * half[r][v].imaginary;
          sine[k].real += turn.sin[r][u + k] * half[r][v].real;
          sine[k].imaginary += turn.sin[r][u + k] * half[r][v].imaginary;
        }
      }
      for (int k = 0; k < 2 && u + k <= side / 2; ++k) {
        put(spectrum, unit, first + u + k, cosine[k].real + sine[k].imaginary, cosine[k].imaginary - sine[k].real);
        if (whole && u + k > 0 && 2 * (u + k) != side)
          put(spectrum, unit, first + side - u - k, cosine[k].real - sine[k].imaginary,
              cosine[k].imaginary + sine[k].real);
      }
    }
  }
}

MKCONVLSTM_VERSIONS void synthesize(const SpectrumProducts& spectrum, const float* bias, const TiledImages& images,
                                    int64_t index) {
  const Unit unit = unit_at(images, index);
  const int side = spectrum.side;
  const Turns& turn = turns(side);
  const int rows = static_cast<int>(std::min(images.step, images.height - unit.top));
  const int columns = static_cast<int>(std::min(images.step, images.width - unit.left));

  // Along the columns: half[r][v] = sum over u of y(u, v) exp(i r u); frequencies that were dropped count twice.
  Complex half[kMaxSide + 3][kColumns];
  for (int v = 0; v <= side / 2; ++v) {
    const int64_t first = first_frequency(v, side);
    const bool whole = !is_own_conjugate(v, side);
    Complex even[kColumns], odd[kColumns];  // y(u) + y(-u), y(u) - y(-u)
    for (int u = 0; u <= side / 2; ++u) {
      const bool single = u == 0 || 2 * u == side;
      const float weight = (whole || !single ? 2.f : 1.f) / static_cast<float>(side * side);
      const Complex y = get(spectrum, unit, first + u);
      even[u] = odd[u] = {weight * y.real, weight * y.imaginary};
      if (!whole || single) continue;
      const Complex other = get(spectrum, unit, first + side - u);
      even[u] = {even[u].real + weight * other.real, even[u].imaginary + weight * other.imaginary};
      odd[u] = {odd[u].real - weight * other.real, odd[u].imaginary - weight * other.imaginary};
    }
    for (int r = 0; r < rows; r += 4) {
      Complex sum[4] = {};
      for (int u = 0; u <= side / 2; ++u) {
        for (int k = 0; k < 4; ++k) {
          sum[k].real += turn.cos[r + k][u] * even[u].real;
          sum[k].real -= turn.sin[r + k][u] * odd[u].imaginary;
          sum[k].imaginary += turn.cos[r + k][u] * even[u].imaginary;
          sum[k].imaginary += turn.sin[r + k][u] * odd[u].real;
        }
      }
      for (int k = 0; k < 4; ++k) half[r + k][v] = sum[k];
    }
  }

  // Along the rows, the real part alone.
  const Lanes constant = bias == nullptr ? Lanes{} : load(bias + unit.channel, unit.channels);
  for (int r = 0; r < rows; ++r) {
    float* row = images.data + unit.image * images.image + (unit.top + r) * images.row + unit.left * images.column +
                 unit.channel;
    for (int column = 0; column < columns; column += 4) {
      Lanes sum[4] = {constant, constant, constant, constant};
      for (int v = 0; v <= side / 2; ++v) {
        for (int k = 0; k < 4; ++k) {
          sum[k] += turn.cos[v][column + k] * half[r][v].real;
          sum[k] -= turn.sin[v][column + k] * half[r][v].imaginary;
        }
      }
      for (int k = 0; k < 4 && column + k < columns; ++k)
        store(row + (column + k) * images.column, sum[k], unit.channels);
    }
  }
}

}  // namespace mkconvlstm
