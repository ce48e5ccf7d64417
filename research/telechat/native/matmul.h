// Matrix products y = x w^T with w [N, K], as the weights of a linear layer are stored; nothing is packed.
//
// Each element is summed in the same order whatever M and N are, and however the work is divided: a row's result does
// not depend on the rows beside it.
#pragma once

#include "pool.h"
#include "vector.h"

namespace telechat {

// out[m][n] = sum over k of x[m, k] * w[n, k], for a tile of MR x NR (MR * NR a multiple of 4, or MR * NR small).
template <int MR, int NR>
inline __attribute__((always_inline)) void product_tile(const float* x, int64_t ldx, const float* w, int64_t ldw,
                                                        int64_t depth, float* out) {
  Vec acc[MR * NR] = {};
  const int64_t whole = depth - depth % kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vec a[MR];
    for (int m = 0; m < MR; ++m) a[m] = load(x + m * ldx + k);
    for (int n = 0; n < NR; ++n) {
      const Vec b = load(w + n * ldw + k);
      for (int m = 0; m < MR; ++m) acc[m * NR + n] += a[m] * b;
    }
  }
  if (whole < depth) {
    const int64_t rest = depth - whole;
    for (int n = 0; n < NR; ++n) {
      const Vec b = load_some(w + n * ldw + whole, rest);
      for (int m = 0; m < MR; ++m) acc[m * NR + n] += load_some(x + m * ldx + whole, rest) * b;
    }
  }
  constexpr int kWhole = MR * NR / 4 * 4;
  for (int i = 0; i < kWhole; i += 4) {
    const Quad four = sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    std::memcpy(out + i, &four, sizeof four);
  }
  for (int i = kWhole; i < MR * NR; ++i) out[i] = sum(acc[i]);
}

// Calls put(m, n, value) for a tile.
template <int MR, int NR, typename Put>
inline __attribute__((always_inline)) void put_tile(const float* x, int64_t ldx, const float* w, int64_t ldw,
                                                    int64_t depth, int64_t m, int64_t n, const Put& put) {
  float out[MR * NR];
  product_tile<MR, NR>(x + m * ldx, ldx, w + n * ldw, ldw, depth, out);
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) put(m + i, n + j, out[i * NR + j]);
}

template <int MR, int NR, typename Put>
inline void put_rows(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t depth, int64_t m, int64_t first,
                     int64_t last, const Put& put) {
  int64_t n = first;
  for (; n + NR <= last; n += NR) put_tile<MR, NR>(x, ldx, w, ldw, depth, m, n, put);
  for (; n < last; ++n) put_tile<MR, 1>(x, ldx, w, ldw, depth, m, n, put);
}

// Calls put(m, n, sum over k of x[m, k] w[n, k]) for m below `rows` and n from `first` to `last`, in this thread.
template <typename Put>
inline void products(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t ldw, int64_t first,
                     int64_t last, int64_t depth, const Put& put) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) put_rows<4, 3>(x, ldx, w, ldw, depth, m, first, last, put);
  if (rows - m == 3) put_rows<3, 4>(x, ldx, w, ldw, depth, m, first, last, put);
  if (rows - m == 2) put_rows<2, 6>(x, ldx, w, ldw, depth, m, first, last, put);
  if (rows - m == 1) put_rows<1, 8>(x, ldx, w, ldw, depth, m, first, last, put);
}

// How a product of `rows` x `columns` is divided: blocks of both, so that the weights of a block stay in the second-level
// cache and there are some tasks per thread.
struct Blocks {
  int64_t rows, columns, high, wide;

  Blocks(int64_t all_rows, int64_t all_columns, int64_t depth) : rows(all_rows), columns(all_columns) {
    const int64_t threads = Pool::get().threads();
    const int64_t fits = std::max<int64_t>(24, (160 << 10) / (4 * depth) / 12 * 12);
    const int64_t fair = (columns / (4 * threads) + 23) / 24 * 24;
    wide = std::max<int64_t>(24, std::min(fits, rows < 64 ? fair : fits));
    high = rows < 64 ? rows : 64;
  }

  int64_t across() const { return (columns + wide - 1) / wide; }
  int64_t tasks() const { return across() * ((rows + high - 1) / high); }

  // Calls part(first row, last row, first column, last column) of task i.
  template <typename Part>
  void part(int64_t i, const Part& part) const {
    const int64_t row = i / across() * high, column = i % across() * wide;
    part(row, std::min(rows, row + high), column, std::min(columns, column + wide));
  }
};

// y[m, n] = bias[n] + sum over k of x[m, k] w[n, k], on all threads. bias may be null.
inline void linear(const float* x, int64_t rows, const float* w, const float* bias, float* y, int64_t columns,
                   int64_t depth) {
  const Blocks blocks(rows, columns, depth);
  Pool::get().run(blocks.tasks(), [&](int64_t i) {
    blocks.part(i, [&](int64_t top, int64_t bottom, int64_t first, int64_t last) {
      products(x + top * depth, depth, bottom - top, w, depth, first, last, depth, [&](int64_t m, int64_t n, float v) {
        y[(top + m) * columns + n] = bias ? v + bias[n] : v;
      });
    });
  });
}

}  // namespace telechat
