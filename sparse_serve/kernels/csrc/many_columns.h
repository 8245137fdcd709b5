// Many tokens (many.h) in float32: of x there is a table of columns, each of 32 tokens, and a code is two addresses. It
// makes the products of linear.h's Exact in the same order.
//
// A sum has to wait for its last product, so those of two rows are made in turn. The table is 16 KiB, half of the
// nearest cache; the values of a block are made float32 once, for all tokens.
#pragma once
#include "kept.h"
#include "many.h"

namespace sparse24 {
namespace {

// From a code to where its columns begin in the table, in bytes: the left one in the low half, the right one in the high.
template <int kColumnBytes>
struct ColumnPairs {
  uint32_t at[8] = {};
  constexpr ColumnPairs() {
    constexpr int kPair[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
    for (int code = 0; code < 6; ++code) at[code] = (kPair[code][0] | kPair[code][1] << 16) * kColumnBytes;
  }
};

template <class Isa, Values kValues>
struct ManyColumns {
  static constexpr int kTile = 32, kBlockBytes = block_bytes(kValues);
  static constexpr int kColumnBytes = kTile * 4, kTables = kColumns * kColumnBytes;
  static constexpr int kVectors = kTile / Isa::kRows, kTwo = 2;
  static constexpr ColumnPairs<kColumnBytes> kAddresses = {};
  using Lanes = typename Isa::Lanes;

  static bool takes(const Linear&) { return true; }

  // [column][token].
  static void tables(const Linear& op, int64_t token, int64_t column, uint8_t* out) {
    alignas(64) float x[Isa::kRows][kColumns];
    for (int v = 0; v < kVectors; ++v) {
      for (int m = 0; m < Isa::kRows; ++m) read_inputs(op, token + v * Isa::kRows + m, column, x[m]);
      for (int i = 0; i < kColumns; i += Isa::kRows) {
        Isa::transpose(x[0] + i, kColumns, reinterpret_cast<float*>(out + i * kColumnBytes) + v * Isa::kRows, kTile);
      }
    }
  }

  // 16 rows by 128 columns, of which there are so many: sums [row][token].
  static __attribute__((noinline)) void block(const uint8_t* data, const uint8_t* tables, float* sums, int64_t columns) {
    const int quarters = columns < kColumns ? static_cast<int>(ceil_div(columns, kColumns / 4)) : 4;
    constexpr bool kScaled = kValues == Values::kInt4;
    alignas(64) float kept[kGroups * 2 * kLanes];  // [group][left, right][row]
    widen(data + kCodeBytes, kept);
    const float* scales = reinterpret_cast<const float*>(data + kBlockBytes - kScaleBytes);
    for (int row = 0; row < kLanes; row += kTwo, sums += kTwo * kTile) {
      ask_for_next(data, row);
      Lanes acc[kTwo][kVectors];
#pragma GCC unroll 2
      for (int r = 0; r < kTwo; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = kScaled ? Isa::zero() : Isa::load(sums + r * kTile + v * Isa::kRows);
        }
      }
      const uint8_t* table = tables;
      const float* value = kept + row;
      for (int quarter = 0; quarter < quarters; ++quarter) {
        uint32_t codes[kTwo];
        __builtin_memcpy(codes, data + quarter * 64 + 4 * row, sizeof(codes));
#pragma GCC unroll 8
        for (int g = 0; g < 8; ++g, value += 2 * kLanes, table += 4 * kColumnBytes) {
#pragma GCC unroll 2
          for (int r = 0; r < kTwo; ++r) {
            const uint32_t columns = kAddresses.at[codes[r] >> (4 * g) & 7];
            products(acc[r], table + (columns & 0xffff), value[r]);
            products(acc[r], table + (columns >> 16), value[kLanes + r]);
          }
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < kTwo; ++r) {
        const Lanes scale = kScaled ? Isa::broadcast(scales[row + r]) : Isa::zero();
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* sum = sums + r * kTile + v * Isa::kRows;
          Isa::store(sum, kScaled ? Isa::multiply_add(acc[r][v], scale, Isa::load(sum)) : acc[r][v]);
        }
      }
    }
  }

 private:
  static INLINE void products(Lanes* acc, const uint8_t* inputs, float value) {
    const Lanes both = Isa::broadcast(value);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[v] = Isa::multiply_add_from(inputs + v * Isa::kRows * 4, both, acc[v]);
    }
  }

  // The part of the next block that falls to these rows of this one.
  static INLINE void ask_for_next(const uint8_t* data, int row) {
    constexpr int kLines = (kBlockBytes / 64 + kLanes / kTwo - 1) / (kLanes / kTwo);
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(data + kBlockBytes + (row / kTwo * kLines + line) * 64);
    }
  }

  static INLINE void widen(const uint8_t* values, float* kept) {
    constexpr int kTogether = together(kValues), kRowBytes = kValues == Values::kInt8 ? 2 : 4;
    for (int g = 0; g < kGroups; g += kTogether, values += together_bytes(kValues)) {
      for (int row = 0; row < kLanes; row += Isa::kRows) {
        Lanes nibbles = kValues == Values::kInt4 ? Isa::load(values + row * 4) : Isa::zero();
        for (int i = 0; i < kTogether; ++i, nibbles = Isa::next_nibbles(nibbles)) {
          Lanes left, right;
          kept_values<Isa, kValues>(values + row * kRowBytes, nibbles, left, right);
          float* to = kept + (g + i) * 2 * kLanes + row;
          Isa::store(to, left), Isa::store(to + kLanes, right);
        }
      }
    }
  }
};

}  // namespace
}  // namespace sparse24
