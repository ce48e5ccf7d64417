// Causal attention of a training step, with rotary embedding: softmax(q k^T / sqrt(D)) v, q and k rotated first.
//
// The scores exist for some queries and keys at a time (Dao et al., 2022); scores above the diagonal are not computed.
// The gradient computes them once more, from the logarithm of the sums that the softmax divided by. One thread computes
// all that belongs to a key/value head of a sequence, so that results do not depend on the number of threads.
#include "arguments.h"
#include "pool.h"
#include "tile.h"
#include "vector.h"

using namespace telechat;

namespace {

constexpr int64_t kKeys = 2 * kUnit;                       // keys at a time
constexpr float kHidden = -1e30f, kLeast = -1e29f;         // a score that does not count, and less than any that does

// Where q, k and v of a head begin in the rows of tokens.
struct Rows {
  const float *query, *key_value;
  float *dquery, *dkey_value;
  int64_t query_row, key_row, query_head, key_head, key, value;

  int64_t of_query(int64_t token, int64_t head) const { return token * query_row + head * query_head; }
  int64_t of_key(int64_t token, int64_t head) const { return token * key_row + head * key_head + key; }
  int64_t of_value(int64_t token, int64_t head) const { return token * key_row + head * key_head + value; }
};

struct Problem {
  Rows rows;
  int64_t batch, seq, heads, kv_heads, dim;
  const float *cos, *sin;                                  // [1 or B, S, D]
  const int32_t* documents;                                // [1 or B, S]: which document a token belongs to, rising
  bool own_tables, own_documents;
  int64_t padded_seq, padded_dim;

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
  const float* cos_of(int64_t b, int64_t s) const { return cos + ((own_tables ? b : 0) * seq + s) * dim; }
  const float* sin_of(int64_t b, int64_t s) const { return sin + ((own_tables ? b : 0) * seq + s) * dim; }
  const int32_t* documents_of(int64_t b) const { return documents + (own_documents ? b : 0) * seq; }
};

// The gradient of x where that of rotate(x) is dy.
void rotate_back(const float* dy, const float* cos, const float* sin, int64_t dim, float scale,
                 float* __restrict to) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = dy[i], b = dy[half + i];
    to[i] = (a * cos[i] + b * sin[half + i]) * scale;
    to[half + i] = (b * cos[half + i] - a * sin[i]) * scale;
  }
}

// Row `s` of x [S, D] as column of the strips of its transpose.
void put_column(const float* x, int64_t dim, int64_t s, float* strips) {
  float* to = strips + s / kWide * dim * kWide + s % kWide;
  for (int64_t d = 0; d < dim; ++d) to[d * kWide] = x[d];
}

// Memory of one thread, divided into arrays that begin with zeros.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    static thread_local Buffer memory;
    next_ = memory.get(size + kArrays * kLine);
    std::fill(next_, next_ + size + kArrays * kLine, 0.0f);
  }
  float* take(int64_t size) {
    float* taken = next_;
    next_ += up_to(size, kLine);
    return taken;
  }

 private:
  static constexpr int64_t kLine = 16, kArrays = 16;       // numbers in a line of the caches; arrays at most
  float* next_;
};

// Takes scores out that do not count: of keys behind a query, of other documents, and of no tokens.
void hide(float* scores, int64_t first_query, int64_t queries, int64_t first_key, int64_t keys,
          const int64_t* first_of) {
  for (int64_t i = 0; i < queries; ++i) {
    float* row = scores + i * kKeys;
    const int64_t query = first_query + i;
    for (int64_t j = 0; j < std::min(keys, first_of[query] - first_key); ++j) row[j] = kHidden;
    for (int64_t j = std::max<int64_t>(0, query + 1 - first_key); j < keys; ++j) row[j] = kHidden;
  }
}

// The first key that each query sees.
std::vector<int64_t> first_keys(const int32_t* documents, int64_t seq, int64_t padded) {
  std::vector<int64_t> first(padded, 0);
  for (int64_t i = 1; i < padded; ++i)
    first[i] = i < seq && documents[i] != documents[i - 1] ? i : first[i - 1];
  return first;
}

