// Operators of a training step but attention: linear layers, RMSNorm, SwiGLU, cross entropy, AdamW; all in float32.
//
// Results do not depend on the number of threads: each is computed whole by one thread, and sums over rows are those of
// blocks of rows, which depend on the number of rows only, in their order.
#include "arguments.h"
#include "pool.h"
#include "product.h"
#include "vector.h"

using namespace telechat;

namespace {

// Calls each(i, lanes) for vectors at 0, kLanes, 2 kLanes ... below `size`; lanes is less than kLanes for the last.
template <typename Each>
inline __attribute__((always_inline)) void vectors(int64_t size, const Each& each) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) each(i, kLanes);
  if (i < size) each(i, static_cast<int>(size - i));
}

inline __attribute__((always_inline)) Vec get(const float* from, int lanes) {
  return lanes == kLanes ? load(from) : load_some(from, lanes);
}

inline __attribute__((always_inline)) void put(float* to, Vec v, int lanes) {
  if (lanes == kLanes) store(to, v); else store_some(to, v, lanes);
}

// Rows of a block whose sums are added one after the other; there are 64 blocks at most.
int64_t block_rows(int64_t rows) { return std::max<int64_t>(16, (rows + 63) / 64); }

// Calls work(first, last) for parts of 0 .. size - 1, the same ones whatever the number of threads, so that an element
// is always computed by the same instructions.
template <typename Work>
void parts(int64_t size, const Work& work) {
  constexpr int64_t kPart = 16384;
  Pool::get().run((size + kPart - 1) / kPart, [&](int64_t i) { work(i * kPart, std::min(size, (i + 1) * kPart)); });
}

// Adds the rows of partial [blocks, width] to out [width].
void add_blocks(const std::vector<float>& partial, int64_t blocks, int64_t width, float* out) {
  vectors(width, [&](int64_t i, int lanes) {
    Vec all{};
    for (int64_t b = 0; b < blocks; ++b) all += get(partial.data() + b * width + i, lanes);
    put(out + i, all, lanes);
  });
}

}  // namespace

// x [T, K], weight [N, K] -> x weight^T
TELECHAT_SHAPE(Linear) { return {shapes[0][0], shapes[1][0]}; }

TELECHAT_OPERATOR(Linear) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.length(0, 0), depth = given.length(0, 1), columns = given.length(1, 0);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  multiply({given.floats(0), depth, 1}, {given.floats(1), 1, depth}, given.floats(2), rows, columns, depth);
  return 0;
}

// dy [T, N], weight [N, K] -> dx [T, K] = dy weight
TELECHAT_SHAPE(LinearInputGradient) { return {shapes[0][0], shapes[1][1]}; }

TELECHAT_OPERATOR(LinearInputGradient) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.length(0, 0), depth = given.length(0, 1), columns = given.length(1, 1);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  multiply({given.floats(0), depth, 1}, {given.floats(1), columns, 1}, given.floats(2), rows, columns, depth);
  return 0;
}

// dy [T, N], x [T, K] -> dweight [N, K] = dy^T x
TELECHAT_SHAPE(LinearWeightGradient) { return {shapes[0][1], shapes[1][1]}; }

TELECHAT_OPERATOR(LinearWeightGradient) {
  const Arguments given(params, ndims, shapes);
  const int64_t depth = given.length(0, 0), rows = given.length(0, 1), columns = given.length(1, 1);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  multiply({given.floats(0), 1, rows}, {given.floats(1), columns, 1}, given.floats(2), rows, columns, depth);
  return 0;
}

// x [T, N], bias [N] -> x + bias
TELECHAT_SHAPE(AddBias) { return shape_of(0, ndims, shapes); }

