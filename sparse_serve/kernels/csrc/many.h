// The loop for many tokens: tokens in the lanes, and the code of a group is an address.
//
//     for each group of superblocks, for each 64 tokens:
//         for each 128 columns:
//             tables of x                            of each 4 columns: 6 pairs of bfloat16, each of 64 tokens
//             for each row:                          its 64 sums in registers
//                 for each group of 4 columns:       the pair its code points to, times the two values: 4 products
//
// With rows in the lanes (linear.h) every product costs a permute too, and both compete for the same execution ports.
// Here the load that fetches the operand does the selecting. Tables are built once for all rows of a group of superblocks
// (48 KiB; the sums are 256 KiB), which pays from 64 tokens on; and the sums come out with rows and tokens changed round,
// which bfloat16 values have to make up for over many columns, while int8 and int4 values are widened for 64 tokens at once.
#pragma once
#include <memory>

#include "activations.h"

namespace sparse24 {
namespace {

constexpr int kManySupers = 8;                 // superblocks of a group
constexpr int kLong = 1024;                    // columns
constexpr int kVectors = kMany / kLanes, kPairs = 6;
constexpr int kEntry = kMany * 4;              // bytes of one pair of columns, for all tokens
constexpr int kManyTables = (kGroups * kPairs + 2) * kEntry;  // a code may say 7, were memory damaged

// Entries of 128 columns, [group][pair][token].
template <class Isa>
void many_tables(const Linear& op, int64_t token, int64_t column, uint8_t* out) {
  constexpr int kSome = 32;  // columns at a time: 8 groups
  for (int part = 0; part < kColumns; part += kSome) {
    const int64_t start = column + part, left = op.columns - start;
    for (int v = 0; v < kVectors; ++v) {
      const uint16_t* x = static_cast<const uint16_t*>(op.x) + (token + v * kLanes) * op.columns + start;
      int64_t stride = op.columns;
      alignas(64) uint16_t padded[kLanes * kSome];
      if (left < kSome) {
        __builtin_memset(padded, 0, sizeof(padded));
        for (int m = 0; m < kLanes && left > 0; ++m) __builtin_memcpy(padded + m * kSome, x + m * stride, left * 2);
        x = padded, stride = kSome;
      }
      Isa::spread_tokens(x, stride, out + part / 4 * kPairs * kEntry + v * 64, kPairs * kEntry, kEntry);
    }
  }
}

// 16 rows by 128 columns: sums [row][token].
template <class Isa, Values kValues>
__attribute__((noinline)) void many_block(const uint8_t* data, const uint8_t* tables, float* sums) {
  constexpr int kLines = (block_bytes(kValues) / 64 + kLanes - 1) / kLanes;  // of the next block, for each row of this one
  const uint8_t* values = data + kCodeBytes;
  constexpr bool kScaled = kValues == Values::kInt4;
  alignas(64) uint8_t widened[kValues == Values::kInt8 || kScaled ? kGroups * 64 : 1];
  alignas(64) float scales[kLanes];
  if constexpr (kScaled) {
    for (int g = 0; g < kGroups / 4; ++g) {
      typename Isa::Lanes nibbles = Isa::load(values + g * 64);
      for (int i = 0; i < 4; ++i, nibbles = Isa::next_nibbles(nibbles)) {
        Isa::store(widened + (4 * g + i) * 64, Isa::nibbles_to_bf16(nibbles));
      }
    }
    Isa::store(scales, Isa::load(values + kGroups / 4 * 64));
    values = widened;
  }
  if constexpr (kValues == Values::kInt8) {
    for (int g = 0; g < kGroups; ++g) Isa::store(widened + g * 64, Isa::widen_to_bf16(values + g * 32));
    values = widened;
  }
  for (int row = 0; row < kLanes; ++row, sums += kMany) {
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(data + block_bytes(kValues) + (row * kLines + line) * 64);
    typename Isa::Lanes acc[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[v] = kScaled ? Isa::zero() : Isa::load(sums + v * kLanes);
    const uint8_t *value = values + 4 * row, *table = tables;
    for (int quarter = 0; quarter < kGroups / 8; ++quarter) {
      uint32_t codes;
      __builtin_memcpy(&codes, data + quarter * 64 + 4 * row, 4);
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g, value += 64, table += kPairs * kEntry) {
        const uint8_t* entry = table + (codes >> (4 * g) & 7) * kEntry;
        const typename Isa::Lanes both = Isa::broadcast(value);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[v] = Isa::dot_bf16(Isa::load(entry + v * 64), both, acc[v]);
      }
    }
    if constexpr (kScaled) {
      const typename Isa::Lanes scale = Isa::broadcast(reinterpret_cast<const uint8_t*>(scales + row));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[v] = Isa::multiply_add(acc[v], scale, Isa::load(sums + v * kLanes));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Isa::store(sums + v * kLanes, acc[v]);
  }
}

// Superblocks [first, last) for as many tokens as fill whole tiles; returns how many.
template <class Isa, Values kValues>
int64_t run_many(const Linear& op, int64_t first, int64_t last) {
  struct Scratch {
    alignas(64) float sums[kManySupers * kSuper * kLanes * kMany];
    alignas(64) uint8_t tables[kManyTables];
  };
  static thread_local std::unique_ptr<Scratch> own;  // a stack may be smaller; given back with the thread
  if (op.tokens < kMany || (kValues == Values::kBFloat16 && op.columns < kLong)) return 0;
  if (!own) own = std::make_unique<Scratch>();
  float* sums = own->sums;
  uint8_t* tables = own->tables;
  const int64_t parts = column_blocks(op.columns), whole = op.tokens / kMany * kMany;
  for (int64_t start = first; start < last && whole; start += kManySupers) {
    const int64_t stop = start + kManySupers < last ? start + kManySupers : last;
    for (int64_t token = 0; token < whole; token += kMany) {
      __builtin_memset(sums, 0, (stop - start) * kSuper * kLanes * kMany * sizeof(float));
      for (int64_t part = 0; part < parts; ++part) {
        many_tables<Isa>(op, token, part * kColumns, tables);
        float* sum = sums;
        for (int64_t super = start; super < stop; ++super) {
          const int count = blocks_of(op.rows, super);
          const uint8_t* data = op.blocks + (super * kSuper * parts + part * count) * block_bytes(kValues);
          for (int b = 0; b < count; ++b, data += block_bytes(kValues), sum += kLanes * kMany) {
            many_block<Isa, kValues>(data, tables, sum);
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {  // row after row of 16 tokens: few places are written at a time
        const float* sum = sums + v * kLanes;
        for (int64_t row = start * kSuper * kLanes; row < op.rows && row < stop * kSuper * kLanes; row += kLanes) {
          alignas(64) float by_token[kLanes * kLanes];
          Isa::by_token(sum, kMany, by_token);
          write_outputs(op, by_token, row, token + v * kLanes, kLanes);
          sum += kLanes * kMany;
        }
      }
    }
  }
  return whole;
}

}  // namespace
}  // namespace sparse24