void forward(const Problem& p, int64_t b, int64_t kv, float* out, float* lse) {
  const int64_t dim = p.dim, wide = p.padded_dim, seq = p.seq, group = p.heads / p.kv_heads;
  Scratch scratch(p.padded_seq * (dim + wide) + kUnit * (dim + wide + kKeys + 2));
  float* keys = scratch.take(p.padded_seq * dim);          // strips of k^T
  float* values = scratch.take(p.padded_seq * wide);
  float* query = scratch.take(kUnit * dim);
  float* context = scratch.take(kUnit * wide);
  float* scores = scratch.take(kUnit * kKeys);
  float *top = scratch.take(kUnit), *total = scratch.take(kUnit);
  std::vector<float> rotated(dim);
  for (int64_t s = 0; s < seq; ++s) {
    const int64_t token = b * seq + s;
    rotate(p.rows.key_value + p.rows.of_key(token, kv), p.cos_of(b, s), p.sin_of(b, s), dim, 1.0f, rotated.data());
    put_column(rotated.data(), dim, s, keys);
    std::memcpy(values + s * wide, p.rows.key_value + p.rows.of_value(token, kv), dim * sizeof(float));
  }
  const std::vector<int64_t> first_of = first_keys(p.documents_of(b), seq, p.padded_seq);
  for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    for (int64_t at = 0; at < seq; at += kUnit) {
      const int64_t queries = std::min(kUnit, seq - at);
      for (int64_t i = 0; i < queries; ++i)
        rotate(p.rows.query + p.rows.of_query(b * seq + at + i, head), p.cos_of(b, at + i), p.sin_of(b, at + i), dim,
               p.scale(), query + i * dim);
      std::memset(query + queries * dim, 0, (kUnit - queries) * dim * sizeof(float));
      std::memset(context, 0, kUnit * wide * sizeof(float));
      for (int64_t i = 0; i < kUnit; ++i) top[i] = kLeast, total[i] = 0;
      for (int64_t key = first_of[at] / kUnit * kUnit; key < at + kUnit; key += kKeys) {
        const int64_t many = std::min(kKeys, at + kUnit - key);
        product<false>(query, dim, 1, keys + key * dim, dim * kWide, kWide, kUnit, many, dim, scores, kKeys);
        if (key + many > at || first_of[at + queries - 1] > key) hide(scores, at, kUnit, key, many, first_of.data());
        for (int64_t i = 0; i < kUnit; ++i) {
          float* row = scores + i * kKeys;
          Vec most = spread(top[i]);
          for (int64_t j = 0; j < many; j += kLanes) most = larger(most, load(row + j));
          const float now = largest(most), before = exponential(top[i] - now);
          Vec all{};
          for (int64_t j = 0; j < many; j += kLanes) {
            const Vec e = exponential(load(row + j) - now);
            store(row + j, e);
            all += e;
          }
          total[i] = total[i] * before + sum(all);
          if (before != 1.0f) {
            float* row = context + i * wide;
            for (int64_t d = 0; d < wide; d += kLanes) store(row + d, load(row + d) * before);
          }
          top[i] = now;
        }
        product<true>(scores, kKeys, 1, values + key * wide, kWide, wide, kUnit, wide, many, context, wide);
      }
      for (int64_t i = 0; i < queries; ++i) {
        const float inverse = 1.0f / total[i];
        float* to = out + ((b * seq + at + i) * p.heads + head) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = context[i * wide + d] * inverse;
        lse[(b * p.heads + head) * seq + at + i] = top[i] + std::log(total[i]);
      }
    }
  }
}

