// Vectors of floats by the compiler's vector extension: 16 lanes where the processor has AVX-512, else 8.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace telechat {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t IntQuad __attribute__((vector_size(16)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec spread(float value) { return value - Vec{}; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// a b + c, rounded once or twice alike wherever it stands: left to itself, the compiler fuses some and others not.
inline float add_product(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec add_product(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Folds a vector to four sums, always in the same order.
inline Quad fold(Vec v) {
#if defined(__AVX512F__)
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX__)
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
  Quad q[2];
  std::memcpy(q, &v, sizeof v);
  return q[0] + q[1];
#endif
}

inline Quad mix(Quad a, Quad b, IntQuad which) {
#if defined(__clang__)
  Quad r;
  for (int i = 0; i < 4; ++i) r[i] = which[i] < 4 ? a[which[i]] : b[which[i] - 4];
  return r;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

// The sums of four vectors.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
  const IntQuad low{0, 4, 1, 5}, high{2, 6, 3, 7};
  Quad fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  Quad ab = mix(fa, fb, low) + mix(fa, fb, high);        // a0+a2 b0+b2 a1+a3 b1+b3
  Quad cd = mix(fc, fd, low) + mix(fc, fd, high);
  return mix(ab, cd, IntQuad{0, 1, 4, 5}) + mix(ab, cd, IntQuad{2, 3, 6, 7});
}

// The sum of one vector, in the order of `sums`.
inline float sum(Vec v) {
  Quad q = fold(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

inline float largest(Vec v) {
  float r = v[0];
  for (int i = 1; i < kLanes; ++i) r = v[i] > r ? v[i] : r;
  return r;
}

// e^x for x <= 88: x = n ln 2 + r, a polynomial of degree 6 on |r| <= ln 2 / 2 (Taylor, in Horner's form), exponent n
// by bits. Below -87 the result is 0, of NaN it is NaN. Relative error below 3e-7.
inline Vec exponential(Vec x) {
  const Vec tiny = spread(-87.0f);
  const Vec clipped = x < tiny ? tiny : x;                // NaN stays
  Vec scaled = clipped * 1.44269504f;
  const Vec magic = spread(12582912.0f);                 // 1.5 * 2^23: adding it rounds to a whole number
  Vec shifted = scaled + magic;
  Vec n = shifted - magic;
  Vec r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntVec bits = ((IntVec)shifted - 0x4B400000 + 127) << 23;
  Vec power = (Vec)bits;
  Vec result = p * power;
  return x < tiny ? Vec{} : result;
}

inline float exponential(float x) { return exponential(spread(x))[0]; }

// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) {
  const Vec most = spread(87.0f), minus = -x;
  return 1.0f / (1.0f + exponential(minus < most ? minus : most));
}

// `size` rounded up to a multiple of `unit`.
inline int64_t up_to(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Reads up to kLanes floats, zeros behind them, and writes as many.
inline Vec load_some(const float* from, int64_t count) {
  Vec v{};
  std::memcpy(&v, from, static_cast<size_t>(count) * 4);
  return v;
}

inline void store_some(float* to, Vec v, int64_t count) { std::memcpy(to, &v, static_cast<size_t>(count) * 4); }

// One number or four, as a tile of products has them.
template <typename Value>
inline Value get(const float* from) {
  Value v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Value>
inline void set(float* to, Value v) { std::memcpy(to, &v, sizeof v); }

// to = (x cos + rotate_half(x) sin) * scale of one head, rotate_half([a, b]) = [-b, a]; not in place.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t dim, float scale, float* __restrict to) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    to[i] = (a * cos[i] - b * sin[i]) * scale;
    to[half + i] = (b * cos[half + i] + a * sin[half + i]) * scale;
  }
}

}  // namespace telechat
