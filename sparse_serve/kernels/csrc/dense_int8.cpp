// A dense weight in int8, whose inputs keep 16 bits: AVX-512 with VNNI, and AMX for more than a few tokens.
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
// all rows. A block is a tile of AMX as it is; for that, digits of 16 tokens lie as [64 columns][high, low][token][64].
// Sums of digits are whole numbers, so a token's result depends neither on the other tokens of its batch nor on the
// number of threads or the instructions.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "dense_int8.h"  // before the pragma: what these declare is for every processor
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma")
#endif
#include "activations.h"
#if SPARSE24_AMX
#include "tiles.h"
#endif

namespace sparse24::dense_int8 {
namespace {

constexpr int kZero = 128, kBase = 256;     // added to a code; what a high digit stands for
constexpr float kLargest = 127 * 256 + 127;  // 16 bits of which both digits are bytes
constexpr int kTogether = 12;                // tokens of which both sums fit into registers
constexpr int kTile = 64 * kLanes;           // bytes of 64 columns of 16 tokens, or rows

// How many of the tokens that are left go together.
int tile(int64_t left) { return left >= kTogether ? kTogether : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

INLINE __m512i product(__m512i sum, __m512i weights, const int8_t* digits) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int32_t(*)[1]>(digits)));
  return sum;
}

// What 16 sums of digits stand for. `offset` is what kZero added to both.
INLINE __m512 number(__m512i high, __m512i low, const int32_t* offset, float step) {
  const __m512 upper = _mm512_cvtepi32_ps(_mm512_sub_epi32(high, _mm512_set1_epi32(offset[0])));
  const __m512 lower = _mm512_cvtepi32_ps(_mm512_sub_epi32(low, _mm512_set1_epi32(offset[1])));
  return _mm512_mul_ps(_mm512_fmadd_ps(upper, _mm512_set1_ps(kBase), lower), _mm512_set1_ps(step));
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
  for (int m = 0; m < kCount; ++m) {
    _mm512_storeu_ps(sums + m * kLanes, number(high[m], low[m], offset + 2 * m, step[m]));
  }
}

// The digits of one token, and what kZero adds to its sums. Those of a column go `place(column)`, and `apart` from there.
template <class Place>
void split(const Linear& op, int64_t token, Place place, int64_t apart, int32_t* offset, float* step) {
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
      int8_t* to = place(column + i);
      to[0] = static_cast<int8_t>(high), to[apart] = static_cast<int8_t>(low);
      high_sum += high, low_sum += low;
    }
  }
  offset[0] = kZero * high_sum, offset[1] = kZero * low_sum;
}

#if SPARSE24_AMX
// kN blocks of rows, `apart` bytes apart, for 16 tokens: sums [block][high, low][token][row]. What lies `ahead` of the
// weights is asked for.
template <int kN>
INLINE void multiply_tiles(const uint8_t* weights, int64_t apart, const int8_t* digits, int64_t steps, int64_t ahead,
                           int32_t* sums) {
  each<2 * kN>([&](auto i) { zero_tile<i>(); });
  for (int64_t k = 0; k < steps; ++k, weights += kTile, digits += 2 * kTile) {
    load_tile<4>(digits), load_tile<5>(digits + kTile);
    each<kN>([&](auto n) {
      load_tile<6 + n>(weights + n * apart);
      if (ahead) each<kLanes>([&](auto i) { __builtin_prefetch(weights + ahead + n * apart + i * 64, 0, 2); });
      multiply_int8_uint8<2 * n, 4, 6 + n>(), multiply_int8_uint8<2 * n + 1, 5, 6 + n>();
    });
  }
  each<2 * kN>([&](auto i) { store_tile<i>(sums + i * kTile / 4); });
}

void run_tiles(const Linear& op, const Digits& x, int64_t first, int64_t last) {
  constexpr int kN = 2, kSums = kLanes * kLanes;
  const TileConfiguration configuration(kLanes, 8);
  const int64_t apart = quads(op.columns) * 64, steps = op.columns / 64;
  alignas(64) int32_t codes[kN * 2 * kSums];
  alignas(64) float sums[kSums];
  for (int64_t block = first, blocks; block < last; block += blocks) {
    blocks = std::min<int64_t>(kN, last - block);
    const uint8_t* weights = op.blocks + block * apart;
    for (int64_t token = 0; token < op.tokens; token += kLanes) {
      const int8_t* digits = x.digits + token * digit_bytes(op.columns);
      const int tokens = static_cast<int>(std::min<int64_t>(op.tokens - token, kLanes));
      const bool asks = token + kLanes >= op.tokens && block + 2 * kN <= last;  // while the last tokens are multiplied
      if (blocks == kN) multiply_tiles<kN>(weights, apart, digits, steps, asks ? kN * apart : 0, codes);
      else multiply_tiles<1>(weights, apart, digits, steps, 0, codes);
      for (int64_t n = 0; n < blocks; ++n) {
        const int32_t *high = codes + n * 2 * kSums, *low = high + kSums;
        for (int m = 0; m < tokens; ++m) {
          const __m512i sums_of[] = {_mm512_load_si512(high + m * kLanes), _mm512_load_si512(low + m * kLanes)};
          _mm512_store_ps(sums + m * kLanes, number(sums_of[0], sums_of[1], x.offset + 2 * (token + m), x.step[token + m]));
        }
        write_outputs(op, sums, (block + n) * kLanes, token, tokens);
      }
    }
  }
}
#endif

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
    count = out.tiles ? std::min<int64_t>(op.tokens - token, kLanes) : tile(op.tokens - token);
    int8_t* digits = out.digits + token * digit_bytes(op.columns);
    if (out.tiles && count < kLanes) std::fill_n(digits, kLanes * digit_bytes(op.columns), int8_t{0});
    for (int64_t m = 0; m < count; ++m) {
      int32_t* offset = out.offset + 2 * (token + m);
      const auto in_tiles = [&](int64_t column) { return digits + column / 64 * 2 * kTile + m * 64 + column % 64; };
      const auto in_quads = [&](int64_t column) { return digits + (column / 4 * count + m) * 8 + column % 4; };
      if (out.tiles) split(op, token + m, in_tiles, kTile, offset, out.step + token + m);
      else split(op, token + m, in_quads, 4, offset, out.step + token + m);
    }
  }
}

void run(const Linear& op, const Digits& x, int64_t first, int64_t last) {
#if SPARSE24_AMX
  if (x.tiles) return run_tiles(op, x, first, last);
#endif
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