TELECHAT_OPERATOR(AddBias) {
  const Arguments given(params, ndims, shapes);
  const int64_t width = given.length(0, 1);
  const float *x = given.floats(0), *bias = given.floats(1);
  float* y = given.floats(2);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  split(given.length(0, 0), 16, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      vectors(width, [&](int64_t i, int lanes) {
        put(y + t * width + i, get(x + t * width + i, lanes) + get(bias + i, lanes), lanes);
      });
  });
  return 0;
}

// dy [T, N] -> dbias [N], the sum of the rows
TELECHAT_SHAPE(BiasGradient) { return {shapes[0][1]}; }

TELECHAT_OPERATOR(BiasGradient) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.length(0, 0), width = given.length(0, 1);
  const float* dy = given.floats(0);
  const int64_t high = block_rows(rows), blocks = (rows + high - 1) / high;
  std::vector<float> partial(blocks * width);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  Pool::get().run(blocks, [&](int64_t block) {
    float* sums_of = partial.data() + block * width;
    for (int64_t t = block * high; t < std::min(rows, (block + 1) * high); ++t)
      vectors(width, [&](int64_t i, int lanes) {
        put(sums_of + i, get(sums_of + i, lanes) + get(dy + t * width + i, lanes), lanes);
      });
  });
  add_blocks(partial, blocks, width, given.floats(1));
  return 0;
}

// x [..., H], weight [H], eps [1] -> y [..., H] = x r weight, r [T] = 1 / sqrt(mean(x^2) + eps)
TELECHAT_SHAPES(RmsNorm) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < ndims[0]; ++i) rows *= shapes[0][i] < 0 ? -1 : shapes[0][i];
  return {shape_of(0, ndims, shapes), {rows < 0 ? -1 : rows}};
}

TELECHAT_OPERATOR(RmsNorm) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.rows(0), width = given.length(0, -1);
  const float *x = given.floats(0), *weight = given.floats(1), eps = given.floats(2)[0];
  float *y = given.floats(3), *inverse = given.floats(4);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  split(rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float* row = x + t * width;
      Vec squares{};
      vectors(width, [&](int64_t i, int lanes) { const Vec v = get(row + i, lanes); squares += v * v; });
      const float r = inverse[t] = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
      vectors(width, [&](int64_t i, int lanes) {
        put(y + t * width + i, get(row + i, lanes) * r * get(weight + i, lanes), lanes);
      });
    }
  });
  return 0;
}

// x [..., H], weight [H], r [T], dy [..., H] -> dx [..., H] = r (g - x r^2 mean(g x)), g = dy weight;
// dweight [H] = sum over rows of dy x r
TELECHAT_SHAPES(RmsNormGradient) { return {shape_of(0, ndims, shapes), shape_of(1, ndims, shapes)}; }

TELECHAT_OPERATOR(RmsNormGradient) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.rows(0), width = given.length(0, -1);
  const float *x = given.floats(0), *weight = given.floats(1), *inverse = given.floats(2), *dy = given.floats(3);
  float *dx = given.floats(4), *dweight = given.floats(5);
  const int64_t high = block_rows(rows), blocks = (rows + high - 1) / high;
  std::vector<float> partial(blocks * width);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  Pool::get().run(blocks, [&](int64_t block) {
    float* sums_of = partial.data() + block * width;
    for (int64_t t = block * high; t < std::min(rows, (block + 1) * high); ++t) {
      const float *row = x + t * width, *above = dy + t * width, r = inverse[t];
      Vec product{};
      vectors(width, [&](int64_t i, int lanes) {
        const Vec v = get(row + i, lanes), d = get(above + i, lanes);
        product += d * get(weight + i, lanes) * v;
        put(sums_of + i, get(sums_of + i, lanes) + d * (v * r), lanes);
      });
      const float pull = sum(product) / static_cast<float>(width) * r * r;
      vectors(width, [&](int64_t i, int lanes) {
        const Vec g = get(above + i, lanes) * get(weight + i, lanes);
        put(dx + t * width + i, (g - get(row + i, lanes) * pull) * r, lanes);
      });
    }
  });
  add_blocks(partial, blocks, width, dweight);
  return 0;
}

