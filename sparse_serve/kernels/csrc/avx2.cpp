// AVX2, FMA and F16C: a register holds 8 of the 16 lanes, and a permute within 128 bits picks one of 4 inputs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <memory>

#include "layout.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "linear.h"

namespace sparse24 {
namespace {

struct Avx2 {
  using Lanes = __m256i;
  using Table = __m256i;
  struct Codes { __m256i now, then; };  // of the next group and of the one after it
  static constexpr int kRows = 8, kTable = 16, kTokens = 8;
  static constexpr bool kDotBf16 = false, kManyColumns = true;

  static INLINE Lanes load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static INLINE void store(void* to, Lanes lanes) { _mm256_storeu_si256(static_cast<__m256i*>(to), lanes); }
  static INLINE Codes codes(const uint8_t* from) {
    const __m256i nibbles = load(from);
    return {columns(nibbles), columns(_mm256_srli_epi32(nibbles, 4))};
  }
  // Of the lower nibble of each byte the two columns that it numbers: the left one in the lowest two bits, then the
  // right one.
  static INLINE __m256i columns(__m256i nibbles) {
    const __m256i known = _mm256_broadcastsi128_si256(_mm_setr_epi8(4, 8, 12, 9, 13, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    return _mm256_shuffle_epi8(known, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
  }
  static INLINE Codes next(Codes codes) { return {codes.then, _mm256_srli_epi32(codes.now, 8)}; }
  static INLINE Table table(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  template <int kHalf>
  static INLINE Lanes pick(Table table, Codes codes) {
    const __m256i index = kHalf ? _mm256_srli_epi32(codes.now, 2) : codes.now;  // of which two bits are looked at
    return _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(table), index));
  }
  static INLINE Lanes low_bf16(Lanes both) { return _mm256_slli_epi32(both, 16); }
  static INLINE Lanes high_bf16(Lanes both) { return _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))); }
  static INLINE Lanes low_f16(Lanes both) { return from_f16(_mm256_and_si256(both, _mm256_set1_epi32(0xffff))); }
  static INLINE Lanes high_f16(Lanes both) { return from_f16(_mm256_srli_epi32(both, 16)); }
  static INLINE Lanes from_f16(__m256i halves) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    return _mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(packed)));
  }
  static INLINE Lanes to_float(Lanes ints) { return _mm256_castps_si256(_mm256_cvtepi32_ps(ints)); }
  static INLINE Lanes low_int16(Lanes both) { return to_float(_mm256_srai_epi32(_mm256_slli_epi32(both, 16), 16)); }
  static INLINE Lanes high_int16(Lanes both) { return to_float(_mm256_srai_epi32(both, 16)); }
  static INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    return _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(sum)));
  }
  // The same; of many sums in registers, what GCC 12 makes of the other one keeps some in memory.
  static INLINE Lanes multiply_add_in_place(Lanes a, Lanes b, Lanes sum) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
  }
  // The same, with `a` in memory.
  static INLINE Lanes multiply_add_from(const uint8_t* a, Lanes b, Lanes sum) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(b), "m"(*reinterpret_cast<const __m256i_u*>(a)));
    return sum;
  }
  static INLINE Lanes widen(const uint8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static INLINE Lanes zero() { return _mm256_setzero_si256(); }
  static INLINE Lanes next_nibbles(Lanes words) { return _mm256_srli_epi16(words, 4); }
  static INLINE Lanes nibbles_to_int16(Lanes words) { return _mm256_srai_epi16(_mm256_slli_epi16(words, 12), 12); }
  static INLINE Lanes broadcast(float value) { return _mm256_castps_si256(_mm256_set1_ps(value)); }
  // 8 by 8 numbers, the other way round; rows are so many numbers apart.
  static INLINE void transpose(const float* from, int64_t apart, float* to, int64_t to_apart) {
    __m256 rows[8], pairs[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(from + i * apart);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]), pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        rows[i + 2 * odd] = _mm256_shuffle_ps(pairs[i + odd], pairs[i + 2 + odd], 0x44);
        rows[i + 2 * odd + 1] = _mm256_shuffle_ps(pairs[i + odd], pairs[i + 2 + odd], 0xee);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_apart, _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * to_apart, _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31));
    }
  }
  // sums: 16 rows of `stride` tokens. The first 16 tokens' rows.
  static INLINE void by_token(const float* sums, int stride, float* to) {
    for (int row = 0; row < kLanes; row += kRows) {
      for (int m = 0; m < kLanes; m += kRows) transpose(sums + row * stride + m, stride, to + m * kLanes + row, kLanes);
    }
  }
  static INLINE void spread(const float* x, uint8_t* to) { __builtin_memcpy(to, x, 16); }
};

}  // namespace

void avx2::run(const Linear& op, int64_t first, int64_t last) { run_any<Avx2>(op, first, last); }

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
