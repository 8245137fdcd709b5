// A dense weight in int8 for a few tokens, whose inputs keep 16 bits: AVX-512 with VNNI.
//
// The weight lies as blocks of 16 rows: of every 4 columns 16 dwords, one for each row, 128 added to each code. So a token
// is one sequential read of the weight for each thread, and sums need no work across lanes.
//
// An input becomes a whole number of 16 bits, the largest magnitude of its token 32639, and two digits of it meet the
// codes as bytes:
//
//     x / step = 256 high + low        high from -127 to 127, low from -128 to 127
//     sum of (code + 128) x = 256 sum of (code + 128) high + sum of (code + 128) low
//
// Digits of up to 12 tokens lie as [4 columns][token][high, low][4 bytes], from where the instruction repeats them for
// all rows. Sums of digits are whole numbers, so a token's result depends neither on the other tokens of its batch nor
// on the number of threads.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "dense_int8.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma")
#endif
#include "activations.h"

namespace sparse24::dense_int8 {
namespace {

constexpr int kZero = 128, kBase = 256;     // added to a code; what a high digit stands for
constexpr float kLargest = 127 * 256 + 127;  // 16 bits of which both digits are bytes
constexpr int kTogether = 12;                // tokens of which both sums fit into registers

// How many of the tokens that are left go together.
int tile(int64_t left) { return left >= kTogether ? kTogether : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

INLINE __m512i product(__m512i sum, __m512i weights, const int8_t* digits) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int32_t(*)[1]>(digits)));
  return sum;
}

// 16 rows for kCount tokens: sums [token][row].
template <int kCount>
__attribute__((noinline)) void multiply(const uint8_t* block, const int8_t* digits, int64_t quads, const int32_t* offset,
                                        const float* step, float* sums) {
  __m512i high[kCount], low[kCount];
#pragma GCC unroll 12
  for (int m = 0; m < kCount; ++m) high[m] = low[m] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int64_t quad = 0; quad < quads; ++quad, block += 64, digits += 8 * kCount) {
    const __m512i weights = _mm512_loadu_si512(block);
#pragma GCC unroll 12
    for (int m = 0; m < kCount; ++m) {
      high[m] = product(high[m], weights, digits + 8 * m);
      low[m] = product(low[m], weights, digits + 8 * m + 4);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kCount; ++m, sums += kLanes) {
    const __m512 upper = _mm512_cvtepi32_ps(_mm512_sub_epi32(high[m], _mm512_set1_epi32(offset[2 * m])));
    const __m512 lower = _mm512_cvtepi32_ps(_mm512_sub_epi32(low[m], _mm512_set1_epi32(offset[2 * m + 1])));
    const __m512 sum = _mm512_fmadd_ps(upper, _mm512_set1_ps(kBase), lower);
    _mm512_storeu_ps(sums, _mm512_mul_ps(sum, _mm512_set1_ps(step[m])));
  }
}

// The digits of one token, the m-th of `count`, and what kZero adds to its sums.
void split(const Linear& op, int64_t token, int m, int count, int8_t* digits, int32_t* offset, float* step) {
  constexpr float kNothing = 1e-30f;
  alignas(64) float x[kColumns];
  float largest = 0;
  bool finite = true;
  for (int64_t column = 0; column < op.columns; column += kColumns) {
    read_inputs(op, token, column, x);
    for (float value : x) largest = std::max(largest, std::fabs(value)), finite &= std::fabs(value) <= std::numeric_limits<float>::max();
  }
  const bool counts = finite && largest > kNothing;
  *step = counts ? largest / kLargest : finite ? 0 : std::numeric_limits<float>::quiet_NaN();
  const float each = counts ? kLargest / largest : 0;
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t column = 0; column < op.columns; column += kColumns) {
    read_inputs(op, token, column, x);
    for (int64_t i = 0; i < kColumns && column + i < quads(op.columns) * 4; ++i) {
      const int32_t number = counts ? static_cast<int32_t>(std::lrintf(x[i] * each)) : 0;
      const int32_t high = (number + kZero) >> 8, low = number - kBase * high;
      int8_t* to = digits + ((column + i) / 4 * count + m) * 8 + i % 4;
      to[0] = static_cast<int8_t>(high), to[4] = static_cast<int8_t>(low);
      high_sum += high, low_sum += low;
    }
  }
  offset[0] = kZero * high_sum, offset[1] = kZero * low_sum;
}

}  // namespace

void pack(const int8_t* codes, int64_t rows, int64_t columns, uint8_t* blocks, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    uint8_t* to = blocks + block * quads(columns) * 64;
    for (int64_t quad = 0; quad < quads(columns); ++quad, to += 64) {
      for (int i = 0; i < 64; ++i) {
        const int64_t row = block * kLanes + i / 4, column = quad * 4 + i % 4;
        const int code = row < rows && column < columns ? codes[row * columns + column] : 0;
        to[i] = static_cast<uint8_t>(code + kZero);
      }
    }
  }
}

void split_tokens(const Linear& op, const Digits& out) {
  for (int64_t token = 0, count; token < op.tokens; token += count) {
    count = tile(op.tokens - token);
    for (int m = 0; m < count; ++m) {
      int8_t* digits = out.digits + token * digit_bytes(op.columns);
      split(op, token + m, m, static_cast<int>(count), digits, out.offset + 2 * (token + m), out.step + token + m);
    }
  }
}

void run(const Linear& op, const Digits& x, int64_t first, int64_t last) {
  const int64_t count = quads(op.columns);
  alignas(64) float sums[kTogether * kLanes];
  for (int64_t block = first; block < last; ++block) {
    const uint8_t* weights = op.blocks + block * count * 64;
    for (int64_t token = 0, tokens; token < op.tokens; token += tokens) {
      const int8_t* digits = x.digits + token * digit_bytes(op.columns);
      const int32_t* offset = x.offset + 2 * token;
      const float* step = x.step + token;
      switch (tokens = tile(op.tokens - token)) {
        case 12: multiply<12>(weights, digits, count, offset, step, sums); break;
        case 8: multiply<8>(weights, digits, count, offset, step, sums); break;
        case 4: multiply<4>(weights, digits, count, offset, step, sums); break;
        case 2: multiply<2>(weights, digits, count, offset, step, sums); break;
        default: multiply<1>(weights, digits, count, offset, step, sums);
      }
      write_outputs(op, sums, block * kLanes, token, static_cast<int>(tokens));
    }
  }
}

}  // namespace sparse24::dense_int8
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
