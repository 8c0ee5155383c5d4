// Attention of one tile on a CPU, forward and backward: core/kernels/tile_math.py, step by step and
// under the same names, in blocks of 64 queries and 64 keys. A C interface; no torch, no Python.
//
// Note [Scores by columns]
//   A block of logits is [keys][queries]: a vector holds one key of W queries. So the maximum and
//   the sum of a query's logits are taken lane by lane, a band is a comparison of lane numbers, and
//   neither K nor V is transposed. Queries past the last one are zeros; their results are dropped.
//
// Note [Who computes what]
//   Four panels share a block of keys that was read once. Forward, an item is a KV head and four
//   panels of the query heads that share it. Backward, an item is a KV head and a share of its
//   panels, with sums of dk and dv of its own; there are as many shares as give every thread as
//   many items as the others, and their sums are added in the order of the shares. So the bits
//   depend on the number of threads, but not on which thread computes what.
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>
#include "logits.h"

#ifndef SOURCES
#define SOURCES "unknown"
#endif

namespace {

constexpr long PANELS = 4;       // that share a block of keys
constexpr long FLOAT_CHUNK = 32; // so many products are summed before the sum joins the others

// Memory of one thread, handed out once.
struct Memory {
  char *base = nullptr, *free_from = nullptr;
  bool reserve(size_t floats, size_t pieces, bool poisoned) {
    size_t bytes = round_up(floats * 4 + pieces * 64, 4096);
    free_from = base = (char*)std::aligned_alloc(4096, bytes);
    if (base && poisoned) memset(base, 0xff, bytes);  // NaN
    return base != nullptr;
  }
  float* take(size_t floats) {
    float* piece = (float*)free_from;
    free_from += round_up(floats * 4, 64);
    return piece;
  }
  ~Memory() { std::free(base); }
};

// Blocks of one thread; which of them are used depends on the pass.
struct Blocks {
  Memory memory;
  Panel panels[PANELS];
  float *rows, *k_rows, *v_rows, *k_pairs, *v_pairs;    // of keys; `rows` of anything
  float *logits, *slopes, *dprobabilities;              // [KEYS][QUERIES]
  float *probability_rows, *probability_pairs, *dscore_rows, *dscore_pairs;
  float *bias_rows, *bias;
  float *dk, *dv;                                       // sums, [nk][padded channels]
  uint64_t k_words[KEYS];
};

template <class Words> struct Kernel {
  static constexpr int PER_WORD = Words::PER_WORD;
  static constexpr bool IN_PAIRS = PER_WORD == 2;

  const Call& call;
  const bool is_backward, has_mods;
  const long group = call.num_heads / call.num_kv_heads;
  const long panels = round_up(call.nq, QUERIES) / QUERIES * group;  // of a KV head
  const long batches = round_up(panels, PANELS) / PANELS;            // of panels
  const long kv_heads = call.batch * call.num_kv_heads;
  const long wide = padded<Words>(call.head_dim), v_wide = padded<Words>(call.v_head_dim);
  const long words = (call.head_dim + PER_WORD - 1) / PER_WORD;
  const long v_words = (call.v_head_dim + PER_WORD - 1) / PER_WORD;
  // What the exponential takes is a logit times this; modified logits have it already.
  const float unit = has_mods ? 1.f : std::fabs(call.softmax_scale) * Words::UNIT;
  long shares = 1;

  Kernel(const Call& call, bool is_backward)
      : call(call), is_backward(is_backward),
        // A scale of 0 comes before the -inf of hidden logits, whose product is NaN.
        has_mods(call.softcap > 0 || call.bias.data || call.alibi_slopes || call.q_tokens ||
                 call.softmax_scale == 0) {}

  bool drops() const { return call.q_tokens != nullptr; }
  long items() const { return kv_heads * (is_backward ? shares : batches); }
  long key_words(long keys) const { return (keys + PER_WORD - 1) / PER_WORD; }
  size_t sums_size() const { return call.nk * (wide + v_wide); }

  bool reserve(Blocks& b) const {
    const long widest = most(wide, v_wide);
    const long of_panel = (2 * (wide + v_wide) + widest) * QUERIES;
    const long sums = is_backward && shares == 1 ? sums_size() : 0;
    if (!b.memory.reserve(PANELS * of_panel + 5 * KEYS * widest + 9 * BLOCK + sums, 64,
                          call.poisoned))
      return false;
    for (Panel& panel : b.panels) {
      panel.q_columns = b.memory.take(round_up(words, 16) * QUERIES);
      panel.sums = b.memory.take(widest * QUERIES);
      if (!is_backward) continue;
      panel.dout_columns = b.memory.take(round_up(v_words, 16) * QUERIES);
      panel.q_pairs = b.memory.take(QUERIES / PER_WORD * wide);
      panel.dout_pairs = b.memory.take(QUERIES / PER_WORD * v_wide);
    }
    for (float** p : {&b.rows, &b.k_rows, &b.v_rows, &b.k_pairs, &b.v_pairs})
      *p = b.memory.take(KEYS * widest);
    for (float** p : {&b.logits, &b.slopes, &b.dprobabilities, &b.bias_rows, &b.bias})
      *p = b.memory.take(BLOCK);
    for (float** p : {&b.probability_rows, &b.probability_pairs, &b.dscore_rows, &b.dscore_pairs})
      *p = IN_PAIRS ? b.memory.take(BLOCK) : nullptr;
    if (!IN_PAIRS) {  // a float is a word: both orders are the block itself
      b.probability_rows = b.probability_pairs = b.logits;
      b.dscore_rows = b.dscore_pairs = b.dprobabilities;
    }
    if (sums) {
      b.dk = b.memory.take(call.nk * wide);
      b.dv = b.memory.take(call.nk * v_wide);
    }
    return true;
  }

  // ---- panels ----

  // Panels [batch of panels * PANELS, ...) of a KV head: heads of the group side by side.
  long set_up_panels(Blocks& b, long batch, long kv_head, long number) const {
    long count = 0;
    for (long x = number * PANELS; x < least(panels, (number + 1) * PANELS); ++x) {
      Panel& panel = b.panels[count++];
      panel.batch = batch;
      panel.head = kv_head * group + x % group;
      panel.first = x / group * QUERIES;
      panel.rows = least(QUERIES, call.nq - panel.first);
      panel.first_key = call.lo < -call.nq ? 0 : most(0, panel.first + call.lo);
      panel.last_key =
          call.hi > call.nk ? call.nk : least(call.nk, panel.first + panel.rows + call.hi);
      if (call.alibi_slopes) {
        panel.slope = call.alibi_slopes[batch * call.num_heads + panel.head];
        for (long i = 0; i < QUERIES; ++i)
          panel.positions[i] = i < panel.rows ? call.q_positions[panel.first + i] : 0;
      }
      if (drops()) dropout_words_of_queries(call, panel);
      read_rows(call.q, panel, call.head_dim, b.rows);
      if (is_backward) pair_rows<Words>(QUERIES, call.head_dim, b.rows, panel.q_pairs);
      // The sign of the scale goes to q, so that the largest score has the largest product.
      if (call.softmax_scale < 0) negate<Words>(QUERIES, call.head_dim, b.rows);
      transpose_rows(call.head_dim, b.rows, panel.q_columns);
      memset(panel.sums, 0, (is_backward ? wide : v_wide) * QUERIES * 4);
    }
    return count;
  }

  void read_rows(const Tensor& t, const Panel& panel, long channels, float* rows) const {
    rows_in<Words>(t, call.dtype, panel.batch, panel.first, panel.head, panel.rows, QUERIES,
                   channels, rows);
  }
  void transpose_rows(long channels, const float* rows, float* columns) const {
    const long wide = padded<Words>(channels) / PER_WORD;
    transpose(QUERIES, wide, rows, wide, columns, QUERIES);
  }

  Keys keys_of_panels(const Blocks& b, long count) const {
    long first = call.nk, last = 0;
    for (long x = 0; x < count; ++x) {
      first = least(first, b.panels[x].first_key);
      last = most(last, b.panels[x].last_key);
    }
    return {first, last - first};
  }
  static Keys seen_by(const Panel& panel, Keys keys) {
    const long count = least(keys.count, panel.last_key - keys.first);
    return {keys.first, keys.first + count > panel.first_key ? count : 0};
  }

  // k and v of a block of keys, as rows and as pairs of rows where those are needed.
  void read_keys(Blocks& b, long batch, long kv_head, Keys keys) const {
    const long even = round_up(keys.count, PER_WORD);
    rows_in<Words>(call.k, call.dtype, batch, keys.first, kv_head, keys.count, even, call.head_dim,
                   b.k_rows);
    rows_in<Words>(call.v, call.dtype, batch, keys.first, kv_head, keys.count, even,
                   call.v_head_dim, b.v_rows);
    if (is_backward) pair_rows<Words>(even, call.head_dim, b.k_rows, b.k_pairs);
    else pair_rows<Words>(even, call.v_head_dim, b.v_rows, b.v_pairs);
    if (drops()) dropout_words_of_keys(call, keys, b.k_words);
  }

  // ---- steps of both passes ----

  // [keys][queries] from rows of keys and columns of queries
  void multiply_rows(long keys, long words, long row, const float* rows, const float* columns,
                     float* logits) const {
    const long chunk = IN_PAIRS ? words : FLOAT_CHUNK;  // shorter sums of floats round less
    product<Words, SET>(keys, QUERIES, least(chunk, words), {rows, row, 1}, columns, QUERIES,
                        logits, QUERIES);
    for (long w = chunk; w < words; w += chunk)
      product<Words, ADD>(keys, QUERIES, least(chunk, words - w), {rows + w, row, 1},
                          columns + w * QUERIES, QUERIES, logits, QUERIES);
  }

  template <bool SLOPES> void compute_logits(Blocks& b, const Panel& panel, Keys keys) const {
    multiply_rows(keys.count, words, wide / PER_WORD, b.k_rows, panel.q_columns, b.logits);
    if (has_mods)
      modify_logits<SLOPES>(call, panel, keys, Words::UNIT, b.logits, b.slopes, b.bias_rows,
                            b.bias);
    hide_logits(call, panel, keys, b.logits);
    if (keys.count % 2 == 0) return;
    // Keys go by twos: the probability and the gradient of the one past the last are 0.
    for (long i = keys.count * QUERIES; i < (keys.count + 1) * QUERIES; ++i) {
      b.logits[i] = -INFINITY;
      b.slopes[i] = b.dprobabilities[i] = 0;
    }
  }

  // Probabilities of two keys for W queries, to where the next product reads them.
  INLINE void put_pairs(float* block, long j, long i, Floats first, Floats second) {
#if defined(__AVX512BF16__)
    if constexpr (IN_PAIRS) return store(block + j / 2 * QUERIES + i, Words::pairs(first, second));
#endif
    store(block + j * QUERIES + i, first);
    store(block + (j + 1) * QUERIES + i, second);
  }

  // Numbers of W queries and a key, 0 where dropout drops the pair
  Floats kept(Floats x, const uint64_t* of_queries, uint64_t of_key) const {
    return (Floats)((Ints)x & is_kept(of_queries, of_key, call.dropped_below));
  }

  // ---- forward ----

  // Of the softmax so far, the maximum and the sum; e^(logits - maximum) takes the logits' place.
  void compute_probabilities(Blocks& b, Panel& panel, Keys keys) const {
    for (long i = 0; i < QUERIES; i += W) {
      const float* logits = b.logits + i;
      Floats largest = load(logits);
      for (long j = 1; j < keys.count; ++j) largest = maximum(largest, load(logits + j * QUERIES));
      Floats before = load(panel.maximum + i), now = maximum(before, largest * unit);
      Floats shrink = Words::power(before - now);
      store(panel.maximum + i, now);
      store(panel.shrink + i, shrink);
      // Summed from 0: small terms that join a large sum one by one are lost.
      Floats even = {}, odd = {};
      for (long j = 0; j < keys.count; j += 2) {
        Floats first = Words::power(load(logits + j * QUERIES) * unit - now);
        Floats second = Words::power(load(logits + (j + 1) * QUERIES) * unit - now);
        even += first;
        odd += second;
        if (drops()) {
          first = kept(first, panel.words + i, b.k_words[j]);
          second = kept(second, panel.words + i, b.k_words[j + 1]);
        }
        put_pairs(b.probability_pairs, j, i, first, second);
      }
      store(panel.sum + i, load(panel.sum + i) * shrink + (even + odd));
    }
  }

  void forward(Blocks& b, long item) const {
    const long kv = item / batches;
    const long batch = kv / call.num_kv_heads, kv_head = kv % call.num_kv_heads;
    const long count = set_up_panels(b, batch, kv_head, item % batches);
    for (long x = 0; x < count; ++x)
      for (long i = 0; i < QUERIES; ++i) {
        b.panels[x].maximum[i] = -FLT_MAX;
        b.panels[x].sum[i] = 0;
      }
    const Keys all = keys_of_panels(b, count);
    for (long done = 0; done < all.count; done += KEYS) {
      const Keys keys = {all.first + done, least(KEYS, all.count - done)};
      read_keys(b, batch, kv_head, keys);
      for (long x = 0; x < count; ++x) {
        Panel& panel = b.panels[x];
        const Keys seen = seen_by(panel, keys);
        if (seen.count <= 0) continue;
        compute_logits<false>(b, panel, seen);
        compute_probabilities(b, panel, seen);
        product<Words, SCALE_AND_ADD>(call.v_head_dim, QUERIES, key_words(seen.count),
                                      {b.v_pairs, 1, v_wide}, b.probability_pairs, QUERIES,
                                      panel.sums, QUERIES, panel.shrink);
      }
    }
    for (long x = 0; x < count; ++x) finish_rows(b, b.panels[x]);
  }

  void finish_rows(Blocks& b, Panel& panel) const {
    float factors[QUERIES];
    const float kept_factor = drops() ? call.kept_factor : 1.;
    for (long i = 0; i < QUERIES; ++i) {
      const float largest = panel.maximum[i], sum = panel.sum[i];
      const bool is_empty = sum == 0;  // no key is seen, or the bias hides all that are
      factors[i] = is_empty ? 0.f : kept_factor / sum;
      float lse = is_empty ? -INFINITY : largest * (LN_2 * LOG2_E / Words::UNIT) + logf(sum);
      if (largest == INFINITY) lse = INFINITY;
      if (i < panel.rows) number(call.lse, panel.batch, panel.first + i, panel.head) = lse;
    }
    write_columns(b, panel, call.v_head_dim, factors, call.out);
  }

  // Rows of a tensor from the panel's sums times a factor per query
  void write_columns(Blocks& b, Panel& panel, long channels, const float* factors,
                     const Tensor& t) const {
    const long wide = round_up(channels, 16);
    for (long at = 0; at < channels * QUERIES; at += W)
      store(panel.sums + at, load(panel.sums + at) * load(factors + at % QUERIES));
    transpose(wide, QUERIES, panel.sums, QUERIES, b.rows, wide);
    for (long i = 0; i < panel.rows; ++i)
      row_out(call.dtype, b.rows + i * wide, channels,
              address(t, call.dtype, panel.batch, panel.first + i, panel.head), t.channel);
  }

  // ---- backward ----

  // probabilities and dscores of a block from logits and dprobabilities
  void compute_dscores(Blocks& b, const Panel& panel, Keys keys) const {
    const float kept_factor = call.kept_factor;
    for (long j = 0; j < keys.count; j += 2)
      for (long i = 0; i < QUERIES; i += 2 * W) {
        Floats kept_probabilities[2][2], dscores[2][2];  // [key][vector]
#pragma GCC unroll 2
        for (long y = 0; y < 2; ++y)
#pragma GCC unroll 2
          for (long x = 0; x < 2; ++x) {
            const long column = i + x * W, at = (j + y) * QUERIES + column;
            const Floats lse = load(panel.lse + column), delta = load(panel.delta + column);
            Floats probabilities = Words::power(load(b.logits + at) * unit - lse);
            Floats dprobabilities = load(b.dprobabilities + at);
            kept_probabilities[y][x] = probabilities;
            if (drops()) {
              Floats factors = kept(splat(kept_factor), panel.words + column, b.k_words[j + y]);
              dprobabilities *= factors;
              kept_probabilities[y][x] *= factors;
            }
            dscores[y][x] = probabilities * (dprobabilities - delta);
            if (call.dbias.data) store(b.bias + at, dscores[y][x]);
            if (call.softcap > 0) dscores[y][x] *= load(b.slopes + at);
          }
        put_block(b.probability_rows, nullptr, j, i, kept_probabilities);
        put_block(b.dscore_rows, b.dscore_pairs, j, i, dscores);
      }
  }

  // Two keys of 2 W queries, as rows of keys and, where words are pairs, as pairs of keys.
  INLINE void put_block(float* rows, float* pairs, long j, long i, Floats (*values)[2]) {
    for (long y = 0; y < 2; ++y) {
#if defined(__AVX512BF16__)
      if constexpr (IN_PAIRS) {
        store(rows + ((j + y) * QUERIES + i) / 2, Words::row(values[y][0], values[y][1]));
        if (pairs) put_pairs(pairs, j, i + y * W, values[0][y], values[1][y]);
        continue;
      }
#endif
      store(rows + (j + y) * QUERIES + i, values[y][0]);
      store(rows + (j + y) * QUERIES + i + W, values[y][1]);
    }
  }

  void write_dbias(Blocks& b, const Panel& panel, Keys keys) const {
    transpose(KEYS, QUERIES, b.bias, QUERIES, b.bias_rows, KEYS);
    for (long i = 0; i < panel.rows; ++i)
      row_out(FLOAT32, b.bias_rows + i * KEYS, keys.count,
              address(call.dbias, FLOAT32, panel.batch, panel.first + i, panel.head) +
              keys.first * call.dbias.channel * 4, call.dbias.channel);
  }

  void set_up_gradients(Blocks& b, Panel& panel) const {
    read_rows(call.dout, panel, call.v_head_dim, b.rows);
    pair_rows<Words>(QUERIES, call.v_head_dim, b.rows, panel.dout_pairs);
    transpose_rows(call.v_head_dim, b.rows, panel.dout_columns);
    const long channels = padded<FloatWords>(call.v_head_dim);
    float *out = b.rows, *dout = b.k_rows;
    for (auto side : {&call.out, &call.dout})
      rows_in<FloatWords>(*side, call.dtype, panel.batch, panel.first, panel.head, panel.rows,
                          QUERIES, call.v_head_dim, side == &call.out ? out : dout);
    for (long i = 0; i < QUERIES; ++i) {
      panel.lse[i] = INFINITY;  // e^(logits - inf) is the 0 of a row that sees nothing
      panel.delta[i] = 0;
      if (i >= panel.rows) continue;
      const float lse = number(call.lse, panel.batch, panel.first + i, panel.head);
      if (lse != -INFINITY) panel.lse[i] = lse * Words::UNIT;
      Floats delta = {};
      for (long c = 0; c < channels; c += W)
        delta += load(out + i * channels + c) * load(dout + i * channels + c);
      panel.delta[i] = sum(delta);
      if (call.dlse.data)
        panel.delta[i] -= number(call.dlse, panel.batch, panel.first + i, panel.head);
    }
  }

  void backward(Blocks& b, long item, float* dk, float* dv) const {
    const long kv = item / shares;
    const long batch = kv / call.num_kv_heads, kv_head = kv % call.num_kv_heads;
    memset(dk, 0, call.nk * wide * 4);
    memset(dv, 0, call.nk * v_wide * 4);
    for (long number = item % shares; number < batches; number += shares) {
      const long count = set_up_panels(b, batch, kv_head, number);
      for (long x = 0; x < count; ++x) set_up_gradients(b, b.panels[x]);
      const Keys all = keys_of_panels(b, count);
      for (long done = 0; done < all.count; done += KEYS) {
        const Keys keys = {all.first + done, least(KEYS, all.count - done)};
        read_keys(b, batch, kv_head, keys);
        for (long x = 0; x < count; ++x) {
          const Panel& panel = b.panels[x];
          const Keys seen = seen_by(panel, keys);
          if (seen.count > 0)
            backward_of_block(b, panel, seen, dk + seen.first * wide, dv + seen.first * v_wide);
        }
      }
      float factors[QUERIES];
      for (float& factor : factors) factor = call.softmax_scale;
      for (long x = 0; x < count; ++x)
        write_columns(b, b.panels[x], call.head_dim, factors, call.dq);
    }
  }

  void backward_of_block(Blocks& b, const Panel& panel, Keys keys, float* dk, float* dv) const {
    const long queries = QUERIES / PER_WORD;  // in words
    compute_logits<true>(b, panel, keys);
    multiply_rows(keys.count, v_words, v_wide / PER_WORD, b.v_rows, panel.dout_columns,
                  b.dprobabilities);
    compute_dscores(b, panel, keys);
    if (call.dbias.data) write_dbias(b, panel, keys);
    product<Words, ADD>(keys.count, round_up(call.v_head_dim, W), queries,
                        {b.probability_rows, queries, 1}, panel.dout_pairs, v_wide, dv, v_wide);
    product<Words, ADD>(call.head_dim, QUERIES, key_words(keys.count), {b.k_pairs, 1, wide},
                        b.dscore_pairs, QUERIES, panel.sums, QUERIES);
    product<Words, ADD>(keys.count, round_up(call.head_dim, W), queries,
                        {b.dscore_rows, queries, 1}, panel.q_pairs, wide, dk, wide);
  }

  // Rows of dk and dv of a KV head from the sums of its shares, which lie `apart` floats apart.
  void finish_keys(long kv, float* dk, float* dv, size_t apart) const {
    const long batch = kv / call.num_kv_heads, kv_head = kv % call.num_kv_heads;
    for (long j = 0; j < call.nk; ++j) {
      float *dk_row = dk + j * wide, *dv_row = dv + j * v_wide;
      for (long share = 1; share < shares; ++share) {
        for (long c = 0; c < wide; ++c) dk_row[c] += dk_row[c + share * apart];
        for (long c = 0; c < v_wide; ++c) dv_row[c] += dv_row[c + share * apart];
      }
      for (long c = 0; c < wide; ++c) dk_row[c] *= (float)call.softmax_scale;
      row_out(call.dtype, dk_row, call.head_dim, address(call.dk, call.dtype, batch, j, kv_head),
              call.dk.channel);
      row_out(call.dtype, dv_row, call.v_head_dim, address(call.dv, call.dtype, batch, j, kv_head),
              call.dv.channel);
    }
  }

  // ---- threads ----

  // false: there is not enough memory.
  bool run(long threads) {
    // Starting a thread takes as long as some ten million operations.
    const double work = 4. * call.batch * call.num_heads * call.nq * call.nk *
                        (call.head_dim + call.v_head_dim);
    threads = most(1, least(threads, 1 + (long)(work / 3e7)));
    Memory sums;
    if (is_backward) {
      long divisor = threads;  // the greatest that threads and heads have in common
      while (kv_heads % divisor || threads % divisor) --divisor;
      shares = least(threads / divisor, batches);
      if (shares > 1 && !sums.reserve(items() * sums_size(), 1, call.poisoned)) return false;
    }
    std::atomic<bool> failed(false);
    each(items(), threads, failed, [&](Blocks& b, long item) {
      if (!is_backward) return forward(b, item);
      float* dk = shares > 1 ? (float*)sums.base + item * sums_size() : b.dk;
      float* dv = shares > 1 ? dk + call.nk * wide : b.dv;
      backward(b, item, dk, dv);
      if (shares == 1) finish_keys(item, dk, dv, 0);
    });
    if (shares > 1 && !failed)
      each(kv_heads, threads, failed, [&](Blocks&, long kv) {
        float* dk = (float*)sums.base + kv * shares * sums_size();
        finish_keys(kv, dk, dk + call.nk * wide, sums_size());
      });
    return !failed;
  }

  // Every item once, by threads that take the next one when they are done with one.
  template <class Do>
  void each(long items, long threads, std::atomic<bool>& failed, Do compute) const {
    std::atomic<long> next(0);
    auto work = [&] {
      Blocks* b = new (std::nothrow) Blocks;
      if (!b || !reserve(*b)) failed = true;
      else
        for (long item; !failed && (item = next++) < items;) compute(*b, item);
      delete b;
    };
    std::vector<std::thread> others;
    try {
      while ((long)others.size() + 1 < least(threads, items)) others.emplace_back(work);
    } catch (...) {  // no more threads or memory to be had: those that run do all
    }
    work();
    for (std::thread& other : others) other.join();
  }
};

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

// 0: done; 1: out of memory.
PUBLIC int nnscaler_ring_attention(const Call* call, int is_backward, int threads) {
#if defined(__AVX512BF16__)
  if (call->dtype == BFLOAT16) return !Kernel<Bfloat16Words>(*call, is_backward).run(threads);
#endif
  return !Kernel<FloatWords>(*call, is_backward).run(threads);
}

// The hash of the sources that this was compiled from.
PUBLIC const char* nnscaler_ring_sources() { return SOURCES; }

// The best of the instruction sets in build.py that this processor and system can run.
PUBLIC const char* nnscaler_ring_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define HAS __builtin_cpu_supports
  if (HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2")) {
    if (HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl"))
      return HAS("avx512bf16") ? "avx512_bf16" : "avx512";
    return "avx2";
  }
#endif
  return "baseline";
}
