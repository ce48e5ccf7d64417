// Causal attention over a paged cache of keys and values (model/kv_cache.py: rows [N_kv * slots, D], head by head).
//
// softmax(q k^T) v with queries that are rotated and scaled already. A query that stands alone, as in decoding, looks
// at its keys one after the other; those of a prompt are taken in blocks, with the running maximum and sum of
// FlashAttention (Dao et al., 2022), so that scores are never stored as a whole.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "matmul.h"

namespace telechat {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Memory of a thread, kept from call to call.
inline float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

// Keys or values of one head of one sequence.
struct Pages {
  const float* head;                                     // of slot 0
  const int32_t* blocks;                                 // which block holds tokens 0 .. size - 1, and so on
  int64_t size, dim;

  const float* block(int64_t number) const { return head + blocks[number] * size * dim; }
  const float* row(int64_t token) const { return block(token / size) + token % size * dim; }
};

// Asks for memory that is read next.
inline void fetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i);
}

// x[i] = exp(x[i] - top) for `count` numbers; their sum.
inline float exponentials(float* x, int64_t count, float top) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec e = exponential(load(x + i) - top);
    store(x + i, e);
    total += e;
  }
  float result = sum(total);
  for (; i < count; ++i) {
    x[i] = exponential(x[i] - top);
    result += x[i];
  }
  return result;
}

inline float maximum(const float* x, int64_t count) {
  Vec top = spread(kNothing);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = larger(top, load(x + i));
  float result = largest(top);
  for (; i < count; ++i) result = std::max(result, x[i]);
  return result;
}

// One query of each of `group` heads that share keys and values: q and context [group, D], `count` tokens to look at.
inline void attend_alone(const float* q, int64_t group, const Pages& keys, const Pages& values, int64_t count,
                         float* context) {
  const int64_t dim = keys.dim, width = (count + kLanes - 1) / kLanes * kLanes;
  float* scores = scratch(group * width);
  for (int64_t first = 0; first < count; first += keys.size) {
    const int64_t here = std::min(keys.size, count - first);
    if (first + keys.size < count) fetch(keys.block(first / keys.size + 1), keys.size * dim);
    products(q, dim, group, keys.block(first / keys.size), dim, 0, here, dim,
             [&](int64_t m, int64_t n, auto v) { set(scores + m * width + first + n, v); });
  }
  for (int64_t g = 0; g < group; ++g) {
    float* p = scores + g * width;
    const float scale = 1.0f / exponentials(p, count, maximum(p, count));
    for (int64_t d = 0; d < dim; d += 4 * kLanes) {
      const int64_t lanes = std::min<int64_t>(4 * kLanes, dim - d);
      Vec acc[4] = {};
      for (int64_t first = 0; first < count; first += values.size) {
        const int64_t here = std::min(values.size, count - first);
        const float* v = values.block(first / values.size) + d;
        if (first + values.size < count) fetch(values.block(first / values.size + 1) + d, values.size * dim);
        if (lanes == 4 * kLanes) {
          for (int64_t j = 0; j < here; ++j, v += dim)
            for (int i = 0; i < 4; ++i) acc[i] = add_product(spread(p[first + j]), load(v + i * kLanes), acc[i]);
        } else {
          for (int64_t j = 0; j < here; ++j, v += dim)
            for (int i = 0; i * kLanes < lanes; ++i)
              acc[i] = add_product(spread(p[first + j]),
                                   load_some(v + i * kLanes, std::min<int64_t>(kLanes, lanes - i * kLanes)), acc[i]);
        }
      }
      for (int i = 0; i * kLanes < lanes; ++i)
        store_some(context + g * dim + d + i * kLanes, acc[i] * scale, std::min<int64_t>(kLanes, lanes - i * kLanes));
    }
  }
}

