// Rounded activations (rounded.h) by AVX2, whose products of bytes are summed by two in 16 bits, where they must fit.
//
//     int4 values      of each 16 columns and 8 rows:   per token 2 byte shuffles, 2 products of 32 bytes, 2 sums
//     int8 values      of each 8 columns and 8 rows:    per token 1 shuffle, 1 product, 1 sum, and 2 to make them fit
//
// The inputs of some groups lie in every half of a register, and a control says which of them a row keeps.
//
// A product is of unsigned bytes and signed ones. int4 values are small, so inputs have 128 added, `offset` is what
// that adds to a row's sum, and four steps are summed in 16 bits: 16 * 255 * 8 = 32640. Two products of int8 values would
// not fit so; there the unsigned bytes are the magnitudes of the values, and inputs take their signs: 2 * 128 * 127 =
// 32512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "layout.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "rounded.h"

namespace sparse24 {
namespace {

constexpr int kRows = 8, kHalves = kLanes / kRows;

INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE void store(void* to, __m256i lanes) { _mm256_storeu_si256(static_cast<__m256i*>(to), lanes); }
INLINE __m256i twice(__m128i half) { return _mm256_broadcastsi128_si256(half); }
INLINE __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
INLINE __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi32(bytes, 4)); }
INLINE __m256i low_words(__m256i low, __m256i high) { return _mm256_blend_epi16(low, high, 0xaa); }  // and high words
// By code: the left column, and from 8 on the right one.
INLINE __m256i columns(__m256i codes) {
  return _mm256_shuffle_epi8(twice(_mm_setr_epi8(0, 0, 0, 1, 1, 2, 0, 0, 1, 2, 3, 2, 3, 3, 0, 0)), codes);
}
INLINE __m256i numbers(__m256i nibbles) {
  return _mm256_shuffle_epi8(twice(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)), nibbles);
}
// a + b, of 16 or of 32 bits; of many sums, what GCC 12 makes of the intrinsics keeps some in memory.
INLINE __m256i add_words(__m256i a, __m256i b) {
  asm("vpaddw %1, %0, %0" : "+x"(a) : "x"(b));
  return a;
}
INLINE __m256i add_whole(__m256i a, __m256i b) {
  asm("vpaddd %1, %0, %0" : "+x"(a) : "x"(b));
  return a;
}
// Pairs of 16-bit sums, added.
INLINE __m256i pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

template <Values kValues>
struct Steps;

// A step is 16 columns. A row's four bytes are of the even groups, the left inputs and then the right ones, or of the odd
// ones.
template <>
struct Steps<Values::kInt4> {
  static constexpr int kColumnsEach = 16, kFit = 4;  // steps whose sums fit into 16 bits
  struct Step { __m256i even, odd, even_control, odd_control; };

  // The two steps of a quarter of a block.
  template <class Do>
  static INLINE void quarter(const uint8_t* block, int quarter, int half, Do run) {
    const __m256i codes = load(block + quarter * 64 + half * 32), right = _mm256_set1_epi8(8);
    const __m256i even = low_nibbles(codes), odd = high_nibbles(codes);
    const __m256i even_left = place<0>(columns(even)), even_right = place<0>(columns(_mm256_or_si256(even, right)));
    const __m256i odd_left = place<4>(columns(odd)), odd_right = place<4>(columns(_mm256_or_si256(odd, right)));
    const uint8_t* values = block + kCodeBytes + quarter * 128 + half * 32;
    const __m256i first = load(values), second = load(values + 64);
    run(2 * quarter, Step{numbers(low_nibbles(first)), numbers(high_nibbles(first)),
                          low_words(even_left, _mm256_slli_epi32(even_right, 16)),
                          low_words(odd_left, _mm256_slli_epi32(odd_right, 16))});
    run(2 * quarter + 1, Step{numbers(low_nibbles(second)), numbers(high_nibbles(second)),
                              low_words(_mm256_srli_epi32(even_left, 16), even_right),
                              low_words(_mm256_srli_epi32(odd_left, 16), odd_right)});
  }
  // Of every other group: the second begins 8 columns after the first.
  template <int kFirst>
  static INLINE __m256i place(__m256i columns) {
    return _mm256_add_epi8(columns, _mm256_set1_epi16(static_cast<int16_t>(kFirst | (kFirst + 8) << 8)));
  }

  static INLINE __m256i inputs(const uint8_t* codes) {
    return twice(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
  static INLINE __m256i product(__m256i inputs, const Step& step) {
    return _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_shuffle_epi8(inputs, step.even_control), step.even),
                            _mm256_maddubs_epi16(_mm256_shuffle_epi8(inputs, step.odd_control), step.odd));
  }
  // The sum of 8 steps' values fits into a byte, from -128 to 112.
  static INLINE __m256i bytes(const Step& step) { return _mm256_add_epi8(step.even, step.odd); }
  static INLINE void store_rows(int32_t* to, __m256i sums, int half) { store(to + half * kRows, sums); }
};

