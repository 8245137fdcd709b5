// The loops of the 2:4 linear, written once for every instruction set `Isa`.
//
//     for each group of superblocks, for each tile of tokens:
//         for each 128 columns:
//             tables of x                            once, for all rows of the group
//             for each block of 16 rows:             accumulators of the tile in registers
//                 for each group of 4 columns:       1 load of weights, and per token 1 or 2 selects and products
//
// The kept inputs of a group are found by table look-up, not by masks: a group of x has only 6 pairs, so the pairs are
// laid out as a table and the weight's code is the index, for 16 rows with one permute (with AVX2 the table is the group
// itself, and the code two indices). Two kinds of product, both exact in what they multiply and summed in float32:
//
//     Exact    table: 8 left and 8 right inputs in float32     acc += left * w_left; acc += right * w_right
//     Pairs    table: 8 pairs of bfloat16                      acc = vdpbf16ps(acc, pair, w)
//
// Pairs is for bfloat16 inputs where the processor has the instruction; int8 values are bfloat16 numbers too. A result
// depends on its token and its row only, not on the other tokens of the batch nor on the number of threads: with many
// tokens both may go another way (many.h) to the same sums in the same order.
//
// int4 values have a scale for each block: sums of codes begin at zero in each, and are scaled when they are added.
#pragma once
#include "kept.h"
#include "many_columns.h"
#include "many_pairs.h"

namespace sparse24 {
namespace {

constexpr int kOwned = 32;  // most blocks of a group

// Weights are asked for twice: from memory into the L2 cache, `kFar` blocks ahead, then into L1, `kNear` ahead. L1 alone
// can wait for too few lines at once to hide how long memory takes (14336 x 4096, 8 tokens, two threads of a Zen 4: 2.8
// ms to L1 only, 2.0 ms so). Ahead is in memory; at the end of a superblock that is past what comes next, and what was
// asked for there is late. One token needs none of it on some processors (`Linear::prefetches`).
constexpr int kFar = 6, kNear = 2;

template <int kCount, Values kValues>
INLINE void ask(const uint8_t* line) {
  if constexpr (kCount > 1) {
    __builtin_prefetch(line + kFar * block_bytes(kValues), 0, 2);
    __builtin_prefetch(line + kNear * block_bytes(kValues));
  }
}

template <class Isa, Values kValues>
struct Exact {
  static constexpr int kTable = Isa::kTable;  // bytes per token and group
  using Lanes = typename Isa::Lanes;

  static void tables(const Linear& op, int64_t token, int64_t column, uint8_t* out, int stride) {
    alignas(64) float x[kColumns];
    read_inputs(op, token, column, x);
    for (int g = 0; g < kGroups; ++g) Isa::spread(x + 4 * g, out + g * stride);
  }

  template <int kCount>
  static INLINE void step(Lanes* acc, const uint8_t* values, Lanes nibbles, typename Isa::Codes codes, const uint8_t* table) {
    Lanes left, right;
    kept_values<Isa, kValues>(values, nibbles, left, right);
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) {
      const auto entries = Isa::table(table + m * kTable);
      acc[m] = add<kCount>(Isa::template pick<0>(entries, codes), left, acc[m]);
      acc[m] = add<kCount>(Isa::template pick<1>(entries, codes), right, acc[m]);
    }
  }

  template <int kCount>
  static INLINE Lanes add(Lanes a, Lanes b, Lanes sum) {
    return kCount > 1 ? Isa::multiply_add_in_place(a, b, sum) : Isa::multiply_add(a, b, sum);
  }
};

template <class Isa, Values kValues>
struct Pairs {
  static constexpr int kTable = 32;
  using Lanes = typename Isa::Lanes;

  static void tables(const Linear& op, int64_t token, int64_t column, uint8_t* out, int stride) {
    const int64_t left = op.columns - column, count = left < kColumns ? left : kColumns;
    const uint16_t* x = static_cast<const uint16_t*>(op.x) + token * op.columns + column;
    alignas(64) uint16_t padded[kColumns];
    if (count < kColumns) {
      for (int i = 0; i < kColumns; ++i) padded[i] = i < count ? x[i] : 0;
      x = padded;
    }
    for (int g = 0; g < kGroups; ++g) Isa::spread_pairs(x + 4 * g, out + g * stride);
  }

