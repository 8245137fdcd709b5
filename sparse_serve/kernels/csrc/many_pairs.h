// Many tokens (many.h) by products of pairs: of each 4 columns of x there is a table of the 6 pairs of bfloat16, each of
// 64 tokens, and a code is the address of the pair to multiply by the two values: 4 products, of 16 tokens each.
//
// Tables are built once for all rows of a group of superblocks (48 KiB; the sums are 256 KiB), which pays from 64 tokens
// on; bfloat16 values have to make up over many columns for changing rows and tokens round, while int8 and int4 values
// are widened for 64 tokens at once.
#pragma once
#include "many.h"

namespace sparse24 {
namespace {

constexpr int kLong = 1024;                    // columns
constexpr int kVectors = kMany / kLanes, kPairs = 6;
constexpr int kEntry = kMany * 4;              // bytes of one pair of columns, for all tokens

template <class Isa, Values kValues>
struct ManyPairs {
  static constexpr int kTile = kMany, kBlockBytes = block_bytes(kValues);
  static constexpr int kTables = (kGroups * kPairs + 2) * kEntry;  // a code may say 7, were memory damaged

  static bool takes(const Linear& op) { return kValues != Values::kBFloat16 || op.columns >= kLong; }

  // Entries of 128 columns, [group][pair][token].
  static void tables(const Linear& op, int64_t token, int64_t column, uint8_t* out) {
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
  static __attribute__((noinline)) void block(const uint8_t* data, const uint8_t* tables, float* sums, int64_t) {
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
};

}  // namespace
}  // namespace sparse24
