// Matrix products y = x w^T with w [N, K], as the weights of a linear layer are stored; nothing is packed.
//
// Each element is summed in the same order whatever M and N are, and however the work is divided: a row's result does
// not depend on the rows beside it.
#pragma once

#include "pool.h"
#include "vector.h"

namespace telechat {

// Keeps a vector in a register: the compiler would read it again for each of its products, and run out of loads.
inline void hold(Vec& v) {
#if defined(__AVX__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

// out[m][n] = sum over k of x[m, k] * w[n, k], for a tile of MR x NR, MR <= NR. fetch: ask for the weights of the next
// tile, which follow these.
template <int MR, int NR, bool kFetch>
inline __attribute__((always_inline)) void product_tile(const float* x, int64_t ldx, const float* w, int64_t ldw,
                                                        int64_t depth, float* out) {
  Vec acc[MR * NR] = {};
  const int64_t whole = depth - depth % kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    if (kFetch && k % 16 == 0)
      for (int n = 0; n < NR; ++n) __builtin_prefetch(w + (NR + n) * ldw + k);
    Vec a[MR];
    for (int m = 0; m < MR; ++m) {
      a[m] = load(x + m * ldx + k);
      hold(a[m]);
    }
    for (int n = 0; n < NR; ++n) {
      Vec b = load(w + n * ldw + k);
      if (MR > 1) hold(b);
      for (int m = 0; m < MR; ++m) acc[m * NR + n] = add_product(a[m], b, acc[m * NR + n]);
    }
  }
  constexpr int kWhole = MR * NR / 4 * 4;
  for (int i = 0; i < kWhole; i += 4) {
    const Quad four = sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    std::memcpy(out + i, &four, sizeof four);
  }
  for (int i = kWhole; i < MR * NR; ++i) out[i] = sum(acc[i]);
  for (int64_t k = whole; k < depth; ++k)
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NR; ++n) out[m * NR + n] = add_product(x[m * ldx + k], w[n * ldw + k], out[m * NR + n]);
}

// Calls put(m, n, value) for a tile: value is a float, or a Quad of n .. n + 3.
template <int MR, int NR, typename Put>
inline void put_tile(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t depth, int64_t m, int64_t n,
                     bool fetch, const Put& put) {
  float out[MR * NR];
  if (fetch) product_tile<MR, NR, true>(x + m * ldx, ldx, w + n * ldw, ldw, depth, out);
  else product_tile<MR, NR, false>(x + m * ldx, ldx, w + n * ldw, ldw, depth, out);
  for (int i = 0; i < MR; ++i) {
    if constexpr (NR % 4 == 0) {
      for (int j = 0; j < NR; j += 4) put(m + i, n + j, get<Quad>(out + i * NR + j));
    } else {
      for (int j = 0; j < NR; ++j) put(m + i, n + j, out[i * NR + j]);
    }
  }
}

// All rows with NR columns from n on. The columns' weights are read from memory once, and stay in the nearest cache.
template <int NR, typename Put>
inline void put_columns(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t ldw, int64_t depth,
                        int64_t n, bool fetch, const Put& put) {
  int64_t m = 0;
  for (; rows - m > 4 || rows - m == 3; m += 3) put_tile<3, NR>(x, ldx, w, ldw, depth, m, n, fetch && m == 0, put);
  for (; rows - m >= 2; m += 2) put_tile<2, NR>(x, ldx, w, ldw, depth, m, n, fetch && m == 0, put);
  if (rows - m == 1) put_tile<1, NR>(x, ldx, w, ldw, depth, m, n, fetch && m == 0, put);
}

// Calls put(m, n, sum over k of x[m, k] w[n, k]) for m below `rows` and n from `first` to `last`, in this thread; of
// four n at a time where it can (see put_tile).
template <typename Put>
inline void products(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t ldw, int64_t first,
                     int64_t last, int64_t depth, const Put& put) {
  int64_t n = first;
  if (rows == 1) {
    for (; n + 8 <= last; n += 8) put_tile<1, 8>(x, ldx, w, ldw, depth, 0, n, n + 16 <= last, put);
  }
  for (; n + 4 <= last; n += 4) put_columns<4>(x, ldx, rows, w, ldw, depth, n, n + 8 <= last, put);
  for (; n < last; ++n) put_columns<1>(x, ldx, rows, w, ldw, depth, n, false, put);
}

// How a product of `rows` x `columns` is divided: blocks of both, so that the weights of a block stay in the
// second-level cache and there are some tasks per thread.
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

}  // namespace telechat