void backward(const Problem& p, int64_t b, int64_t kv, const float* out, const float* lse, const float* dy) {
  const int64_t dim = p.dim, wide = p.padded_dim, seq = p.seq, group = p.heads / p.kv_heads;
  Scratch scratch(p.padded_seq * (2 * dim + 3 * wide) + kUnit * (4 * wide + 2 * kKeys + 2));
  float* keys_across = scratch.take(p.padded_seq * dim);   // strips of k^T and v^T
  float* values_across = scratch.take(p.padded_seq * dim);
  float* keys = scratch.take(p.padded_seq * wide);
  float* dkeys = scratch.take(p.padded_seq * wide);
  float* dvalues = scratch.take(p.padded_seq * wide);
  float *query = scratch.take(kUnit * wide), *dquery = scratch.take(kUnit * wide);
  float *above = scratch.take(kUnit * wide);               // the gradient of the context
  float *probs = scratch.take(kUnit * kKeys), *dscores = scratch.take(kUnit * kKeys);
  float *sums_of = scratch.take(kUnit), *pull = scratch.take(kUnit);
  for (int64_t s = 0; s < seq; ++s) {
    const int64_t token = b * seq + s;
    rotate(p.rows.key_value + p.rows.of_key(token, kv), p.cos_of(b, s), p.sin_of(b, s), dim, 1.0f, keys + s * wide);
    put_column(keys + s * wide, dim, s, keys_across);
    put_column(p.rows.key_value + p.rows.of_value(token, kv), dim, s, values_across);
  }
  const std::vector<int64_t> first_of = first_keys(p.documents_of(b), seq, p.padded_seq);
  for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    for (int64_t at = 0; at < seq; at += kUnit) {
      const int64_t queries = std::min(kUnit, seq - at);
      std::memset(query + queries * wide, 0, (kUnit - queries) * wide * sizeof(float));
      std::memset(above + queries * wide, 0, (kUnit - queries) * wide * sizeof(float));
      std::memset(dquery, 0, kUnit * wide * sizeof(float));
      for (int64_t i = 0; i < kUnit; ++i) sums_of[i] = 1e30f, pull[i] = 0;       // no probability where no query is
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t token = b * seq + at + i;
        rotate(p.rows.query + p.rows.of_query(token, head), p.cos_of(b, at + i), p.sin_of(b, at + i), dim, p.scale(),
               query + i * wide);
        const float *gradient = dy + (token * p.heads + head) * dim, *result = out + (token * p.heads + head) * dim;
        float along = 0;
        for (int64_t d = 0; d < dim; ++d) along += gradient[d] * result[d], above[i * wide + d] = gradient[d];
        pull[i] = along;
        sums_of[i] = lse[(b * p.heads + head) * seq + at + i];
      }
      for (int64_t key = first_of[at] / kUnit * kUnit; key < at + kUnit; key += kKeys) {
        const int64_t many = std::min(kKeys, at + kUnit - key);
        product<false>(query, wide, 1, keys_across + key * dim, dim * kWide, kWide, kUnit, many, dim, probs, kKeys);
        if (key + many > at || first_of[at + queries - 1] > key) hide(probs, at, kUnit, key, many, first_of.data());
        product<false>(above, wide, 1, values_across + key * dim, dim * kWide, kWide, kUnit, many, dim, dscores, kKeys);
        for (int64_t i = 0; i < kUnit; ++i) {
          float *row = probs + i * kKeys, *drow = dscores + i * kKeys;
          for (int64_t j = 0; j < many; j += kLanes) {
            const Vec e = exponential(load(row + j) - sums_of[i]);
            store(row + j, e);
            store(drow + j, e * (load(drow + j) - pull[i]));
          }
        }
        product<true>(probs, 1, kKeys, above, kWide, wide, many, wide, queries, dvalues + key * wide, wide);
        product<true>(dscores, 1, kKeys, query, kWide, wide, many, wide, queries, dkeys + key * wide, wide);
        product<true>(dscores, kKeys, 1, keys + key * wide, kWide, wide, kUnit, wide, many, dquery, wide);
      }
      for (int64_t i = 0; i < queries; ++i)
        rotate_back(dquery + i * wide, p.cos_of(b, at + i), p.sin_of(b, at + i), dim, p.scale(),
                    p.rows.dquery + p.rows.of_query(b * seq + at + i, head));
    }
  }
  for (int64_t s = 0; s < seq; ++s) {
    const int64_t token = b * seq + s;
    rotate_back(dkeys + s * wide, p.cos_of(b, s), p.sin_of(b, s), dim, 1.0f,
                p.rows.dkey_value + p.rows.of_key(token, kv));
    std::memcpy(p.rows.dkey_value + p.rows.of_value(token, kv), dvalues + s * wide, dim * sizeof(float));
  }
}

// From arguments `first` ... : cos and sin [1 or B, 1, S, D], documents [1 or B, S].
Problem problem(const Arguments& given, int first, int64_t tokens) {
  Problem p{};
  p.seq = given.length(first, 2), p.dim = given.length(first, 3);
  p.batch = p.seq ? tokens / p.seq : 0;
  p.cos = given.floats(first), p.sin = given.floats(first + 1), p.documents = given.integers(first + 2);
  p.own_tables = given.length(first, 0) > 1, p.own_documents = given.length(first + 2, 0) > 1;
  p.padded_seq = up_to(p.seq, kUnit), p.padded_dim = up_to(p.dim, kWide);
  return p;
}

