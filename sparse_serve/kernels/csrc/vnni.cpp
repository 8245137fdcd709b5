// Rounded activations (rounded.h) by AVX-512 with VNNI, whose products of bytes are four to a lane, and VBMI, which
// makes the controls.
//
//     of each 8 columns:      per row 4 values and 4 controls
//     for each 24 tokens:     per token 1 byte shuffle and 1 product of 64 bytes
//
// The 8 inputs of two groups lie in every lane, and a control says which four of them a row keeps. A dense kernel needs
// two products for what is one shuffle and one product here, and shuffles have a port of their own.
//
// Products are of unsigned inputs and signed weights, so an input's code is stored with 128 added; `offset` is what
// that adds to a row's sum.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "layout.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma")
#endif
#include "rounded.h"

namespace sparse24 {
namespace {

constexpr int kSteps = kGroups / 2;  // of 8 columns
using vnni::kZero;

// By code, with 8 added for the right value, and 16 for the second group: the column.
struct ColumnTable {
  alignas(64) uint8_t at[64];
  constexpr ColumnTable() : at() {
    constexpr int kKept[2][8] = {{0, 0, 0, 1, 1, 2, 0, 0}, {1, 2, 3, 2, 3, 3, 0, 0}};
    for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(kKept[i / 8 % 2][i % 8] + (i & 16 ? 4 : 0));
  }
};
constexpr ColumnTable kColumnTable;

// The number of a nibble, whatever else is in its byte.
struct NibbleTable {
  alignas(64) int8_t at[64];
  constexpr NibbleTable() : at() {
    for (int i = 0; i < 64; ++i) at[i] = static_cast<int8_t>(i % 16 < 8 ? i % 16 : i % 16 - 16);
  }
};
constexpr NibbleTable kNibbleTable;

// Which bits become the four bytes of a row, of two rows in a quadword.
INLINE __m512i bits(int a, int b, int c, int d) {
  const uint32_t low = a | b << 8 | c << 16 | d << 24;
  return _mm512_set1_epi64(static_cast<int64_t>(low | static_cast<uint64_t>(low + 0x20202020u) << 32));
}

INLINE __m512i product(__m512i sum, __m512i inputs, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(inputs), "v"(weights));  // GCC 12 copies sums of the intrinsic
  return sum;
}

// Values and controls of the i-th of a quarter's four steps.
template <Values kValues>
INLINE void expand(const uint8_t* block, int quarter, int i, __m512i codes, __m512i& kept, __m512i& control) {
  const __m512i columns = _mm512_load_si512(kColumnTable.at), numbers = _mm512_load_si512(kNibbleTable.at);
  const __m512i places = _mm512_set1_epi32(0x18100800), code = _mm512_set1_epi8(7);
  const __m512i rows = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const int step = quarter * 4 + i;
  const __m512i two = _mm512_multishift_epi64_epi8(bits(8 * i, 8 * i, 8 * i + 4, 8 * i + 4), codes);
  control = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(two, code, places, 0xea), columns);
  if constexpr (kValues == Values::kInt4) {
    const int at = 8 * (i % 2);  // in 4 nibbles of left values, then 4 of right ones
    const __m512i eight = _mm512_loadu_si512(block + kCodeBytes + step / 2 * 64);
    kept = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(bits(at, 16 + at, at + 4, 20 + at), eight), numbers);
  } else {
    kept = _mm512_permutexvar_epi16(rows, _mm512_loadu_si512(block + kCodeBytes + step * 64));
  }
}

// Of the 8 inputs from there on, for each row the four that it keeps.
INLINE __m512i picked(const uint8_t* inputs, __m512i control) {
  int64_t eight;
  __builtin_memcpy(&eight, inputs, 8);
  return _mm512_shuffle_epi8(_mm512_set1_epi64(eight), control);
}

// Sums of codes of kCount tokens, added to those of the columns before.
template <Values kValues, int kCount>
INLINE void write_sums(const __m512i* acc, __m512i offset, const float* scales, const float* scale, Sums sums) {
#pragma GCC unroll 24
  for (int m = 0; m < kCount; ++m, sums = sums.after(1)) {
    __m512i sum = _mm512_sub_epi32(acc[m], offset), before = _mm512_setzero_si512();
    if (!sums.opens) before = _mm512_load_si512(sums.kept);
    __m512 scaled;
    if constexpr (kValues == Values::kInt4) {
      const __m512 of_row = _mm512_loadu_ps(scales);
      scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), of_row, _mm512_castsi512_ps(before));
      sum = _mm512_castps_si512(scaled);
    } else {
      sum = _mm512_add_epi32(sum, before);
      scaled = _mm512_cvtepi32_ps(sum);
    }
    if (!sums.closes) _mm512_store_si512(sums.kept, sum);
    else _mm512_store_ps(sums.all, _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale[m]), _mm512_load_ps(sums.all)));
  }
}

