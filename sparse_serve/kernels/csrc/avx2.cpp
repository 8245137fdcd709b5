// AVX2, FMA and F16C: the 16 lanes are two registers of 8 rows, and a permute indexes 8 table entries.
#if defined(__x86_64__)
#include <immintrin.h>

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
  struct Lanes { __m256i a, b; };
  struct Table { __m256i half[2]; };
  using Codes = Lanes;
  static constexpr int kTokens = 4;
  static constexpr bool kDotBf16 = false;

  static INLINE __m256i load8(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static INLINE Lanes load(const void* from) { return {load8(from), load8(static_cast<const uint8_t*>(from) + 32)}; }
  static INLINE void store(void* to, Lanes lanes) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), lanes.a);
    _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, lanes.b);
  }
  static INLINE Codes codes(const uint8_t* from) { return load(from); }
  static INLINE Codes next(Codes codes) { return {_mm256_srli_epi32(codes.a, 4), _mm256_srli_epi32(codes.b, 4)}; }
  static INLINE Table table(const uint8_t* from) { return {{load8(from), load8(from + 32)}}; }
  template <int kHalf>
  static INLINE Lanes pick(const Table& table, Codes codes) {
    return {_mm256_permutevar8x32_epi32(table.half[kHalf], codes.a),
            _mm256_permutevar8x32_epi32(table.half[kHalf], codes.b)};
  }
  static INLINE Lanes low_bf16(Lanes both) { return {_mm256_slli_epi32(both.a, 16), _mm256_slli_epi32(both.b, 16)}; }
  static INLINE Lanes high_bf16(Lanes both) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm256_and_si256(both.a, high), _mm256_and_si256(both.b, high)};
  }
  static INLINE Lanes low_f16(Lanes both) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    return from_f16(_mm256_packus_epi32(_mm256_and_si256(both.a, low), _mm256_and_si256(both.b, low)));
  }
  static INLINE Lanes high_f16(Lanes both) {
    return from_f16(_mm256_packus_epi32(_mm256_srli_epi32(both.a, 16), _mm256_srli_epi32(both.b, 16)));
  }
  static INLINE Lanes from_f16(__m256i packed) {  // 4 of each register in turn
    const __m256i halves = _mm256_permute4x64_epi64(packed, 0xd8);
    return {_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(halves))),
            _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)))};
  }
  static INLINE __m256i to_float(__m256i ints) { return _mm256_castps_si256(_mm256_cvtepi32_ps(ints)); }
  static INLINE Lanes low_int16(Lanes both) {
    return {to_float(_mm256_srai_epi32(_mm256_slli_epi32(both.a, 16), 16)),
            to_float(_mm256_srai_epi32(_mm256_slli_epi32(both.b, 16), 16))};
  }
  static INLINE Lanes high_int16(Lanes both) {
    return {to_float(_mm256_srai_epi32(both.a, 16)), to_float(_mm256_srai_epi32(both.b, 16))};
  }
  static INLINE __m256i multiply_add8(__m256i a, __m256i b, __m256i sum) {
    return _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(sum)));
  }
  static INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    return {multiply_add8(a.a, b.a, sum.a), multiply_add8(a.b, b.b, sum.b)};
  }
  static INLINE Lanes widen(const uint8_t* from) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)))};
  }
  static INLINE Lanes zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static INLINE Lanes next_nibbles(Lanes words) { return {_mm256_srli_epi16(words.a, 4), _mm256_srli_epi16(words.b, 4)}; }
  static INLINE Lanes nibbles_to_int16(Lanes words) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(words.a, 12), 12), _mm256_srai_epi16(_mm256_slli_epi16(words.b, 12), 12)};
  }
  static INLINE void spread(const float* x, uint8_t* to) {
    const __m256 group = _mm256_castps128_ps256(_mm_loadu_ps(x));
    float* out = reinterpret_cast<float*>(to);
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(group, _mm256_setr_epi32(0, 0, 0, 1, 1, 2, 0, 0)));
    _mm256_storeu_ps(out + 8, _mm256_permutevar8x32_ps(group, _mm256_setr_epi32(1, 2, 3, 2, 3, 3, 0, 0)));
  }
};

}  // namespace

void avx2::run(const Linear& op, int64_t first, int64_t last) { run_any<Avx2>(op, first, last); }

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
