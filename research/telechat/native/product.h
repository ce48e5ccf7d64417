// Matrix products of training, c = a b, of matrices stored in rows or in columns, for many rows.
//
// b is packed in strips as wide as a tile, and a where its rows would share lines of the caches. Each element is summed
// in an order that depends on the depth only.
#pragma once

#include <algorithm>

#include "pool.h"
#include "tile.h"

namespace telechat {

// Element (i, j) is data[i * row + j * column]; one of row and column is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};

constexpr int64_t kDeep = 256;                             // a strip of b of that depth stays in the first-level cache
constexpr int64_t kHigh = 192;                             // rows of a task: that part of a stays in the second level
constexpr int64_t kAcross = 768;                           // its columns
constexpr int64_t kPacked = 1 << 20;                       // numbers of b that are packed at a time
constexpr int64_t kDeepest = 4096;                         // rows of b among them

// Parts of `size`, as few of `most` at most as possible, all but the last equal and a multiple of `unit`.
struct Division {
  int64_t size, count, part;

  Division(int64_t all, int64_t most, int64_t unit)
      : size(all), count((all + most - 1) / most), part(count ? up_to((all + count - 1) / count, unit) : unit) {
    count = (all + part - 1) / part;
  }
  int64_t begin(int64_t i) const { return i * part; }
  int64_t length(int64_t i) const { return std::min(part, size - i * part); }
};

// Columns n ... of b, and zeros beyond `width`, as strip [depth, kWide].
inline void pack_strip(const Matrix& b, int64_t k, int64_t depth, int64_t n, int64_t width, float* to) {
  const float* from = b.data + k * b.row + n * b.column;
  if (b.column == 1 && width == kWide) {
    for (int64_t i = 0; i < depth; ++i) {
      store(to + i * kWide, load(from + i * b.row));
      store(to + i * kWide + kLanes, load(from + i * b.row + kLanes));
    }
    return;
  }
  int64_t done = 0;
  if (b.row == 1 && width == kWide) {                      // four columns, which are rows in memory, at a time
    for (; done + 4 <= depth; done += 4) {
      for (int j = 0; j < kWide; j += 4) {
        Quad in[4];
        for (int q = 0; q < 4; ++q) std::memcpy(&in[q], from + done + (j + q) * b.column, sizeof(Quad));
        const Quad ab = mix(in[0], in[1], IntQuad{0, 4, 1, 5}), cd = mix(in[2], in[3], IntQuad{0, 4, 1, 5});
        const Quad ab2 = mix(in[0], in[1], IntQuad{2, 6, 3, 7}), cd2 = mix(in[2], in[3], IntQuad{2, 6, 3, 7});
        const Quad out[4] = {mix(ab, cd, IntQuad{0, 1, 4, 5}), mix(ab, cd, IntQuad{2, 3, 6, 7}),
                             mix(ab2, cd2, IntQuad{0, 1, 4, 5}), mix(ab2, cd2, IntQuad{2, 3, 6, 7})};
        for (int q = 0; q < 4; ++q) std::memcpy(to + (done + q) * kWide + j, &out[q], sizeof(Quad));
      }
    }
  }
  for (; done < depth; ++done)
    for (int64_t j = 0; j < kWide; ++j) to[done * kWide + j] = j < width ? from[done * b.row + j * b.column] : 0.0f;
}

// Rows of a, as strips [depth, kTall], and zeros beyond `rows`.
inline void pack_rows(const float* from, const Matrix& a, int64_t rows, int64_t depth, float* to) {
  for (int64_t m = 0; m < rows; m += kTall, to += depth * kTall) {
    const float* strip = from + m * a.row;
    if (a.row == 1 && m + kTall <= rows) {
      for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * kTall, strip + k * a.column, kTall * sizeof(float));
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < kTall; ++i) to[k * kTall + i] = m + i < rows ? strip[i * a.row + k * a.column] : 0.0f;
    }
  }
}