// Arguments query [T, N D], key_value [T, 2 N_kv D] of [k | v] per head, and those of `problem`.
Problem of_two(const Arguments& given) {
  Problem p = problem(given, 2, given.length(0, 0));
  Rows& rows = p.rows;
  rows.query = given.floats(0), rows.key_value = given.floats(1);
  rows.query_row = given.length(0, 1), rows.key_row = given.length(1, 1);
  rows.query_head = p.dim, rows.key_head = 2 * p.dim, rows.key = 0, rows.value = p.dim;
  p.heads = rows.query_row / p.dim, p.kv_heads = rows.key_row / (2 * p.dim);
  return p;
}

// Arguments rows [T, 3 N D] of [q | k | v] per head, and those of `problem`.
Problem of_one(const Arguments& given) {
  Problem p = problem(given, 1, given.length(0, 0));
  Rows& rows = p.rows;
  rows.query = rows.key_value = given.floats(0);
  rows.query_row = rows.key_row = given.length(0, 1);
  rows.query_head = rows.key_head = 3 * p.dim, rows.key = p.dim, rows.value = 2 * p.dim;
  p.heads = p.kv_heads = rows.query_row / (3 * p.dim);
  return p;
}

// Calls part(sequence, key/value head) for all.
template <typename Part>
void heads(const Problem& p, const Part& part) {
  std::lock_guard<std::mutex> turn(Pool::get().turn());
  Pool::get().run(p.batch * p.kv_heads, [&](int64_t i) { part(i / p.kv_heads, i % p.kv_heads); });
}

}  // namespace

// query [T, N D], key_value [T, 2 N_kv D], cos, sin, documents -> context [T, N D], lse [T N]: by sequence, head and
// token, the logarithm of the sum of e^score.
TELECHAT_SHAPES(Attention) {
  const bool known = shapes[0][0] >= 0 && shapes[0][1] >= 0 && shapes[2][3] > 0;
  return {shape_of(0, ndims, shapes), {known ? shapes[0][0] * (shapes[0][1] / shapes[2][3]) : -1}};
}

TELECHAT_OPERATOR(Attention) {
  const Arguments given(params, ndims, shapes);
  const Problem p = of_two(given);
  heads(p, [&](int64_t b, int64_t kv) { forward(p, b, kv, given.floats(5), given.floats(6)); });
  return 0;
}

// The inputs and outputs of Attention, dcontext [T, N D] -> dquery, dkey_value
TELECHAT_SHAPES(AttentionGradient) { return {shape_of(0, ndims, shapes), shape_of(1, ndims, shapes)}; }

TELECHAT_OPERATOR(AttentionGradient) {
  const Arguments given(params, ndims, shapes);
  Problem p = of_two(given);
  p.rows.dquery = given.floats(8), p.rows.dkey_value = given.floats(9);
  heads(p, [&](int64_t b, int64_t kv) { backward(p, b, kv, given.floats(5), given.floats(6), given.floats(7)); });
  return 0;
}

// rows [T, 3 N D], cos, sin, documents -> context and lse
TELECHAT_SHAPES(AttentionOfOne) {
  const Shape context{shapes[0][0], shapes[0][1] < 0 ? -1 : shapes[0][1] / 3};
  const bool known = shapes[0][0] >= 0 && shapes[0][1] >= 0 && shapes[1][3] > 0;
  return {context, {known ? shapes[0][0] * (context[1] / shapes[1][3]) : -1}};
}

TELECHAT_OPERATOR(AttentionOfOne) {
  const Arguments given(params, ndims, shapes);
  const Problem p = of_one(given);
  heads(p, [&](int64_t b, int64_t kv) { forward(p, b, kv, given.floats(4), given.floats(5)); });
  return 0;
}

// The inputs and outputs of AttentionOfOne, dcontext -> drows
TELECHAT_SHAPE(AttentionOfOneGradient) { return shape_of(0, ndims, shapes); }

TELECHAT_OPERATOR(AttentionOfOneGradient) {
  const Arguments given(params, ndims, shapes);
  Problem p = of_one(given);
  p.rows.dquery = p.rows.dkey_value = given.floats(7);
  heads(p, [&](int64_t b, int64_t kv) { backward(p, b, kv, given.floats(4), given.floats(5), given.floats(6)); });
  return 0;
}
