// Vectors of W floats by the compiler's vector types, and the functions of them that softmax needs.
//
// One source for every instruction set: what the vector types lack (a maximum in one instruction,
// 2^n by exponent) is an intrinsic where there is one, and plain arithmetic elsewhere.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

// W floats a vector; a product keeps TILE_ROWS x TILE_VECTORS vectors in registers.
#if defined(__AVX512F__)
constexpr int W = 16, TILE_ROWS = 6, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int W = 8, TILE_ROWS = 6, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int W = 4, TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int W = 4, TILE_ROWS = 6, TILE_VECTORS = 2;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Bits __attribute__((vector_size(W * 4)));
typedef float Anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));

INLINE Floats load(const float* p) { return *(const Anywhere*)p; }
INLINE void store(float* p, Floats x) { *(Anywhere*)p = x; }
INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

// The larger; b where either is NaN, so a NaN in b stays.
INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select((Ints)(a > b), a, b);
#endif
}
INLINE Floats minimum(Floats a, Floats b) { return -maximum(-a, -b); }
INLINE Floats absolute(Floats x) { return maximum(x, -x); }

INLINE Floats nearest_integer(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)x, 8);
#else
  return (x + 12582912.f) - 12582912.f;  // 1.5 * 2^23: what is smaller than 1 is rounded off
#endif
}

// x * 2^n, for whole n
INLINE Floats scaled(Floats x, Floats n) {
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  return (Floats)((Bits)x + ((Bits)__builtin_convertvector(n, Ints) << 23));
#endif
}

// The exponent from which on powers are 0: scalef makes a 0 itself, integers would wrap around.
#if defined(__AVX512F__)
constexpr float LEAST_EXPONENT = -200.f;
INLINE Floats zero_below_least(Floats power, Floats) { return power; }
#else
constexpr float LEAST_EXPONENT = -87.f;
INLINE Floats zero_below_least(Floats power, Floats x) {
  return (Floats)((Ints)power & ~(Ints)(x < LEAST_EXPONENT));
}
#endif

// (2^x - 1) / x for |x| <= 0.5, relative error 1e-8
INLINE Floats power_series(Floats x) {
  Floats p = x * 1.535336194e-04f + 1.339887440e-03f;
  p = p * x + 9.618437357e-03f;
  p = p * x + 5.550332471e-02f;
  p = p * x + 2.402264791e-01f;
  return p * x + 6.931472029e-01f;
}

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// e^x for x up to 88, of float precision
INLINE Floats exp(Floats x) {
  Floats y = maximum(splat(LEAST_EXPONENT), x), n = nearest_integer(y * LOG2_E);
  Floats f = y * LOG2_E - n;
  return zero_below_least(scaled(power_series(f) * f + 1.f, n), x);
}

// 2^x, relative error 9e-8: more than bfloat16 asks for
INLINE Floats exp2(Floats x) {
  Floats y = maximum(splat(LEAST_EXPONENT), x), n = nearest_integer(y), f = y - n;
  Floats p = f * 1.326472719e-03f + 9.671512640e-03f;
  p = p * f + 5.550733743e-02f;
  p = p * f + 2.402224209e-01f;
  p = p * f + 6.931469776e-01f;
  return zero_below_least(scaled(p * f + 1.f, n), x);
}

// tanh = (e^2x - 1) / (e^2x + 1), from e^2x - 1, so that it is as precise next to 0.
INLINE Floats tanh(Floats x) {
  x = minimum(splat(12.f), maximum(splat(-12.f), x));
  Floats y = x * (2 * LOG2_E), n = nearest_integer(y), f = y - n;
  Floats power = scaled(splat(1.f), n);
  Floats less_one = power_series(f) * f * power + (power - 1.f);
  return less_one / (less_one + 2.f);
}

INLINE float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace
