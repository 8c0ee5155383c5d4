// What happens to a block of logits between the product and the softmax, and dropout.
#pragma once
#include "call.h"

namespace {

constexpr long QUERIES = 64;                  // of a panel: the columns of a block of logits
constexpr long KEYS = 64;                     // the rows of a block of logits, at most
constexpr long VECTORS = QUERIES / W;         // of a row
constexpr long BLOCK = KEYS * QUERIES;

// Queries of one head whose logits are computed together.
struct Panel {
  long batch, head, first, rows;              // queries [first, first + rows)
  long first_key, last_key;                   // that some of them sees: [first_key, last_key)
  float slope;                                // of ALiBi
  float positions[QUERIES];
  uint64_t words[QUERIES];                    // of dropout
  float maximum[QUERIES], sum[QUERIES], shrink[QUERIES];  // of the softmax so far
  float lse[QUERIES], delta[QUERIES];         // of the backward
  float *q_columns, *dout_columns;            // [words of a row][QUERIES]
  float *q_pairs, *dout_pairs;                // [words of QUERIES][channels]
  float *sums;                                // of out or dq, [channels][QUERIES]
};

struct Keys { long first, count; };           // [first, first + count), at most KEYS

// The mixing of core/scores/dropout.py: Note [The same mask everywhere].
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
template <class Word> INLINE Word mix(Word x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
INLINE uint64_t golden(int64_t number) { return (uint64_t)(number + 1) * GOLDEN; }

static void dropout_words_of_queries(const Call& call, Panel& panel) {
  uint64_t word = mix((uint64_t)call.seed + GOLDEN);
  word = mix(word + golden(call.first_batch + panel.batch));
  word = mix(word + golden(call.first_head + panel.head));
  for (long i = 0; i < panel.rows; ++i)
    panel.words[i] = mix(word + golden(call.q_tokens[panel.first + i]));
}
static void dropout_words_of_keys(const Call& call, Keys keys, uint64_t* words) {
  for (long j = 0; j < keys.count; ++j) words[j] = mix(golden(call.k_tokens[keys.first + j]));
}

// All bits set where the pair of W queries and a key is kept.
INLINE Ints is_kept(const uint64_t* of_queries, uint64_t of_key, int64_t dropped_below) {
  typedef uint64_t Words __attribute__((vector_size(W * 8)));
  typedef int64_t Longs __attribute__((vector_size(W * 8)));
  Words words;
  memcpy(&words, of_queries, sizeof words);
  Longs uniform = (Longs)(mix(words + of_key) >> 11);  // 53 bits
  return __builtin_convertvector(uniform >= dropped_below, Ints);
}

// Scores with scale, softcap, bias and ALiBi, times `unit`; `slopes`: the softcap's derivative.
template <bool SLOPES>
static void modify_logits(const Call& call, const Panel& panel, Keys keys, float unit,
                          float* logits, float* slopes, float* bias_rows, float* bias) {
  const float scale = std::fabs(call.softmax_scale), softcap = call.softcap;
  if (call.bias.data) {
    for (long i = 0; i < panel.rows; ++i)
      row_in(call.bias_dtype,
             address(call.bias, call.bias_dtype, panel.batch, panel.first + i, panel.head) +
                 keys.first * call.bias.channel * item_size(call.bias_dtype),
             call.bias.channel, keys.count, bias_rows + i * KEYS);
    memset(bias_rows + panel.rows * KEYS, 0, (QUERIES - panel.rows) * KEYS * 4);
    transpose(QUERIES, KEYS, bias_rows, KEYS, bias, QUERIES);
  }
  for (long j = 0; j < keys.count; ++j)
    for (long at = j * QUERIES; at < (j + 1) * QUERIES; at += W) {
      Floats logit = load(logits + at) * scale;
      if (softcap > 0) {
        Floats ratio = tanh(logit / softcap);
        logit = ratio * softcap;
        if (SLOPES) store(slopes + at, 1.f - ratio * ratio);
      }
      if (call.bias.data) logit += load(bias + at);
      if (call.alibi_slopes) {
        Floats positions = load(panel.positions + at - j * QUERIES);
        logit -= panel.slope * absolute(positions - call.k_positions[keys.first + j]);
      }
      store(logits + at, logit * unit);
    }
}

// -inf where the band hides the key.
static void hide_logits(const Call& call, const Panel& panel, Keys keys, float* logits) {
  const long last_key = keys.first + keys.count - 1, last_query = panel.first + panel.rows - 1;
  if (keys.first - last_query >= call.lo && last_key - panel.first <= call.hi) return;
  Ints lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  for (long j = 0; j < keys.count; ++j) {
    // Columns [from, to] of the panel see the key.
    const long distance = keys.first + j - panel.first;
    const int from = least(most(distance - call.hi, 0), QUERIES);
    const int to = most(least(distance - call.lo, QUERIES), -1);
    for (int v = 0; v < QUERIES; v += W) {
      if (from <= v && v + W - 1 <= to) continue;
      Ints seen = (lanes + v >= from) & (lanes + v <= to);
      float* p = logits + j * QUERIES + v;
      store(p, select(seen, load(p), splat(-INFINITY)));
    }
  }
}

}  // namespace