// gate, up: of one shape -> silu(gate) up
TELECHAT_SHAPE(SwiGlu) { return shape_of(0, ndims, shapes); }

TELECHAT_OPERATOR(SwiGlu) {
  const Arguments given(params, ndims, shapes);
  const float *gate = given.floats(0), *up = given.floats(1);
  float* y = given.floats(2);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  parts(given.size(0), [&](int64_t first, int64_t last) {
    vectors(last - first, [&](int64_t i, int lanes) {
      const Vec g = get(gate + first + i, lanes);
      put(y + first + i, g * sigmoid(g) * get(up + first + i, lanes), lanes);
    });
  });
  return 0;
}

// gate, up, dy: of one shape -> dgate, dup
TELECHAT_SHAPES(SwiGluGradient) { return {shape_of(0, ndims, shapes), shape_of(0, ndims, shapes)}; }

TELECHAT_OPERATOR(SwiGluGradient) {
  const Arguments given(params, ndims, shapes);
  const float *gate = given.floats(0), *up = given.floats(1), *dy = given.floats(2);
  float *dgate = given.floats(3), *dup = given.floats(4);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  parts(given.size(0), [&](int64_t first, int64_t last) {
    vectors(last - first, [&](int64_t i, int lanes) {
      const Vec g = get(gate + first + i, lanes), d = get(dy + first + i, lanes), s = sigmoid(g);
      put(dgate + first + i, d * get(up + first + i, lanes) * (s * (1.0f + g * (1.0f - s))), lanes);
      put(dup + first + i, d * (g * s), lanes);
    });
  });
  return 0;
}

// both [T, 2 F], in each of G groups F / G columns of the gate and then as many of up; groups [G] -> [T, F]
TELECHAT_SHAPE(GroupedSwiGlu) { return {shapes[0][0], shapes[0][1] < 0 ? -1 : shapes[0][1] / 2}; }

TELECHAT_OPERATOR(GroupedSwiGlu) {
  const Arguments given(params, ndims, shapes);
  const int64_t groups = given.length(1, 0), wide = given.length(0, 1) / 2 / groups;
  const float* both = given.floats(0);
  float* y = given.floats(2);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  split(given.length(0, 0) * groups, std::max<int64_t>(1, 4096 / wide), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float *gate = both + t * 2 * wide, *up = gate + wide;
      vectors(wide, [&](int64_t i, int lanes) {
        const Vec g = get(gate + i, lanes);
        put(y + t * wide + i, g * sigmoid(g) * get(up + i, lanes), lanes);
      });
    }
  });
  return 0;
}

// both and groups as above, dy [T, F] -> dboth [T, 2 F]
TELECHAT_SHAPE(GroupedSwiGluGradient) { return shape_of(0, ndims, shapes); }

TELECHAT_OPERATOR(GroupedSwiGluGradient) {
  const Arguments given(params, ndims, shapes);
  const int64_t groups = given.length(1, 0), wide = given.length(0, 1) / 2 / groups;
  const float *both = given.floats(0), *dy = given.floats(2);
  float* dboth = given.floats(3);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  split(given.length(0, 0) * groups, std::max<int64_t>(1, 4096 / wide), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float *gate = both + t * 2 * wide, *up = gate + wide;
      float* to = dboth + t * 2 * wide;
      vectors(wide, [&](int64_t i, int lanes) {
        const Vec g = get(gate + i, lanes), d = get(dy + t * wide + i, lanes), s = sigmoid(g);
        put(to + i, d * get(up + i, lanes) * (s * (1.0f + g * (1.0f - s))), lanes);
        put(to + wide + i, d * (g * s), lanes);
      });
    }
  });
  return 0;
}

