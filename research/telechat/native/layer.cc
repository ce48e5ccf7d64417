// A whole decoder layer for prediction (telechat_transformer.TelechatDecodeLayer), and head and greedy choice behind
// the last one. float32, any number of tokens of any sequences at once.
#include "arguments.h"
#include "attention.h"

namespace telechat {
namespace {

// What rows of a step belong to, [3, T] int32.
struct Rows {
  const int32_t *positions, *sequences, *slots;          // of each row: in its sequence, which, where it is cached
  const int32_t* tables;                                 // blocks of each sequence [B, K]
  int64_t blocks;                                        // K
};

// Sizes as the operator gets them, int32.
struct Sizes {
  int32_t heads, kv_heads, dim, block_size, ffn, groups, fused;
};

struct Weights {
  const float *attention_norm, *wq, *wq_bias, *wkv, *wkv_bias, *wo, *wo_bias;
  const float *ffn_norm, *w1, *w3, *w2, *w2_bias;
};

struct Cache {
  float *keys, *values;
  int64_t slots;                                         // per head
};

// Rows that follow each other in one sequence.
struct Run {
  int64_t first, count;
};

// y = x / sqrt(mean(x^2) + eps) * weight, rows [T, H].
void norm(const float* x, const float* weight, float eps, int64_t rows, int64_t hidden, float* y) {
  split(rows, std::max<int64_t>(1, 4096 / hidden), [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      const float* in = x + t * hidden;
      float* out = y + t * hidden;
      Vec squares{};
      int64_t i = 0;
      for (; i + kLanes <= hidden; i += kLanes) squares += load(in + i) * load(in + i);
      float total = sum(squares);
      for (; i < hidden; ++i) total += in[i] * in[i];
      const float inverse = 1.0f / std::sqrt(total / hidden + eps);
      for (i = 0; i + kLanes <= hidden; i += kLanes) store(out + i, load(in + i) * inverse * load(weight + i));
      for (; i < hidden; ++i) out[i] = in[i] * inverse * weight[i];
    }
  });
}

// Projections whose work is shared out together.
struct Projection {
  const float *weight, *bias;
  float* out;
  int64_t columns;
};

void project(const float* x, int64_t rows, int64_t depth, const Projection* both, int count) {
  std::vector<Blocks> blocks;
  int64_t tasks = 0;
  for (int p = 0; p < count; ++p) {
    blocks.emplace_back(rows, both[p].columns, depth);
    tasks += blocks.back().tasks();
  }
  Pool::get().run(tasks, [&](int64_t i) {
    int p = 0;
    while (i >= blocks[p].tasks()) i -= blocks[p++].tasks();
    const Projection& to = both[p];
    blocks[p].part(i, [&](int64_t top, int64_t bottom, int64_t first, int64_t last) {
      products(x + top * depth, depth, bottom - top, to.weight, depth, first, last, depth,
               [&](int64_t m, int64_t n, auto v) {
                 set(to.out + (top + m) * to.columns + n, to.bias ? v + get<decltype(v)>(to.bias + n) : v);
               });
    });
  });
}

// silu(x w1^T) * (x w3^T), [T, F]. With fused projections, w1 holds gate and up of each group one after the other.
void gated(const float* x, int64_t rows, int64_t depth, const float* w1, const float* w3, const Sizes& sizes,
           float* y) {
  const int64_t groups = sizes.fused ? sizes.groups : 1, wide = sizes.ffn / groups;
  const Blocks blocks(rows, wide, 2 * depth);
  Pool::get().run(groups * blocks.tasks(), [&](int64_t i) {
    const int64_t group = i / blocks.tasks();
    const float* gate = w1 + (sizes.fused ? group * 2 * wide * depth : 0);
    const float* up = sizes.fused ? gate + wide * depth : w3;
    float* out = y + group * wide;
    blocks.part(i % blocks.tasks(), [&](int64_t top, int64_t bottom, int64_t first, int64_t last) {
      const float* in = x + top * depth;
      const int64_t high = bottom - top, across = last - first;
      float* gates = scratch(high * (across + kLanes));
      const int64_t width = up_to(across, kLanes);
      products(in, depth, high, gate, depth, first, last, depth,
               [&](int64_t m, int64_t n, auto v) { set(gates + m * width + n - first, v); });
      for (int64_t m = 0; m < high; ++m) {
        for (int64_t n = 0; n < across; n += kLanes) {
          const Vec g = load(gates + m * width + n);
          store(gates + m * width + n, g * sigmoid(g));
        }
      }
      products(in, depth, high, up, depth, first, last, depth, [&](int64_t m, int64_t n, auto v) {
        set(out + (top + m) * sizes.ffn + n, get<decltype(v)>(gates + m * width + n - first) * v);
      });
    });
  });
}

// y = x + a w^T + bias.
void add_products(const float* x, const float* a, int64_t rows, int64_t depth, const float* weight, const float* bias,
                 int64_t columns, float* y) {
  const Blocks blocks(rows, columns, depth);
  Pool::get().run(blocks.tasks(), [&](int64_t i) {
    blocks.part(i, [&](int64_t top, int64_t bottom, int64_t first, int64_t last) {
      products(a + top * depth, depth, bottom - top, weight, depth, first, last, depth,
               [&](int64_t m, int64_t n, auto v) {
                 const int64_t at = (top + m) * columns + n;
                 set(y + at, get<decltype(v)>(x + at) + (bias ? v + get<decltype(v)>(bias + n) : v));
               });
    });
  });
}

// Buffers of a layer, kept from call to call.
struct Buffers {
  std::vector<float> memory;
  float* next = nullptr;