template <Values kValues>
struct Vnni {
  static constexpr int kMost = 24;  // tokens whose sums are in registers

  // A block made ready.
  struct Ready {
    alignas(64) uint8_t values[kSteps][64];    // [step][row][left, right, left, right]
    alignas(64) uint8_t controls[kSteps][64];  // of each value, which of the 8 columns it belongs to
    alignas(64) int32_t offset[kLanes];        // kZero times the sum of a row's values
    alignas(64) float scales[kLanes];          // int4 only
  };

  static __attribute__((noinline)) void make_ready(const uint8_t* block, Ready& out) {
    const __m512i zero = _mm512_set1_epi8(-kZero);
    __m512i offset = _mm512_setzero_si512();
    for (int quarter = 0; quarter < kSteps / 4; ++quarter) {
      const __m512i codes = _mm512_loadu_si512(block + quarter * 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m512i kept, control;
        expand<kValues>(block, quarter, i, codes, kept, control);
        _mm512_store_si512(out.controls[quarter * 4 + i], control);
        _mm512_store_si512(out.values[quarter * 4 + i], kept);
        offset = product(offset, zero, kept);
      }
    }
    _mm512_store_si512(out.offset, offset);
    if constexpr (kValues == Values::kInt4) {
      _mm512_store_si512(out.scales, _mm512_loadu_si512(block + kCodeBytes + kSteps / 2 * 64));
    }
  }

  // The same for so few tokens that what is made ready is better not stored.
  template <int kCount>
  static __attribute__((noinline)) void multiply_few(const uint8_t* block, const uint8_t* inputs, const float* scale, Sums sums) {
    const __m512i zero = _mm512_set1_epi8(-kZero);
    __m512i acc[kCount], offset = _mm512_setzero_si512();
    for (auto& sum : acc) sum = offset;
    for (int quarter = 0; quarter < kSteps / 4; ++quarter) {
      const __m512i codes = _mm512_loadu_si512(block + quarter * 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, inputs += 8) {
        __m512i kept, control;
        expand<kValues>(block, quarter, i, codes, kept, control);
        offset = product(offset, zero, kept);
#pragma GCC unroll 3
        for (int m = 0; m < kCount; ++m) acc[m] = product(acc[m], picked(inputs + m * kColumns, control), kept);
      }
    }
    const float* scales = reinterpret_cast<const float*>(block + kCodeBytes + kSteps / 2 * 64);
    write_sums<kValues, kCount>(acc, offset, scales, scale, sums);
  }

  // kCount tokens by 16 rows, 128 columns; codes [token][128], a scale for each token, sums [token][row].
  template <int kCount>
  static __attribute__((noinline)) void multiply(const Ready& ready, const uint8_t* codes, const float* scale, Sums sums) {
    __m512i acc[kCount];
#pragma GCC unroll 24
    for (int m = 0; m < kCount; ++m) acc[m] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int step = 0; step < kSteps; ++step, codes += 8) {
      const __m512i values = _mm512_load_si512(ready.values[step]), controls = _mm512_load_si512(ready.controls[step]);
#pragma GCC unroll 24
      for (int m = 0; m < kCount; ++m) {
        acc[m] = product(acc[m], picked(codes + m * kColumns, controls), values);
      }
    }
    write_sums<kValues, kCount>(acc, _mm512_load_si512(ready.offset), ready.scales, scale, sums);
  }
};

struct Avx512 {
  static constexpr int kNumbers = kLanes;  // float32 in a register

  static INLINE __m512i none() { return _mm512_setzero_si512(); }
  static INLINE __m512i larger(__m512i most, const float* x) {
    return _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static INLINE uint32_t largest(__m512i most) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(most)); }
  static INLINE void round(const float* x, float each, int zero, uint8_t* to) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(each)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(zero))));
  }
};

}  // namespace

void vnni::run(const Linear& op, int64_t first, int64_t last) {
  op.values == Values::kInt4 ? run_values<Vnni, Values::kInt4>(op, first, last)
                             : run_values<Vnni, Values::kInt8>(op, first, last);
}

void vnni::round_tokens(const Linear& op, int64_t first, int64_t last, uint8_t* codes, float* scale) {
  round_inputs<Avx512>(op, first, last, codes, scale);
}

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
