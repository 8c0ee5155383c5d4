// What Python passes: the fields of `_Call` in cpu_tiles.py, in the same order.
#pragma once
#include "tensors.h"

namespace {

struct Call {
  int64_t poisoned;  // memory is NaN until it is written: for tests
  int64_t dtype;     // of q, k, v, out, dout and what comes back for them; all but the bias else is float
  int64_t bias_dtype;
  int64_t batch, num_heads, num_kv_heads, nq, nk, head_dim, v_head_dim;
  Tensor q, k, v, out, lse;       // lse: [batch, nq, num_heads]
  Tensor dout, dlse, dq, dk, dv;  // of the backward; dlse as lse, or no data
  Tensor bias, dbias;             // [batch, nq, num_heads, nk], or no data
  double softmax_scale, softcap;  // softcap 0: none
  int64_t lo, hi;                 // query i sees key j where lo <= j - i <= hi
  const float *alibi_slopes, *q_positions, *k_positions;  // [batch, num_heads], [nq], [nk], or null
  const int64_t *q_tokens, *k_tokens;                     // [nq], [nk]; null: no dropout
  int64_t seed, dropped_below, first_batch, first_head;
  double kept_factor;  // 1 / (1 - probability)
};

}  // namespace