// logits [T, V], labels [T] int32, ignored [1] int32 -> loss [T], 0 where the label is `ignored`;
// lse [T] = log of the sum of e^logits. Fails where another label is no column.
TELECHAT_SHAPES(CrossEntropy) { return {{shapes[0][0]}, {shapes[0][0]}}; }

TELECHAT_OPERATOR(CrossEntropy) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.length(0, 0), width = given.length(0, 1);
  const float* logits = given.floats(0);
  const int32_t *labels = given.integers(1), ignored = given.integers(2)[0];
  float *loss = given.floats(3), *lse = given.floats(4);
  for (int64_t t = 0; t < rows; ++t)
    if (labels[t] != ignored && (labels[t] < 0 || labels[t] >= width)) return 1;
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  split(rows, 4, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float* row = logits + t * width;
      if (labels[t] == ignored) {
        loss[t] = lse[t] = 0;
        continue;
      }
      const int64_t whole = width - width % kLanes;
      Vec most = spread(row[0]);
      for (int64_t i = 0; i < whole; i += kLanes) most = larger(most, load(row + i));
      float top = largest(most);
      for (int64_t i = whole; i < width; ++i) top = row[i] > top ? row[i] : top;
      Vec all[4] = {};
      int64_t i = 0;
      for (; i + 4 * kLanes <= width; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) all[j] += exponential(load(row + i + j * kLanes) - top);
      for (; i < whole; i += kLanes) all[0] += exponential(load(row + i) - top);
      float total = sum((all[0] + all[1]) + (all[2] + all[3]));
      for (; i < width; ++i) total += exponential(row[i] - top);
      lse[t] = top + std::log(total);
      loss[t] = std::log(total) - (row[labels[t]] - top);
    }
  });
  return 0;
}

// logits, labels and ignored as above, lse [T], dloss [T] -> dlogits [T, V] = dloss (e^(logits - lse) - one_hot(label))
TELECHAT_SHAPE(CrossEntropyGradient) { return shape_of(0, ndims, shapes); }

TELECHAT_OPERATOR(CrossEntropyGradient) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.length(0, 0), width = given.length(0, 1);
  const float *logits = given.floats(0), *lse = given.floats(3), *dloss = given.floats(4);
  const int32_t *labels = given.integers(1), ignored = given.integers(2)[0];
  float* dlogits = given.floats(5);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  split(rows, 4, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float* row = logits + t * width;
      float* to = dlogits + t * width;
      if (labels[t] == ignored) {
        std::memset(to, 0, width * sizeof(float));
        continue;
      }
      const float d = dloss[t], shift = lse[t];
      vectors(width, [&](int64_t i, int lanes) { put(to + i, exponential(get(row + i, lanes) - shift) * d, lanes); });
      to[labels[t]] -= d;
    }
  });
  return 0;
}

// parameter, mean, square of one shape, which are changed; rate, beta1, beta2, eps, decay of one number each; gradient
// -> nothing of interest. mean and square take the gradient up, and parameter -= rate (mean / (sqrt(square) + eps) +
// decay parameter).
TELECHAT_SHAPE(AdamW) { return {1}; }

TELECHAT_OPERATOR(AdamW) {
  const Arguments given(params, ndims, shapes);
  float *parameter = given.floats(0), *mean = given.floats(1), *square = given.floats(2);
  const float rate = given.floats(3)[0], beta1 = given.floats(4)[0], beta2 = given.floats(5)[0];
  const float eps = given.floats(6)[0], decay = given.floats(7)[0], rest1 = 1.0f - beta1, rest2 = 1.0f - beta2;
  const float* gradient = given.floats(8);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  parts(given.size(0), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float g = gradient[i], m = mean[i] * beta1 + g * rest1, v = square[i] * beta2 + g * g * rest2;
      mean[i] = m;
      square[i] = v;
      parameter[i] -= rate * (m / (std::sqrt(v) + eps) + decay * parameter[i]);
    }
  });
  given.floats(9)[0] = 0;
  return 0;
}