  void reserve(int64_t floats) {
    if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
    next = memory.data();
  }

  float* take(int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  }
};

struct Layer {
  Sizes sizes;
  Weights weights;
  Cache cache;
  Rows rows;
  const float *cos, *sin;
  float eps;
  int64_t tokens, hidden;

  int64_t group() const { return sizes.heads / sizes.kv_heads; }
  int64_t query_stride() const { return sizes.fused ? 3 * sizes.dim : sizes.dim; }

  // Writes keys and values of all rows into the cache, rotated. kv: [T, N_kv, 2 D], or as `qkv` with a stride.
  void write(const float* kv, int64_t row_stride, int64_t head_stride) const {
    const int64_t dim = sizes.dim;
    split(tokens, std::max<int64_t>(1, 4096 / hidden), [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        if (rows.slots[t] < 0) continue;
        for (int64_t h = 0; h < sizes.kv_heads; ++h) {
          const float* k = kv + t * row_stride + h * head_stride;
          const int64_t at = (h * cache.slots + rows.slots[t]) * dim;
          rotate(k, cos + t * dim, sin + t * dim, dim, 1.0f, cache.keys + at);
          std::memcpy(cache.values + at, k + dim, dim * 4);
        }
      }
    });
  }

  Pages pages(const float* values, int64_t head, int64_t row) const {
    return {values + head * cache.slots * sizes.dim, rows.tables + rows.sequences[row] * rows.blocks, sizes.block_size,
            sizes.dim};
  }

  // Attention of the rows `wanted` (all where it is null), whose rotated queries are q [R, N, D], in place.
  void attend(float* q, const int32_t* wanted, int64_t count) const {
    const auto row = [&](int64_t i) { return wanted ? wanted[i] : i; };
    std::vector<Run> runs;
    for (int64_t i = 0; i < count;) {
      int64_t last = i + 1;
      if (rows.slots[row(i)] >= 0) {
        while (last < count && last - i < kQueries && rows.slots[row(last)] >= 0 &&
               rows.sequences[row(last)] == rows.sequences[row(i)] &&
               rows.positions[row(last)] == rows.positions[row(last - 1)] + 1)
          ++last;
        runs.push_back({i, last - i});
      } else {
        std::fill_n(q + i * hidden, hidden, 0.0f);         // a row of padding
      }
      i = last;
    }
    const int64_t dim = sizes.dim, many = static_cast<int64_t>(runs.size());
    // The last runs of a prompt look at the most keys: they come first.
    Pool::get().run(many * sizes.kv_heads, [&](int64_t task) {
      const Run& run = runs[many - 1 - task / sizes.kv_heads];
      const int64_t head = task % sizes.kv_heads, at = row(run.first);
      const Pages keys = pages(cache.keys, head, at), values = pages(cache.values, head, at);
      float* queries = q + run.first * hidden + head * group() * dim;
      const int64_t first = rows.positions[at];
      if (run.count == 1) {
        attend_alone(queries, group(), keys, values, first + 1, queries);
        return;
      }
      for (int64_t g = 0; g < group(); ++g)
        attend_block(queries + g * dim, hidden, run.count, first, keys, values, queries + g * dim);
    });
  }

  // wanted: the rows of x whose results are y [R, H]; all where it is null.
  void operator()(const float* x, const int32_t* wanted, int64_t count, float* y) const {
    const int64_t dim = sizes.dim, kv_width = 2 * sizes.kv_heads * dim, q_width = sizes.fused ? 3 * hidden : hidden;
    static Buffers buffers;
    buffers.reserve(tokens * (hidden + q_width + kv_width) + count * (4 * hidden + sizes.ffn + kLanes));
    float* normed = buffers.take(tokens * hidden);
    float* q = buffers.take(tokens * q_width);
    float* kv = buffers.take(tokens * kv_width);
    float* context = buffers.take(count * hidden);
    float* h = buffers.take(count * hidden);
    float* h_normed = buffers.take(count * hidden);
    float* residual = buffers.take(count * hidden);
    float* inner = buffers.take(count * sizes.ffn);

    norm(x, weights.attention_norm, eps, tokens, hidden, normed);
    const Projection both[2] = {{weights.wq, weights.wq_bias, q, q_width},
                                {weights.wkv, weights.wkv_bias, kv, kv_width}};
    if (sizes.fused) {
      project(normed, tokens, hidden, both, 1);
      write(q + dim, q_width, 3 * dim);
    } else if (wanted) {
      project(normed, tokens, hidden, both + 1, 1);
      write(kv, kv_width, 2 * dim);
      for (int64_t i = 0; i < count; ++i) std::memcpy(residual + i * hidden, normed + wanted[i] * hidden, hidden * 4);
      project(residual, count, hidden, both, 1);
    } else {
      project(normed, tokens, hidden, both, 2);
      write(kv, kv_width, 2 * dim);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    split(count, std::max<int64_t>(1, 4096 / hidden), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t t = wanted ? wanted[i] : i;
        const float* row = q + (sizes.fused ? t : i) * q_width;
        for (int64_t n = 0; n < sizes.heads; ++n)
          rotate(row + n * query_stride(), cos + t * dim, sin + t * dim, dim, scale, context + i * hidden + n * dim);
        if (wanted) std::memcpy(residual + i * hidden, x + t * hidden, hidden * 4);
      }
    });
    attend(context, wanted, count);
    add_products(wanted ? residual : x, context, count, hidden, weights.wo, weights.wo_bias, hidden, h);
    norm(h, weights.ffn_norm, eps, count, hidden, h_normed);
    gated(h_normed, count, hidden, weights.w1, weights.w3, sizes, inner);
    add_products(h, inner, count, sizes.ffn, weights.w2, weights.w2_bias, hidden, y);
  }
};

