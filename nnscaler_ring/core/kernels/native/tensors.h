// Tensors in any strides and their rows as dense blocks in the numbers that products take.
#pragma once
#include "products.h"

namespace {

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

struct Tensor {  // [batch, rows, heads, channels]; strides in elements
  char* data;
  long batch, row, head, channel;
};

INLINE long item_size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }
INLINE char* address(const Tensor& t, int dtype, long batch, long row, long head) {
  return t.data + (batch * t.batch + row * t.row + head * t.head) * item_size(dtype);
}
INLINE float& number(const Tensor& t, long batch, long row, long head) {
  return *(float*)address(t, FLOAT32, batch, row, head);
}

INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE float from_bfloat16(uint16_t x) { return from_bits((uint32_t)x << 16); }
INLINE uint16_t to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}

INLINE float from_float16(uint16_t x) {
  // The exponent moves up by 112; 31, which is infinity and NaN, becomes 255.
  float size = from_bits((uint32_t)(x & 0x7fff) << 13) * 0x1p112f;
  uint32_t special = (x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return from_bits(bits_of(size) | special | (uint32_t)(x & 0x8000) << 16);
}
INLINE uint16_t to_float16(float x) {  // to nearest, ties to even
  uint32_t sign = bits_of(x) >> 16 & 0x8000;
  float size = from_bits(bits_of(x) & 0x7fffffff);
  // Below 2^-14 float16 has a fixed step, 2^-24: that of a float of 0.5 or more.
  uint32_t small = bits_of(size + 0.5f) - 0x3f000000;
  uint32_t bits = bits_of(size), usual = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  uint32_t half = size < 0x1p-14f ? small : size < 65520.f ? usual : x != x ? 0x7e00 : 0x7c00;
  return sign | half;
}

// ---- rows in ----

template <class T, float (*convert)(T)>
INLINE void read_row(const T* from, long step, long count, float* to) {
  if (step == 1)
    for (long c = 0; c < count; ++c) to[c] = convert(from[c]);
  else
    for (long c = 0; c < count; ++c) to[c] = convert(from[c * step]);
}
INLINE float same(float x) { return x; }

INLINE void row_in(int dtype, const char* from, long step, long count, float* to) {
  switch (dtype) {
    case FLOAT32: return read_row<float, same>((const float*)from, step, count, to);
    case BFLOAT16: return read_row<uint16_t, from_bfloat16>((const uint16_t*)from, step, count, to);
    case FLOAT16: return read_row<uint16_t, from_float16>((const uint16_t*)from, step, count, to);
  }
}
INLINE void row_in(int, const char* from, long step, long count, uint16_t* to) {
  const uint16_t* bits = (const uint16_t*)from;
  if (step == 1) memcpy(to, bits, count * 2);
  else
    for (long c = 0; c < count; ++c) to[c] = bits[c * step];
}

// Channels of a dense row: a multiple of 16 words, zeros at the end.
template <class Words> INLINE long padded(long channels) {
  return round_up(channels, 16 * Words::PER_WORD);
}

// Rows of a tensor one after another, padded; `upto` rows, those from `rows` on are zeros.
template <class Words>
static void rows_in(const Tensor& t, int dtype, long batch, long row, long head, long rows,
                    long upto, long channels, float* block) {
  typedef typename Words::Element Element;
  const long wide = padded<Words>(channels);
  for (long i = 0; i < upto; ++i) {
    Element* to = (Element*)block + i * wide;
    long filled = i < rows ? channels : 0;
    if (filled) row_in(dtype, address(t, dtype, batch, row + i, head), t.channel, channels, to);
    memset(to + filled, 0, (wide - filled) * sizeof(Element));
  }
}

template <class Words> INLINE void negate(long rows, long channels, float* block) {
  const uint32_t sign = Words::PER_WORD == 1 ? 0x80000000 : 0x80008000;
  for (long w = 0; w < rows * padded<Words>(channels) / Words::PER_WORD; ++w)
    block[w] = from_bits(bits_of(block[w]) ^ sign);
}

// ---- rows out ----

template <class T, T (*convert)(float)>
INLINE void write_row(const float* from, long count, T* to, long step) {
  if (step == 1)
    for (long c = 0; c < count; ++c) to[c] = convert(from[c]);
  else
    for (long c = 0; c < count; ++c) to[c * step] = convert(from[c]);
}

static void row_out(int dtype, const float* from, long count, char* to, long step) {
  switch (dtype) {
    case FLOAT32: return write_row<float, same>(from, count, (float*)to, step);
    case BFLOAT16: return write_row<uint16_t, to_bfloat16>(from, count, (uint16_t*)to, step);
    case FLOAT16: return write_row<uint16_t, to_float16>(from, count, (uint16_t*)to, step);
  }
}

// ---- order of a block ----

// to [columns][rows] from [rows][columns] words; both multiples of 16
static void transpose(long rows, long columns, const float* from, long from_row, float* to,
                      long to_row) {
#if defined(__AVX512F__)
  for (long i = 0; i < rows; i += 16)
    for (long w = 0; w < columns; w += 16) {
      __m512i r[16], t[16];
      for (int x = 0; x < 16; ++x) r[x] = _mm512_loadu_si512(from + (i + x) * from_row + w);
      // Four rounds exchange 32, 64, 128 and 256 bits.
      for (int x = 0; x < 16; x += 2) {
        t[x] = _mm512_unpacklo_epi32(r[x], r[x + 1]);
        t[x + 1] = _mm512_unpackhi_epi32(r[x], r[x + 1]);
      }
      for (int x = 0; x < 16; x += 4) {
        r[x] = _mm512_unpacklo_epi64(t[x], t[x + 2]);
        r[x + 1] = _mm512_unpackhi_epi64(t[x], t[x + 2]);
        r[x + 2] = _mm512_unpacklo_epi64(t[x + 1], t[x + 3]);
        r[x + 3] = _mm512_unpackhi_epi64(t[x + 1], t[x + 3]);
      }
      for (int x = 0; x < 16; x += 8)
        for (int y = x; y < x + 4; ++y) {
          t[y] = _mm512_shuffle_i32x4(r[y], r[y + 4], 0x88);
          t[y + 4] = _mm512_shuffle_i32x4(r[y], r[y + 4], 0xdd);
        }
      for (int x = 0; x < 8; ++x) {
        float* column = to + (w + x) * to_row + i;
        _mm512_storeu_si512(column, _mm512_shuffle_i32x4(t[x], t[x + 8], 0x88));
        _mm512_storeu_si512(column + 8 * to_row, _mm512_shuffle_i32x4(t[x], t[x + 8], 0xdd));
      }
    }
#else
  for (long i = 0; i < rows; i += 16)
    for (long w = 0; w < columns; ++w)
      for (long x = i; x < i + 16; ++x) memcpy(to + w * to_row + x, from + x * from_row + w, 4);
#endif
}

// Words of two rows each, from padded rows: to [rows / PER_WORD][padded channels] words
template <class Words>
static void pair_rows(long rows, long channels, const float* block, float* to) {
  const long wide = padded<Words>(channels);
  if (Words::PER_WORD == 1) {
    memcpy(to, block, rows * wide * 4);
    return;
  }
  const uint16_t* elements = (const uint16_t*)block;
  for (long i = 0; i < rows; i += 2, to += wide)
    for (long c = 0; c < wide; ++c) {
      uint32_t bits = elements[i * wide + c] | (uint32_t)elements[(i + 1) * wide + c] << 16;
      memcpy(to + c, &bits, 4);
    }
}

}  // namespace
