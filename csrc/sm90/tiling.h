// Which pixels a tile has, and where these and their neighbours lie in its boxes.
//
// What is tiled are images. A tile is a patch of kTileRows pixels of one, some of which may lie outside. Where patches
// would cover more than a batch of small images has, the whole batch counts as one image of a single line instead, so
// that a tile is kTileRows pixels in a row; its margins hold the lines before and after.
#pragma once

#include "images.h"

namespace mkconvlstm::sm90 {

constexpr int kTileRows = 128;
constexpr int kTileRowBits = 7;
// A patch has so many columns at least: rows i and i + 8 of a tile, where i % 16 < 8, are pixels of the same line.
constexpr int kLeastColumnBits = 4;

struct Tiling {
  int images, height, width;         // of what is tiled
  int column_bits;                   // a patch has 2^column_bits columns, and kTileRows / 2^column_bits lines
  int margin_y, margin_x;            // lines and columns of a box before and after those of the patch
  int line;                          // rows of a box from one line of the batch's images to the next
  Divisor tile_lines, tile_columns;  // tiles of an image

  // The first pixel of a tile.
  struct Place {
    int image, y, x;
  };

  // radius_y, radius_x: of the largest kernel.
  static Tiling of_patches(int images, int height, int width, int radius_y, int radius_x, int column_bits) {
    Tiling tiling{images, height, width, column_bits, radius_y, radius_x, 0, {}, {}};
    tiling.line = tiling.box_width();
    tiling.count();
    return tiling;
  }

  static Tiling of_rows(int images, int height, int width, int radius_y, int radius_x) {
    Tiling tiling{1, 1, images * height * width, kTileRowBits, 0, radius_y * width + radius_x, width, {}, {}};
    tiling.count();
    return tiling;
  }

  MKCONVLSTM_IMAGES int patch_height() const { return kTileRows >> column_bits; }
  MKCONVLSTM_IMAGES int patch_width() const { return 1 << column_bits; }
  MKCONVLSTM_IMAGES int line_of(int y) const { return y >> (kTileRowBits - column_bits); }  // of tiles
  MKCONVLSTM_IMAGES int column_of(int x) const { return x >> column_bits; }
  MKCONVLSTM_IMAGES int box_height() const { return patch_height() + 2 * margin_y; }
  MKCONVLSTM_IMAGES int box_width() const { return patch_width() + 2 * margin_x; }

  int tiles() const { return images * tile_lines.value * tile_columns.value; }

  MKCONVLSTM_IMAGES Place place(int tile) const {
    const int line = tile_columns.quotient(tile), image = tile_lines.quotient(line);
    return {image, (line - image * tile_lines.value) * patch_height(),
            (tile - line * tile_columns.value) * patch_width()};
  }

  // Where a row of the tile lies among all pixels of the batch: from `end` on, it has none.
  struct Pixel {
    int index, end;

    MKCONVLSTM_IMAGES bool exists() const { return index < end; }
  };

  MKCONVLSTM_IMAGES Pixel pixel(const Place& tile, int row) const {
    const int y = tile.y + (row >> column_bits), line = (tile.image * height + y) * width;
    return {line + tile.x + (row & (patch_width() - 1)), tile.image < images && y < height ? line + width : 0};
  }

  // Where a row of the tile lies in its boxes.
  MKCONVLSTM_IMAGES int box_row(int row) const {
    return ((row >> column_bits) + margin_y) * box_width() + (row & (patch_width() - 1)) + margin_x;
  }

 private:
  void count() {
    const auto tiles = [](int size, int patch) { return (size + patch - 1) / patch; };
    tile_lines = Divisor::of(tiles(height, patch_height()));
    tile_columns = Divisor::of(tiles(width, patch_width()));
  }
};

// The tiles whose pixels the taps of a tile touch, itself among them: some lines of some tiles each. A tile without
// pixels has none that have any, but it may have numbers beyond all tiles.
class Neighbours {
 public:
  MKCONVLSTM_IMAGES Neighbours(const Tiling& tiling, const Tiling::Place& tile) : stride_(tiling.tile_columns.value) {
    const auto inside = [](int value, int last) { return value < 0 ? 0 : value < last ? value : last; };
    const int last_y = tile.y + tiling.patch_height() - 1 + tiling.margin_y;
    const int last_x = tile.x + tiling.patch_width() - 1 + tiling.margin_x;
    const int top = tiling.line_of(inside(tile.y - tiling.margin_y, tile.y));
    const int left = tiling.column_of(inside(tile.x - tiling.margin_x, tile.x));
    const int bottom = inside(tiling.line_of(last_y), tiling.tile_lines.value - 1);
    const int right = inside(tiling.column_of(last_x), stride_ - 1);
    first_ = (tile.image * tiling.tile_lines.value + top) * stride_ + left;
    width_ = right + 1 - left;
    count_ = (bottom + 1 - top) * width_;
  }

  MKCONVLSTM_IMAGES int count() const { return count_; }

  MKCONVLSTM_IMAGES int tile(int i) const {
    const int line = i / width_;
    return first_ + line * stride_ + i - line * width_;
  }

 private:
  int stride_, first_, width_, count_;
};

}  // namespace mkconvlstm::sm90