// c[m, 0 .. 2 kLanes) (+)= sum over k of a[m, k] * b(k)[0 .. 2 kLanes), where b(k) is row k of pages or of a matrix.
template <int MR, bool kAdd>
inline __attribute__((always_inline)) void outer_tile(const float* a, int64_t lda, const float* const* rows,
                                                      int64_t step, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  Vec acc[MR][2];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < 2; ++n) acc[m][n] = kAdd ? load(c + m * ldc + n * kLanes) : Vec{};
  for (int64_t first = 0; first < depth; first += step, ++rows) {
    const float* b = *rows;
    const int64_t last = std::min(depth, first + step);
    for (int64_t k = first; k < last; ++k, b += ldb) {
      const Vec b0 = load(b), b1 = load(b + kLanes);
      for (int m = 0; m < MR; ++m) {
        const Vec factor = spread(a[m * lda + k]);
        acc[m][0] = add_product(factor, b0, acc[m][0]);
        acc[m][1] = add_product(factor, b1, acc[m][1]);
      }
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < 2; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
}

constexpr int kTile = 6;                                 // rows of outer_tile
constexpr int64_t kQueries = 16 * kTile, kKeys = 256;    // in a block

// Queries of one head at consecutive positions: `count` (at most kQueries) rows of q, `stride` apart, the first of them
// at position `first`; context likewise.
inline void attend_block(const float* q, int64_t stride, int64_t count, int64_t first, const Pages& keys,
                         const Pages& values, float* context) {
  const int64_t dim = keys.dim, wide = up_to(dim, 2 * kLanes), rows = up_to(count, kTile);
  float* query = scratch(rows * dim + dim * kKeys + rows * kKeys + rows * wide + 2 * rows);
  float* transposed = query + rows * dim;                // keys [D, kKeys]
  float* scores = transposed + dim * kKeys;              // [rows, kKeys]
  float* result = scores + rows * kKeys;                 // [rows, wide]
  float* top = result + rows * wide;
  float* total = top + rows;
  for (int64_t i = 0; i < rows; ++i) {
    if (i < count) std::memcpy(query + i * dim, q + i * stride, dim * 4);
    else std::fill_n(query + i * dim, dim, 0.0f);
  }
  std::fill_n(result, rows * wide, 0.0f);
  std::fill_n(top, rows, kNothing);
  std::fill_n(total, rows, 0.0f);
  const int64_t length = first + count;
  // Keys at once: whole blocks of the cache. Values that follow each other: a block, or one if blocks are of odd sizes.
  const int64_t at_once = values.size <= kKeys ? kKeys / values.size * values.size : kKeys;
  const int64_t step = values.size <= kKeys ? values.size : values.size % kKeys ? 1 : kKeys;
  for (int64_t from = 0; from < length; from += at_once) {
    const int64_t here = std::min(at_once, length - from), columns = up_to(here, 2 * kLanes);
    for (int64_t j = 0; j < columns; ++j) {
      if (j < here) {
        const float* k = keys.row(from + j);
        for (int64_t d = 0; d < dim; ++d) transposed[d * kKeys + j] = k[d];
      } else {
        for (int64_t d = 0; d < dim; ++d) transposed[d * kKeys + j] = 0.0f;
      }
    }
    for (int64_t j = 0; j < columns; j += 2 * kLanes) {
      const float* column = transposed + j;
      for (int64_t i = 0; i < rows; i += kTile)
        outer_tile<kTile, false>(query + i * dim, dim, &column, dim, kKeys, dim, scores + i * kKeys + j, kKeys);
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* p = scores + i * kKeys;
      const int64_t seen = i < count ? std::min(here, first + i - from + 1) : 0;
      if (seen > 0) {
        const float largest_now = std::max(top[i], maximum(p, seen));
        const float before = exponential(top[i] - largest_now);
        total[i] = total[i] * before + exponentials(p, seen, largest_now);
        top[i] = largest_now;
        for (int64_t d = 0; d < wide; d += kLanes) store(result + i * wide + d, load(result + i * wide + d) * before);
      }
      std::fill(p + std::max<int64_t>(seen, 0), p + here, 0.0f);
    }
    for (int64_t d = 0; d < wide; d += 2 * kLanes) {
      const float* pages[kKeys];
      for (int64_t j = 0; j < here; j += step) pages[j / step] = values.row(from + j) + d;
      for (int64_t i = 0; i < rows; i += kTile)
        outer_tile<kTile, true>(scores + i * kKeys, kKeys, pages, step, dim, here, result + i * wide + d, wide);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float scale = 1.0f / total[i];
    for (int64_t d = 0; d < dim; ++d) context[i * stride + d] = result[i * wide + d] * scale;
  }
}

}  // namespace telechat