// A step is 8 columns. A row's four bytes are left, right, left, right. What lies in pairs of bytes comes in order only
// within 128 bits, so a half are the rows 0 to 3 and 8 to 11, or the others.
template <>
struct Steps<Values::kInt8> {
  static constexpr int kColumnsEach = 8, kFit = 1;
  struct Step { __m256i sizes, signs, control; };

  template <class Do>
  static INLINE void quarter(const uint8_t* block, int quarter, int half, Do run) {
    const __m256i near = load(block + quarter * 64), far = load(block + quarter * 64 + 32);
    const __m256i codes = half ? _mm256_permute2x128_si256(near, far, 0x31) : _mm256_permute2x128_si256(near, far, 0x20);
    const uint8_t* values = block + kCodeBytes + quarter * 256;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, values += 64) {
      const __m256i first = load(values), second = load(values + 32);
      const __m256i kept = half ? _mm256_unpackhi_epi16(first, second) : _mm256_unpacklo_epi16(first, second);
      run(4 * quarter + i, Step{_mm256_abs_epi8(kept), kept, control(codes, i)});
    }
  }
  static INLINE __m256i control(__m256i codes, int step) {
    const __m256i rows = twice(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    const __m256i both = _mm256_shuffle_epi8(codes, _mm256_add_epi8(rows, _mm256_set1_epi8(static_cast<char>(step))));
    const __m256i of_each = low_words(both, _mm256_srli_epi32(both, 4));
    const __m256i kept = _mm256_or_si256(_mm256_and_si256(of_each, _mm256_set1_epi8(7)), _mm256_set1_epi16(0x0800));
    return _mm256_add_epi8(columns(kept), _mm256_set1_epi32(0x04040000));
  }

  static INLINE __m256i inputs(const uint8_t* codes) {
    int64_t eight;
    __builtin_memcpy(&eight, codes, 8);
    return _mm256_set1_epi64x(eight);
  }
  static INLINE __m256i product(__m256i inputs, const Step& step) {
    return _mm256_maddubs_epi16(step.sizes, _mm256_sign_epi8(_mm256_shuffle_epi8(inputs, step.control), step.signs));
  }
  static INLINE void store_rows(int32_t* to, __m256i sums, int half) {
    __m128i* out = reinterpret_cast<__m128i*>(to + half * 4);
    _mm_storeu_si128(out, _mm256_castsi256_si128(sums)), _mm_storeu_si128(out + 2, _mm256_extracti128_si256(sums, 1));
  }
};

template <Values kValues>
struct Avx2Bytes {
  using Of = Steps<kValues>;
  using Step = typename Of::Step;
  static constexpr bool kScaled = kValues == Values::kInt4;
  static constexpr int kMost = 8, kSteps = kColumns / Of::kColumnsEach;

  struct Ready {
    Step steps[kHalves][kSteps];
    alignas(32) int32_t offset[kLanes];  // what 128 more in every input adds to a row's sum
    alignas(32) float scales[kLanes];    // int4 only
  };

  static __attribute__((noinline)) void make_ready(const uint8_t* block, Ready& out) {
    for (int half = 0; half < kHalves; ++half) {
      __m256i bytes = _mm256_setzero_si256();
      for (int quarter = 0; quarter < 4; ++quarter) {
        Of::quarter(block, quarter, half, [&](int at, const Step& step) __attribute__((always_inline)) {
          out.steps[half][at] = step;
          if constexpr (kScaled) bytes = _mm256_add_epi8(bytes, Of::bytes(step));
        });
      }
      if constexpr (kScaled) store(out.offset + half * kRows, offset_of(bytes));
    }
    if constexpr (kScaled) __builtin_memcpy(out.scales, block + block_bytes(kValues) - kScaleBytes, kScaleBytes);
  }

