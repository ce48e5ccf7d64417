// A matrix product whose first factor is read number by number, so that it may be stored in rows or in columns, and
// whose second factor is stored in strips as wide as two vectors.
#pragma once

#include <algorithm>
#include <new>

#include "vector.h"

namespace telechat {

constexpr int kTall = 6;                                   // rows of a tile: 12 sums, 2 vectors, 1 number in registers
constexpr int kWide = 2 * kLanes;                          // its columns
constexpr int64_t kUnit = kLanes == 16 ? 96 : 48;          // a multiple of both

// Memory that grows, at the beginning of a line of the caches.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // At least `size` numbers of any value, until the next call.
  float* get(int64_t size) {
    if (size > size_) {
      release();
      data_ = static_cast<float*>(::operator new(static_cast<size_t>(size) * sizeof(float), kLine));
      size_ = size;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kLine{64};

  void release() {
    if (data_) ::operator delete(data_, kLine);
    data_ = nullptr;
    size_ = 0;
  }

  float* data_ = nullptr;
  int64_t size_ = 0;
};

// c[m, n] = (kAdd ? c[m, n] : 0) + sum over k of a[m * row + k * column] * b[k * ldb + n], for one tile of kRows.
template <bool kAdd, int kRows = kTall>
inline void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, int64_t depth, float* c,
                 int64_t ldc) {
  Vec low[kRows] = {}, high[kRows] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(b + k * ldb), second = load(b + k * ldb + kLanes);
    for (int m = 0; m < kRows; ++m) {
      const Vec number = spread(a[m * row + k * column]);
      low[m] += number * first;
      high[m] += number * second;
    }
  }
  for (int m = 0; m < kRows; ++m) {
    store(c + m * ldc, kAdd ? load(c + m * ldc) + low[m] : low[m]);
    store(c + m * ldc + kLanes, kAdd ? load(c + m * ldc + kLanes) + high[m] : high[m]);
  }
}

// The same for `rows` (a multiple of kTall) and `columns` (of kWide). Strip s of b begins at b + s * strip, its row k
// ldb behind its row k - 1.
template <bool kAdd>
inline void product(const float* a, int64_t row, int64_t column, const float* b, int64_t strip, int64_t ldb,
                    int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc) {
  for (int64_t n = 0; n < columns; n += kWide)
    for (int64_t m = 0; m < rows; m += kTall)
      tile<kAdd>(a + m * row, row, column, b + n / kWide * strip, ldb, depth, c + m * ldc + n, ldc);
}

}  // namespace telechat
