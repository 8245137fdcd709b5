// The two small products of a correction: AVX-512 with bfloat16, and AMX for more than a few tokens. Sums are float32;
// X x is rounded to bfloat16 between the products, as where they are two linear layers, and y + S (X x) at the end. A
// token's sums are in the same order on any number of threads, and in a batch of any other size that takes the same
// instructions.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "correction.h"  // before the pragma: what these declare is for every processor
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif
#include "activations.h"
#if SPARSE24_AMX
#include "tiles.h"
#endif

namespace sparse24::correction {
namespace {

constexpr int kTokensOfUnit = 16;

// Inputs of one of the products, `apart` numbers from token to token.
struct Inputs {
  const uint16_t* start;
  int64_t apart;
};

// Sums [token][row] of one block, for kTokens tokens. Products of a sum wait for one another, so there are four of each.
template <int kTokens>
void multiply(const uint16_t* block, int64_t pairs, Inputs x, float* sums) {
  constexpr int kChains = 4;
  __m512 sum[kTokens][kChains];
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sum[m][i] = _mm512_setzero_ps();
  }
  const auto add = [&](int64_t pair, int m, int i, __m512i weights) {
    int32_t both;
    __builtin_memcpy(&both, x.start + m * x.apart + 2 * pair, sizeof(both));
    sum[m][i] = _mm512_dpbf16_ps(sum[m][i], reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)));
  };
  int64_t pair = 0;
  for (; pair + kChains <= pairs; pair += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const __m512i weights = _mm512_loadu_si512(block + (pair + i) * 2 * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < kTokens; ++m) add(pair + i, m, i, weights);
    }
  }
  for (; pair < pairs; ++pair) {
    const __m512i weights = _mm512_loadu_si512(block + pair * 2 * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < kTokens; ++m) add(pair, m, 0, weights);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; ++m) {
    _mm512_storeu_ps(sums + m * kLanes, _mm512_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]), _mm512_add_ps(sum[m][2], sum[m][3])));
  }
}

#if SPARSE24_AMX
// Sums [block][token][row] of kBlocks blocks for 16 tokens. Where a tile reaches beyond a block, inputs are zero.
template <int kBlocks>
void multiply_in_tiles(const uint16_t* block, int64_t pairs, Inputs x, float* sums) {
  each<kBlocks>([&](auto n) { zero_tile<n>(); });
  for (int64_t pair = 0; pair < pairs; pair += kTilePairs) {
    load_tile<4>(x.start + 2 * pair, x.apart * sizeof(uint16_t));
    each<kBlocks>([&](auto n) {
      constexpr int kWeights = 5 + n % 3;
      load_tile<kWeights>(block + (n * pairs + pair) * 2 * kLanes);
      multiply_tiles<n, 4, kWeights>();
    });
  }
  each<kBlocks>([&](auto n) { store_tile<n>(sums + n * kTokensOfUnit * kLanes); });
}
#endif

// Sums [block][16 tokens][row] of up to four blocks that lie together, for the tokens of a unit.
void multiply_unit(const Correction& op, const uint16_t* block, int64_t count, int64_t pairs, Inputs x, int64_t tokens, float* sums) {
#if SPARSE24_AMX
  if (op.tiles) {
    const TileConfiguration configuration(static_cast<int>(tokens), 5);
    switch (count) {
      case 4: return multiply_in_tiles<4>(block, pairs, x, sums);
      case 3: return multiply_in_tiles<3>(block, pairs, x, sums);
      case 2: return multiply_in_tiles<2>(block, pairs, x, sums);
      default: return multiply_in_tiles<1>(block, pairs, x, sums);
    }
  }
#endif
  for (int64_t n = 0; n < count; ++n, block += pairs * 2 * kLanes, sums += kTokensOfUnit * kLanes) {
    if (tokens == 4) {
      multiply<4>(block, pairs, x, sums);
      continue;
    }
    for (int64_t m = 0; m < tokens; ++m) multiply<1>(block, pairs, {x.start + m * x.apart, x.apart}, sums + m * kLanes);
  }
}

// Where a block of S is: its part, the outputs of those before it, and its number in the part.
struct Place {
  int64_t part = 0, before = 0, block = 0;
};
Place place_of(const Correction& op, int64_t block) {
  Place place;
  while (block >= row_blocks(op.rows_of[place.part])) {
    block -= row_blocks(op.rows_of[place.part]);
    place.before += op.rows_of[place.part++];
  }
  place.block = block;
  return place;
}

// Sums of a block for `tokens` tokens added to y.
void add_sums(const Correction& op, int64_t token, int64_t tokens, int64_t row, int64_t count, const float* sums) {
  const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
  for (int64_t m = 0; m < tokens; ++m, sums += kLanes) {
    const int64_t start = (token + m) * op.rows + row;
    const __m256i before = _mm256_maskz_loadu_epi16(some, op.y + start);
    const __m512 y = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(before), 16));
    const __m256bh after = _mm512_cvtneps_pbh(_mm512_add_ps(y, _mm512_load_ps(sums)));
    _mm256_mask_storeu_epi16(op.sum + start, some, reinterpret_cast<__m256i>(after));
  }
}

}  // namespace

void multiply_inner(const Correction& op, int64_t first, int64_t last) {
  alignas(64) float sums[kUnitBlocks * kTokensOfUnit * kLanes];
  const int64_t blocks = pool_blocks(op), groups = ceil_div(blocks, kUnitBlocks), each = unit_tokens(op);
  const int64_t of_part = row_blocks(op.inner), apart = op.parts * inner_apart(op.inner), two = pairs(op.columns);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t token = unit / groups * each, tokens = std::min(each, op.tokens - token);
    const int64_t block = unit % groups * kUnitBlocks, count = std::min(kUnitBlocks, blocks - block);
    multiply_unit(op, op.pool + block * two * 2 * kLanes, count, two, {op.x + token * op.columns, op.columns}, tokens, sums);
    for (int64_t n = 0; n < count; ++n) {
      uint16_t* to = op.z + token * apart + (block + n) / of_part * inner_apart(op.inner) + (block + n) % of_part * kLanes;
      for (int64_t m = 0; m < tokens; ++m) {
        const __m256bh z = _mm512_cvtneps_pbh(_mm512_load_ps(sums + (n * kTokensOfUnit + m) * kLanes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + m * apart), reinterpret_cast<__m256i>(z));
      }
    }
  }
}

void add_outer(const Correction& op, int64_t first, int64_t last) {
  alignas(64) float sums[kUnitBlocks * kTokensOfUnit * kLanes];
  const int64_t blocks = out_blocks(op), groups = ceil_div(blocks, kUnitBlocks), each = unit_tokens(op);
  const int64_t of_inner = inner_apart(op.inner), apart = op.parts * of_inner, two = pairs(op.inner);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t token = unit / groups * each, tokens = std::min(each, op.tokens - token);
    const int64_t start = unit % groups * kUnitBlocks, stop = std::min(start + kUnitBlocks, blocks);
    for (int64_t block = start, count; block < stop; block += count) {
      const Place place = place_of(op, block);
      const int64_t rows = op.rows_of[place.part];
      count = std::min(stop - block, row_blocks(rows) - place.block);
      const Inputs z{op.z + token * apart + place.part * of_inner, apart};
      multiply_unit(op, op.out + block * two * 2 * kLanes, count, two, z, tokens, sums);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t row = (place.block + n) * kLanes;
        add_sums(op, token, tokens, place.before + row, std::min<int64_t>(kLanes, rows - row), sums + n * kTokensOfUnit * kLanes);
      }
    }
  }
}

}  // namespace sparse24::correction
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