  // Straight from the block.
  template <int kCount>
  static __attribute__((noinline)) void multiply_few(const uint8_t* block, const uint8_t* codes, const float* scale,
                                                     Sums sums) {
    alignas(32) int32_t whole[kCount][kLanes];
    for (int half = 0; half < kHalves; ++half) {
      __m256i acc[kCount], fit[kCount], bytes = _mm256_setzero_si256();
#pragma GCC unroll 3
      for (int m = 0; m < kCount; ++m) acc[m] = fit[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        Of::quarter(block, quarter, half, [&](int at, const Step& step) __attribute__((always_inline)) {
#pragma GCC unroll 3
          for (int m = 0; m < kCount; ++m) {
            const __m256i product = Of::product(Of::inputs(codes + m * kColumns + at * Of::kColumnsEach), step);
            if constexpr (kScaled) fit[m] = _mm256_add_epi16(fit[m], product);
            else acc[m] = _mm256_add_epi32(acc[m], pairs(product));
          }
          if constexpr (kScaled) bytes = _mm256_add_epi8(bytes, Of::bytes(step));
        });
        if constexpr (kScaled) {
          static_assert(kSteps / 4 * 2 == Of::kFit || !kScaled);
          if (quarter % 2 == 0) continue;
#pragma GCC unroll 3
          for (int m = 0; m < kCount; ++m) {
            acc[m] = _mm256_add_epi32(acc[m], pairs(fit[m])), fit[m] = _mm256_setzero_si256();
          }
        }
      }
      const __m256i offset = offset_of(bytes);
#pragma GCC unroll 3
      for (int m = 0; m < kCount; ++m) Of::store_rows(whole[m], _mm256_sub_epi32(acc[m], offset), half);
    }
    const float* scales = reinterpret_cast<const float*>(block + block_bytes(kValues) - kScaleBytes);
    for (int m = 0; m < kCount; ++m, sums = sums.after(1)) write_sums(whole[m], scales, scale[m], sums);
  }

  template <int kCount>
  static __attribute__((noinline)) void multiply(const Ready& ready, const uint8_t* codes, const float* scale,
                                                 Sums sums) {
    alignas(32) int32_t whole[kCount][kLanes];
    for (int half = 0; half < kHalves; ++half) {
      __m256i acc[kCount];
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) acc[m] = _mm256_setzero_si256();
      for (int first = 0; first < kSteps; first += Of::kFit) {
        __m256i fit[kCount];
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) fit[m] = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int at = first; at < first + Of::kFit; ++at) {
          const Step step = ready.steps[half][at];
          const uint8_t* inputs = codes + at * Of::kColumnsEach;
#pragma GCC unroll 8
          for (int m = 0; m < kCount; ++m) {
            const __m256i product = Of::product(Of::inputs(inputs + m * kColumns), step);
            fit[m] = kScaled ? add_words(fit[m], product) : product;
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) acc[m] = add_whole(acc[m], pairs(fit[m]));
      }
      const __m256i offset = kScaled ? load(ready.offset + half * kRows) : _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) Of::store_rows(whole[m], _mm256_sub_epi32(acc[m], offset), half);
    }
    for (int m = 0; m < kCount; ++m, sums = sums.after(1)) write_sums(whole[m], ready.scales, scale[m], sums);
  }

 private:
  static INLINE __m256i offset_of(__m256i bytes) {
    return pairs(_mm256_maddubs_epi16(_mm256_set1_epi8(static_cast<char>(128)), bytes));
  }

  // Of one token, as rounded.h adds them.
  static INLINE void write_sums(const int32_t* whole, const float* scales, float scale, Sums sums) {
#pragma GCC unroll 2
    for (int row = 0; row < kLanes; row += kRows) {
      __m256i sum = load(whole + row), before = _mm256_setzero_si256();
      if (!sums.opens) before = load(sums.kept + row);
      __m256 scaled;
      if constexpr (kScaled) {
        scaled = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scales + row), _mm256_castsi256_ps(before));
        sum = _mm256_castps_si256(scaled);
      } else {
        sum = _mm256_add_epi32(sum, before);
        scaled = _mm256_cvtepi32_ps(sum);
      }
      float* all = sums.all + row;
      if (!sums.closes) store(sums.kept + row, sum);
      else _mm256_storeu_ps(all, _mm256_fmadd_ps(scaled, _mm256_set1_ps(scale), _mm256_loadu_ps(all)));
    }
  }
};

struct Avx2 {
  static constexpr int kNumbers = kRows;  // float32 in a register

  static INLINE __m256i none() { return _mm256_setzero_si256(); }
  static INLINE __m256i larger(__m256i most, const float* x) {
    return _mm256_max_epi32(most, _mm256_and_si256(load(x), _mm256_set1_epi32(0x7fffffff)));
  }
  static INLINE uint32_t largest(__m256i most) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
  }
  static INLINE void round(const float* x, float each, int zero, uint8_t* to) {
    const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(each)));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_add_epi32(code, _mm256_set1_epi32(zero)),
                                              twice(_mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12)));
    const int low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    __builtin_memcpy(to, &low, 4), __builtin_memcpy(to + 4, &high, 4);
  }
};

}  // namespace

void avx2_int8::run(const Linear& op, int64_t first, int64_t last) {
  op.values == Values::kInt4 ? run_values<Avx2Bytes, Values::kInt4>(op, first, last)
                             : run_values<Avx2Bytes, Values::kInt8>(op, first, last);
}

void avx2_int8::round_tokens(const Linear& op, int64_t first, int64_t last, uint8_t* codes, float* scale) {
  round_inputs<Avx2>(op, first, last, codes, scale);
}

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