  template <int kCount>
  static INLINE void step(Lanes* acc, const uint8_t* values, Lanes nibbles, typename Isa::Codes codes, const uint8_t* table) {
    Lanes both;
    if constexpr (kValues == Values::kInt4) both = Isa::nibbles_to_bf16(nibbles);
    else both = kValues == Values::kBFloat16 ? Isa::load(values) : Isa::widen_to_bf16(values);
#pragma GCC unroll 16
    for (int m = 0; m < kCount; m += 2) {
      const auto entries = kCount > 1 ? Isa::table(table + m * kTable) : Isa::half_table(table);
      acc[m] = dot<kCount>(Isa::template pick<0>(entries, codes), both, acc[m]);
      if (m + 1 < kCount) acc[m + 1] = dot<kCount>(Isa::template pick<1>(entries, codes), both, acc[m + 1]);
    }
  }

  template <int kCount>
  static INLINE Lanes dot(Lanes a, Lanes b, Lanes sum) {
    return kCount > 8 ? Isa::dot_bf16_in_place(a, b, sum) : Isa::dot_bf16(a, b, sum);
  }
};

// Of a block kParts registers of rows, from the row kRow on.
template <class Isa, class Product, int kCount, Values kValues, int kParts, int kRow>
INLINE void rows_of_block(const uint8_t* data, const uint8_t* tables, float* sums) {
  constexpr int kValueBytes = together_bytes(kValues), kTogether = together(kValues);
  constexpr int kStride = kCount * Product::kTable, kRowBytes = kValues == Values::kInt8 ? 2 : 4;
  constexpr bool kScaled = kValues == Values::kInt4;
  typename Isa::Lanes acc[kParts][kCount];
  typename Isa::Codes codes[kParts];
  typename Isa::Lanes nibbles[kParts];
  sums += kRow;
#pragma GCC unroll 2
  for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) acc[p][m] = kScaled ? Isa::zero() : Isa::load(sums + m * kLanes + p * Isa::kRows);
  }
  const uint8_t* values = data + kCodeBytes + kRow * kRowBytes;
  for (int quarter = 0; quarter < kGroups / 8; ++quarter) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) codes[p] = Isa::codes(data + quarter * 64 + (kRow + p * Isa::kRows) * 4);
    if constexpr (kRow == 0) ask<kCount, kValues>(data + quarter * 64);
#pragma GCC unroll 2
    for (int g = 0; g < 8 / kTogether; ++g, values += kValueBytes) {
      if constexpr (kRow == 0) {
        for (int line = 0; line < kValueBytes; line += 64) ask<kCount, kValues>(values + line);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) nibbles[p] = kScaled ? Isa::load(values + p * Isa::kRows * 4) : Isa::zero();
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          Product::template step<kCount>(acc[p], values + p * Isa::kRows * kRowBytes, nibbles[p], codes[p], tables);
          codes[p] = Isa::next(codes[p]);
          if constexpr (kScaled) nibbles[p] = Isa::next_nibbles(nibbles[p]);
        }
        tables += kStride;
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kParts; ++p) {
    const auto scale = kScaled ? Isa::load(values + p * Isa::kRows * 4) : Isa::zero();
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) {
      float* sum = sums + m * kLanes + p * Isa::kRows;
      Isa::store(sum, kScaled ? Isa::multiply_add(acc[p][m], scale, Isa::load(sum)) : acc[p][m]);
    }
  }
}

// 16 rows by 128 columns for kCount tokens: sums [token][16], tables [group][token]. Where a register holds fewer rows
// they are computed in turn, so that the sums of many tokens stay in registers; those of one token are too few to keep
// the processor busy, and all rows go side by side. Inlined, it would share the registers with its callers' constants
// and spill accumulators.
template <class Isa, class Product, int kCount, Values kValues>
__attribute__((noinline)) void block(const uint8_t* data, const uint8_t* tables, float* sums) {
  constexpr int kParts = kCount == 1 ? kLanes / Isa::kRows : 1;
  rows_of_block<Isa, Product, kCount, kValues, kParts, 0>(data, tables, sums);
  if constexpr (kParts * Isa::kRows < kLanes) {
    static_assert(kParts * Isa::kRows * 2 == kLanes);
    rows_of_block<Isa, Product, kCount, kValues, kParts, Isa::kRows>(data, tables, sums);
  }
}