// `tile` where fewer than kTall rows or kWide columns exist.
template <bool kAdd>
inline __attribute__((noinline)) void edge_tile(const float* a, int64_t row, int64_t column, const float* b,
                                                int64_t depth, int64_t rows, int64_t columns, float* c, int64_t ldc) {
  float whole[kTall * kWide] = {};
  if (kAdd)
    for (int64_t m = 0; m < rows; ++m) std::memcpy(whole + m * kWide, c + m * ldc, columns * sizeof(float));
  switch (rows) {
    case 1: tile<kAdd, 1>(a, row, column, b, kWide, depth, whole, kWide); break;
    case 2: tile<kAdd, 2>(a, row, column, b, kWide, depth, whole, kWide); break;
    case 3: tile<kAdd, 3>(a, row, column, b, kWide, depth, whole, kWide); break;
    case 4: tile<kAdd, 4>(a, row, column, b, kWide, depth, whole, kWide); break;
    case 5: tile<kAdd, 5>(a, row, column, b, kWide, depth, whole, kWide); break;
    default: tile<kAdd, 6>(a, row, column, b, kWide, depth, whole, kWide);
  }
  for (int64_t m = 0; m < rows; ++m) std::memcpy(c + m * ldc, whole + m * kWide, columns * sizeof(float));
}

// One task: rows of a times strips of b.
template <bool kAdd>
inline void block(const float* a, int64_t row, int64_t column, int64_t strip_of_a, const float* b, int64_t strip,
                  int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc) {
  for (int64_t n = 0; n < columns; n += kWide) {
    const float* of_b = b + n / kWide * strip;
    const int64_t width = std::min<int64_t>(kWide, columns - n);
    for (int64_t m = 0; m < rows; m += kTall) {
      const float* of_a = a + m / kTall * strip_of_a;
      float* to = c + m * ldc + n;
      if (rows - m >= kTall && width == kWide) tile<kAdd>(of_a, row, column, of_b, kWide, depth, to, ldc);
      else edge_tile<kAdd>(of_a, row, column, of_b, depth, std::min<int64_t>(kTall, rows - m), width, to, ldc);
    }
  }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], on all threads; c is stored in rows. The caller has the
// pool's turn.
inline void multiply(const Matrix& a, const Matrix& b, float* c, int64_t rows, int64_t columns, int64_t depth) {
  static Buffer& packed = *new Buffer;
  const bool pack_a = a.column != 1 || a.row * 4 % 4096 == 0;
  const int64_t deep = std::min(depth, kDeepest);
  const int64_t fits = kPacked / std::max<int64_t>(1, deep) / kWide * kWide;
  const Division over_columns(columns, std::max<int64_t>(kWide, fits), kWide);
  float* strips = packed.get(deep * over_columns.part);
  for (int64_t k = 0; k < depth; k += deep) {
    const int64_t this_deep = std::min(deep, depth - k);
    const Division over_depth(this_deep, kDeep, 1);
    for (int64_t chunk = 0; chunk < over_columns.count; ++chunk) {
      const int64_t n = over_columns.begin(chunk), wide = over_columns.length(chunk);
      Pool::get().run((wide + kWide - 1) / kWide, [&](int64_t s) {
        pack_strip(b, k, this_deep, n + s * kWide, std::min<int64_t>(kWide, wide - s * kWide),
                   strips + s * this_deep * kWide);
      });
      const Division down(rows, kHigh, kTall), across(wide, kAcross, kWide);
      Pool::get().run(down.count * across.count, [&](int64_t task) {
        static thread_local Buffer own;
        const int64_t top = down.begin(task / across.count), left = across.begin(task % across.count);
        const int64_t height = down.length(task / across.count), width = across.length(task % across.count);
        float* packed_a = pack_a ? own.get(up_to(height, kTall) * kDeep) : nullptr;
        for (int64_t i = 0; i < over_depth.count; ++i) {
          const int64_t begin = over_depth.begin(i), depth_of = over_depth.length(i);
          const float* rows_of_a = a.data + top * a.row + (k + begin) * a.column;
          if (pack_a) pack_rows(rows_of_a, a, height, depth_of, packed_a);
          const float* of_a = pack_a ? packed_a : rows_of_a;
          const int64_t row = pack_a ? 1 : a.row, column = pack_a ? kTall : 1;
          const int64_t strip_of_a = pack_a ? depth_of * kTall : kTall * a.row;
          const float* of_b = strips + left * this_deep + begin * kWide;
          float* to = c + top * columns + n + left;
          if (k + begin == 0)
            block<false>(of_a, row, column, strip_of_a, of_b, this_deep * kWide, height, width, depth_of, to, columns);
          else
            block<true>(of_a, row, column, strip_of_a, of_b, this_deep * kWide, height, width, depth_of, to, columns);
        }
      });
    }
  }
  if (depth == 0) std::fill(c, c + rows * columns, 0.0f);
}

}  // namespace telechat
