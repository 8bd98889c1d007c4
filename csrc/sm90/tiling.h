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

}  // namespace mkconvlstm::sm90