// Superblocks [first, last) for the tokens [token, token + tokens), with room for kCount of them.
template <class Isa, class Product, int kCount, Values kValues>
void tile(const Linear& op, int64_t first, int64_t last, int64_t token, int tokens) {
  alignas(64) uint8_t tables[kGroups * kCount * Product::kTable];
  alignas(64) float sums[kOwned * kCount * kLanes];
  constexpr int kStride = kCount * Product::kTable;
  const int64_t parts = column_blocks(op.columns), blocks = row_blocks(op.rows) - first * kSuper;
  const int64_t owned = (last - first) * kSuper;
  __builtin_memset(sums, 0, (blocks < owned ? blocks : owned) * kCount * kLanes * sizeof(float));
  if (tokens < kCount) __builtin_memset(tables, 0, sizeof(tables));
  for (int64_t part = 0; part < parts; ++part) {
    for (int m = 0; m < tokens; ++m) {
      Product::tables(op, token + m, part * kColumns, tables + m * Product::kTable, kStride);
    }
    float* sum = sums;
    for (int64_t super = first; super < last; ++super) {
      const int count = blocks_of(op.rows, super);
      const uint8_t* data = op.blocks + (super * kSuper * parts + part * count) * block_bytes(kValues);
      for (int b = 0; b < count; ++b, data += block_bytes(kValues), sum += kCount * kLanes) {
        if (kCount == 1 && op.prefetches) prefetch_blocks<kValues, kFar, kNear>(data);
        block<Isa, Product, kCount, kValues>(data, tables, sum);
      }
    }
  }
  const float* sum = sums;
  for (int64_t row = first * kSuper * kLanes; row < op.rows && row < last * kSuper * kLanes; row += kLanes) {
    write_outputs(op, sum, row, token, tokens);
    sum += kCount * kLanes;
  }
}

template <class Isa, class Product, Values kValues>
void run_product(const Linear& op, int64_t first, int64_t last, int64_t begin = 0) {
  constexpr int kMost = Isa::kTokens;
  const int64_t left = op.tokens - begin;
  if (left == 0) return;
  const int64_t tiles = ceil_div(left, kMost), even = ceil_div(left, tiles);
  const int64_t owned = op.tokens == 1 ? 1 : kOwned / kSuper;
  for (int64_t start = first; start < last; start += owned) {
    const int64_t stop = start + owned < last ? start + owned : last;
    for (int64_t token = begin; token < op.tokens; token += even) {
      const int count = static_cast<int>(op.tokens - token < even ? op.tokens - token : even);
#define TILE(n)                                                                            \
  if (count <= n && n <= kMost) {                                                          \
    tile<Isa, Product, n <= kMost ? n : 1, kValues>(op, start, stop, token, count);        \
    continue;                                                                              \
  }
      TILE(1) TILE(2) TILE(4) TILE(6) TILE(8) TILE(12) TILE(16)
#undef TILE
    }
  }
}

template <class Isa, Values kValues>
void run_exact(const Linear& op, int64_t first, int64_t last) {
  int64_t done = 0;
  if constexpr (Isa::kManyColumns) done = run_many<Isa, ManyColumns<Isa, kValues>>(op, first, last);
  run_product<Isa, Exact<Isa, kValues>, kValues>(op, first, last, done);
}

template <class Isa>
void run_any(const Linear& op, int64_t first, int64_t last) {
  constexpr Values kInt8 = Values::kInt8, kInt4 = Values::kInt4, kFloat32 = Values::kFloat32;
  constexpr Values kBFloat16 = Values::kBFloat16, kFloat16 = Values::kFloat16;
  if (op.values == kFloat32) return run_exact<Isa, kFloat32>(op, first, last);
  if (op.values == kFloat16) return run_exact<Isa, kFloat16>(op, first, last);
  if constexpr (Isa::kDotBf16) {
    const bool bfloat16 = op.kind == Floats::kBFloat16;
    if (bfloat16 && op.values == kInt4) {
      const int64_t done = run_many<Isa, ManyPairs<Isa, kInt4>>(op, first, last);
      return run_product<Isa, Pairs<Isa, kInt4>, kInt4>(op, first, last, done);
    }
    if (bfloat16 && op.values == kInt8) {
      const int64_t done = run_many<Isa, ManyPairs<Isa, kInt8>>(op, first, last);
      return run_product<Isa, Pairs<Isa, kInt8>, kInt8>(op, first, last, done);
    }
    if (bfloat16) {
      const int64_t done = run_many<Isa, ManyPairs<Isa, kBFloat16>>(op, first, last);
      return run_product<Isa, Pairs<Isa, kBFloat16>, kBFloat16>(op, first, last, done);
    }
  }
  if (op.values == kInt4) return run_exact<Isa, kInt4>(op, first, last);
  if (op.values == kInt8) return run_exact<Isa, kInt8>(op, first, last);
  run_exact<Isa, kBFloat16>(op, first, last);
}

}  // namespace
}  // namespace sparse24
