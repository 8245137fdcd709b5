// AVX-512 (F, DQ, BW, VL, BF16): one 512-bit register holds the 16 lanes, and a permute indexes 16 table entries.
// The second half of a table, another token's or the right inputs, is reached by codes + 8.
#if defined(__x86_64__)
#include <immintrin.h>

#include <memory>

#include "layout.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif
#include "linear.h"

namespace sparse24 {
namespace {

struct Avx512 {
  using Lanes = __m512i;
  using Table = __m512i;
  using Codes = __m512i;
  static constexpr int kRows = kLanes, kTable = 64, kTokens = 16;
  static constexpr bool kDotBf16 = true, kManyColumns = false;

  static INLINE Lanes load(const void* from) { return _mm512_loadu_si512(from); }
  static INLINE void store(void* to, Lanes lanes) { _mm512_storeu_si512(to, lanes); }
  static INLINE Codes codes(const uint8_t* from) { return load(from); }
  static INLINE Codes next(Codes codes) { return _mm512_srli_epi32(codes, 4); }
  static INLINE Table table(const uint8_t* from) { return load(from); }
  static INLINE Table half_table(const uint8_t* from) {
    return _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  template <int kHalf>
  static INLINE Lanes pick(Table table, Codes codes) {
    return _mm512_permutexvar_epi32(kHalf ? _mm512_or_si512(codes, _mm512_set1_epi32(8)) : codes, table);
  }
  static INLINE Lanes low_bf16(Lanes both) { return _mm512_slli_epi32(both, 16); }
  static INLINE Lanes high_bf16(Lanes both) { return _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))); }
  static INLINE Lanes low_f16(Lanes both) { return _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(both))); }
  static INLINE Lanes high_f16(Lanes both) { return low_f16(_mm512_srli_epi32(both, 16)); }
  static INLINE Lanes low_int16(Lanes both) { return to_float(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16)); }
  static INLINE Lanes high_int16(Lanes both) { return to_float(_mm512_srai_epi32(both, 16)); }
  static INLINE Lanes to_float(Lanes ints) { return _mm512_castps_si512(_mm512_cvtepi32_ps(ints)); }
  static INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(sum)));
  }
  static INLINE Lanes multiply_add_in_place(Lanes a, Lanes b, Lanes sum) { return multiply_add(a, b, sum); }
  static INLINE Lanes dot_bf16(Lanes a, Lanes b, Lanes sum) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
  }
  // The same; with many sums in registers, what GCC 12 makes of the other one copies each of them twice.
  static INLINE Lanes dot_bf16_in_place(Lanes a, Lanes b, Lanes sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  static INLINE Lanes widen(const uint8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static INLINE Lanes widen_to_bf16(const uint8_t* from) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
  }
  static INLINE Lanes zero() { return _mm512_setzero_si512(); }
  static INLINE Lanes next_nibbles(Lanes words) { return _mm512_srli_epi16(words, 4); }
  static INLINE Lanes nibbles_to_int16(Lanes words) { return _mm512_srai_epi16(_mm512_slli_epi16(words, 12), 12); }
  // The lowest code of each 16 bits. The permute looks at 5 bits, of which the last is the next code's: both halves of the
  // table are the same.
  static INLINE Lanes nibbles_to_bf16(Lanes words) {
    alignas(64) static constexpr uint16_t kNumbers[32] = {
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  // 0 to 7
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // -8 to -1
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    return _mm512_permutexvar_epi16(words, load(kNumbers));
  }
  static INLINE Lanes broadcast(const uint8_t* from) {
    int both;
    __builtin_memcpy(&both, from, 4);
    return _mm512_set1_epi32(both);
  }
  // x: 16 tokens of 32 columns. Of each 4 columns the pairs 01 02 03 12 13 23, each of 16 tokens.
  static INLINE void spread_tokens(const uint16_t* x, int64_t stride, uint8_t* to, int group, int pair) {
    __m512i low[8], high[8];  // in the end, [group]: 4 columns of tokens 0 to 7, and of 8 to 15
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) low[m] = load(x + m * stride), high[m] = load(x + (8 + m) * stride);
    transpose(low), transpose(high);
    const __m512i words = _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i both = _mm512_or_si512(words, _mm512_slli_epi32(words, 16));
    const int columns[] = {1 << 16, 2 << 16, 3 << 16, 1 | 2 << 16, 1 | 3 << 16, 2 | 3 << 16};
#pragma GCC unroll 6
    for (int p = 0; p < 6; ++p) {
      const __m512i index = _mm512_add_epi32(both, _mm512_set1_epi32(columns[p]));
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) store(to + g * group + p * pair, _mm512_permutex2var_epi16(low[g], index, high[g]));
    }
  }
  // sums: 16 rows of `stride` tokens. The first 16 tokens' rows.
  static INLINE void by_token(const float* sums, int stride, float* to) {
    __m512i near[8], far[8];  // in the end, [token]: tokens 0 1 4 5 8 9 12 13, and 2 3 6 7 10 11 14 15
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i even = load(sums + 2 * i * stride), odd = load(sums + (2 * i + 1) * stride);
      near[i] = _mm512_unpacklo_epi32(even, odd), far[i] = _mm512_unpackhi_epi32(even, odd);
    }
    transpose(near), transpose(far);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int token = i / 2 * 4 + i % 2;
      store(to + token * kLanes, near[i]), store(to + (token + 2) * kLanes, far[i]);
    }
  }
  // 8 by 8 quadwords, the other way round.
  static INLINE void transpose(__m512i* rows) {
    __m512i pairs[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]), pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i *p = pairs + odd;
      const __m512i a = _mm512_shuffle_i64x2(p[0], p[2], 0x88), b = _mm512_shuffle_i64x2(p[4], p[6], 0x88);
      const __m512i c = _mm512_shuffle_i64x2(p[0], p[2], 0xdd), d = _mm512_shuffle_i64x2(p[4], p[6], 0xdd);
      rows[odd] = _mm512_shuffle_i64x2(a, b, 0x88), rows[odd + 4] = _mm512_shuffle_i64x2(a, b, 0xdd);
      rows[odd + 2] = _mm512_shuffle_i64x2(c, d, 0x88), rows[odd + 6] = _mm512_shuffle_i64x2(c, d, 0xdd);
    }
  }
  static INLINE void spread(const float* x, uint8_t* to) {
    const __m512i pairs = _mm512_setr_epi32(0, 0, 0, 1, 1, 2, 0, 0, 1, 2, 3, 2, 3, 3, 0, 0);
    const __m512 group = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(pairs, group));
  }
  static INLINE void spread_pairs(const uint16_t* x, uint8_t* to) {
    const __m256i pairs = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 6, 7, 2, 3, 4, 5,  //
                                           2, 3, 6, 7, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0);
    long long group;
    __builtin_memcpy(&group, x, 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shuffle_epi8(_mm256_set1_epi64x(group), pairs));
  }
};

}  // namespace

void avx512::run(const Linear& op, int64_t first, int64_t last) { run_any<Avx512>(op, first, last); }

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