// A bias of one element means there is none: no layer is that narrow.
const float* bias(const Arguments& given, int number) {
  return given.length(number, 0) > 1 ? given.floats(number) : nullptr;
}

// The inputs in the order of model/native_decoder.py.
Layer layer_of(const Arguments& given) {
  Layer layer;
  layer.tokens = given.length(0, 0);
  layer.hidden = given.length(0, 1);
  layer.weights = {given.floats(1), given.floats(2), bias(given, 3), given.floats(4), bias(given, 5), given.floats(6),
                   bias(given, 7), given.floats(8), given.floats(9), given.floats(10), given.floats(11),
                   bias(given, 12)};
  std::memcpy(&layer.sizes, given.integers(19), sizeof layer.sizes);
  layer.cache = {given.floats(13), given.floats(14), given.length(13, 0) / layer.sizes.kv_heads};
  layer.cos = given.floats(15);
  layer.sin = given.floats(16);
  const int32_t* rows = given.integers(17);
  layer.rows = {rows, rows + layer.tokens, rows + 2 * layer.tokens, given.integers(18), given.length(18, 1)};
  layer.eps = *given.floats(20);
  return layer;
}

}  // namespace
}  // namespace telechat

using namespace telechat;

// How many threads share the work of an operator.
extern "C" void UseThreads(int count) { Pool::get().use(count); }

// The inputs of model/native_decoder.py -> x of the next layer [T, H]; keys and values are written into the cache.
TELECHAT_SHAPE(DecoderLayer) { return shape_of(0, ndims, shapes); }

TELECHAT_OPERATOR(DecoderLayer) {
  const Arguments given(params, ndims, shapes);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  layer_of(given)(given.floats(0), nullptr, given.length(0, 0), given.floats(21));
  return 0;
}

// As DecoderLayer, of the rows in the last input [R] only -> [R, H]
TELECHAT_SHAPE(LastDecoderLayer) { return {shapes[21][0], shapes[0][1]}; }

TELECHAT_OPERATOR(LastDecoderLayer) {
  const Arguments given(params, ndims, shapes);
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  layer_of(given)(given.floats(0), given.integers(21), given.length(21, 0), given.floats(22));
  return 0;
}

// x [R, H], norm weight [H], head weight [V, H], eps [1], logits_scale [1] -> logits [R, V], the most likely tokens [R]
TELECHAT_SHAPES(Head) { return {{shapes[0][0], shapes[2][0]}, {shapes[0][0]}}; }

TELECHAT_OPERATOR(Head) {
  const Arguments given(params, ndims, shapes);
  const int64_t rows = given.length(0, 0), hidden = given.length(0, 1), vocabulary = given.length(2, 0);
  const float *weight = given.floats(2), scale = *given.floats(4);
  float* logits = given.floats(5);
  auto* tokens = const_cast<int32_t*>(given.integers(6));
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  static Buffers buffers;
  buffers.reserve(rows * hidden);
  float* normed = buffers.take(rows * hidden);
  norm(given.floats(0), given.floats(1), *given.floats(3), rows, hidden, normed);
  const Blocks blocks(rows, vocabulary, hidden);
  Pool::get().run(blocks.tasks(), [&](int64_t i) {
    blocks.part(i, [&](int64_t top, int64_t bottom, int64_t first, int64_t last) {
      products(normed + top * hidden, hidden, bottom - top, weight, hidden, first, last, hidden,
               [&](int64_t m, int64_t n, auto v) { set(logits + (top + m) * vocabulary + n, v * scale); });
    });
  });
  split(rows, 1, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const float* row = logits + r * vocabulary;
      const float top = maximum(row, vocabulary);
      int64_t at = 0;
      while (at < vocabulary && row[at] != top) ++at;
      tokens[r] = at < vocabulary ? static_cast<int32_t>(at) : 0;
    }
  });
  return 0;
}
