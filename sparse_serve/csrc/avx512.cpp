// AVX-512 (F, DQ, BW, VL, BF16): one 512-bit register holds the 16 lanes, and a permute indexes 16 table entries.
// The second half of a table, another token's or the right inputs, is reached by codes + 8.
#if defined(__x86_64__)
#include <immintrin.h>

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
  static constexpr int kTokens = 16;
  static constexpr bool kDotBf16 = true;

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
  static INLINE Lanes low_int16(Lanes both) { return to_float(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16)); }
  static INLINE Lanes high_int16(Lanes both) { return to_float(_mm512_srai_epi32(both, 16)); }
  static INLINE Lanes to_float(Lanes ints) { return _mm512_castps_si512(_mm512_cvtepi32_ps(ints)); }
  static INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(sum)));
  }
  static INLINE Lanes dot_bf16(Lanes a, Lanes b, Lanes sum) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
  }
  static INLINE Lanes widen(const uint8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static INLINE Lanes widen_to_bf16(const uint8_t* from) {  // 7 bits and a sign: the low half of the float32 is zero
    const Lanes both = widen(from);
    return _mm512_or_si512(_mm512_srli_epi32(low_int16(both), 16), high_int16(both));
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
