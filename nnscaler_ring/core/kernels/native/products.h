// Matrix products of blocks that lie dense in the cache.
//
// The inner dimension is counted in words of 32 bits: one float, or two bfloat16 that one
// instruction multiplies and adds. `FloatWords` and `Bfloat16Words` say what a word is.
#pragma once
#include "vectors.h"

namespace {

struct FloatWords {
  typedef float Element;
  static constexpr int PER_WORD = 1;
  static constexpr float UNIT = 1.f;  // logits are multiplied by it before `power`
  INLINE Floats power(Floats x) { return exp(x); }
  INLINE Floats broadcast(const float* word) { return splat(*word); }
  INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
struct Bfloat16Words {
  typedef uint16_t Element;
  static constexpr int PER_WORD = 2;
  static constexpr float UNIT = LOG2_E;
  INLINE Floats power(Floats x) { return exp2(x); }
  INLINE Floats broadcast(const float* word) {
    int32_t bits;
    memcpy(&bits, word, 4);
    return (Floats)_mm512_set1_epi32(bits);
  }
  INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // 32 numbers in their order
  INLINE Floats row(Floats first, Floats second) {
    return (Floats)(__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  // 16 words, the first of a pair in the low half
  INLINE Floats pairs(Floats first, Floats second) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
        21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)row(first, second);
    return (Floats)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
  }
};
#endif

// What a product does with the numbers that are there: C = AB, C + AB, C * factors[column] + AB.
enum Into { SET, ADD, SCALE_AND_ADD };

struct Left {  // A: its first word, and the distance in words of its rows and columns
  const float* words;
  long row, column;
};

template <class Words, int ROWS, int VECTORS, Into into>
INLINE void product_tile(long inner, Left a, const float* b, long b_row, float* c, long c_row,
                         const float* factors) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) sums[m][n] = Floats{};
  for (long k = 0; k < inner; ++k) {
    Floats right[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) right[n] = load(b + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      Floats left = Words::broadcast(a.words + m * a.row);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n)
        sums[m][n] = Words::multiply_add(left, right[n], sums[m][n]);
    }
    a.words += a.column;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      float* p = c + m * c_row + n * W;
      if (into == SET) store(p, sums[m][n]);
      if (into == ADD) store(p, load(p) + sums[m][n]);
      if (into == SCALE_AND_ADD) store(p, load(p) * load(factors + n * W) + sums[m][n]);
    }
}

template <class Words, int VECTORS, Into into>
static __attribute__((noinline)) void product_columns(long rows, long inner, Left a, const float* b,
                                                      long b_row, float* c, long c_row,
                                                      const float* factors) {
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS) {
    product_tile<Words, TILE_ROWS, VECTORS, into>(inner, a, b, b_row, c, c_row, factors);
    a.words += TILE_ROWS * a.row;
    c += TILE_ROWS * c_row;
  }
  switch (rows) {
    case 5: return product_tile<Words, 5, VECTORS, into>(inner, a, b, b_row, c, c_row, factors);
    case 4: return product_tile<Words, 4, VECTORS, into>(inner, a, b, b_row, c, c_row, factors);
    case 3: return product_tile<Words, 3, VECTORS, into>(inner, a, b, b_row, c, c_row, factors);
    case 2: return product_tile<Words, 2, VECTORS, into>(inner, a, b, b_row, c, c_row, factors);
    case 1: return product_tile<Words, 1, VECTORS, into>(inner, a, b, b_row, c, c_row, factors);
  }
}

// C [rows][columns] from A [rows][inner words] and B [inner][columns] words; columns % W == 0.
template <class Words, Into into>
INLINE void product(long rows, long columns, long inner, Left a, const float* b, long b_row,
                    float* c, long c_row, const float* factors = nullptr) {
  long n = 0;
  auto of_column = [&](long n) { return into == SCALE_AND_ADD ? factors + n : nullptr; };
  for (; n + TILE_VECTORS * W <= columns; n += TILE_VECTORS * W)
    product_columns<Words, TILE_VECTORS, into>(rows, inner, a, b + n, b_row, c + n, c_row,
                                               of_column(n));
  for (; n < columns; n += W)
    product_columns<Words, 1, into>(rows, inner, a, b + n, b_row, c + n, c_row, of_column(n));
}

}  // namespace
