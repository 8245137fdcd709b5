// How the CPU kernel keeps a 2:4 weight [rows, columns] in memory, and what it is asked to compute. No torch here.
//
// A block holds 16 rows (one per lane of a vector of 32-bit lanes) of 128 columns (32 groups of 4):
//
//     codes     4 x 16 dwords      dword r of quarter q: 8 nibbles, one per group, the first in the lowest bits.
//                                  A nibble numbers the pair of columns kept: 01 02 03 12 13 23 = 0 1 2 3 4 5.
//     values    32 groups          of each, the two kept values of 16 rows:
//                                  16 bits:  16 dwords, the left value in the low half       64 bytes
//                                  float32:  16 left values, then 16 right values           128 bytes
//                                  int8:     16 times (left, right)                          32 bytes
//                                  int4:     of 4 groups 16 dwords, the left codes in the low half, the first group's
//                                            lowest, the right ones in the high half         64 bytes for 4 groups
//     scales    16 float32         int4 only: of each row, for the 64 kept values of the block
//
// Blocks lie in the order in which one token meets them: superblock of 8 blocks (128 rows), then 128 columns, then
// block. So a decode step is one sequential read of 0.5625 (16 bits), 0.3125 (int8) or 0.2031 (int4) of the dense bfloat16 bytes.
// What is missing at the ends is zero.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparse24 {

constexpr int kLanes = 16, kGroups = 32, kColumns = 4 * kGroups, kSuper = 8;
constexpr int kTokens = 16, kMany = 64;  // tokens of a tile, with rows in the lanes (linear.h) and with tokens (many_pairs.h)
constexpr int kCodeBytes = kGroups * kLanes / 2, kScaleBytes = kLanes * 4, kKept = 2 * kGroups;

// Of activations; and of values, which may be codes.
enum class Floats : int64_t { kBFloat16, kFloat32, kFloat16 };
enum class Values : int64_t { kBFloat16, kFloat32, kFloat16, kInt8, kInt4 };

constexpr int value_bytes(Values values) {  // of all but int4
  return values == Values::kFloat32 ? 4 : values == Values::kInt8 ? 1 : 2;
}
constexpr int together(Values values) { return values == Values::kInt4 ? 4 : 1; }  // groups that lie side by side,
constexpr int together_bytes(Values values) {                                      // and their bytes
  return values == Values::kInt4 ? 64 : kLanes * 2 * value_bytes(values);
}
constexpr int block_bytes(Values values) {
  const int scales = values == Values::kInt4 ? kScaleBytes : 0;
  return kCodeBytes + kGroups / together(values) * together_bytes(values) + scales;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t row_blocks(int64_t rows) { return ceil_div(rows, kLanes); }
constexpr int64_t superblocks(int64_t rows) { return ceil_div(rows, kLanes * kSuper); }
constexpr int64_t column_blocks(int64_t columns) { return ceil_div(columns, kColumns); }
constexpr int64_t tile_bytes(int64_t columns) { return column_blocks(columns) * kColumns * kLanes * 2; }  // of 16 tokens
inline int blocks_of(int64_t rows, int64_t superblock) {  // row blocks of a superblock
  const int64_t left = row_blocks(rows) - superblock * kSuper;
  return left < kSuper ? static_cast<int>(left) : kSuper;
}

// Prefetches the block that is kFar blocks on into the L2 cache, and the one that is kNear on into L1.
template <Values kValues, int kFar, int kNear>
inline __attribute__((always_inline)) void prefetch_blocks(const uint8_t* block) {
  constexpr int kBytes = block_bytes(kValues);
  for (int line = 0; line < kBytes; line += 64) {
    __builtin_prefetch(block + kFar * kBytes + line, 0, 2);
    __builtin_prefetch(block + kNear * kBytes + line);
  }
}

// Superblocks [first, last) of `blocks`, from values [rows, columns / 2] and a bitmask [rows, columns / 8] with two bits
// set in every four, the first column lowest. Columns are a multiple of 8. Of int4, values are [rows, columns / 4], and
// `scales` [rows, ...], each for so many kept values of a row.
struct Scales {
  const float* of = nullptr;
  int64_t each = 0;
};
void pack(const uint8_t* values, const uint8_t* bitmask, Values kind, int64_t rows, int64_t columns, uint8_t* blocks,
          int64_t first, int64_t last, Scales scales = {});

// Activations rounded to int8: of each 128 columns the codes [token][128], `zero` added to each, and of each `shared`
// times 128 a scale for each token. For tiles codes are of each 16 tokens [2][16 tokens][64 columns], and `tokens` is a
// multiple of 16, zeros at the end. No codes: they are not rounded.
struct Rounded {
  const uint8_t* codes = nullptr;
  const float* scale = nullptr;
  int64_t tokens = 0;
  bool tiles = false;
  int64_t shared = 1;
  int zero = 0;
};

// Where a code lies.
inline int64_t code_at(const Rounded& inputs, int64_t token, int64_t column) {
  const int64_t part = column / kColumns * inputs.tokens * kColumns, left = column % kColumns;
  if (!inputs.tiles) return part + token * kColumns + left;
  return part + token / kLanes * kLanes * kColumns + left / 64 * kLanes * 64 + token % kLanes * 64 + left % 64;
}

// Fewer scales are faster, as sums of whole numbers need none. From 512 columns on a token has four at least.
constexpr int64_t kMostShared = 4;
constexpr int64_t shared_by(int64_t columns) { return columns >= 4096 ? kMostShared : columns >= 1024 ? 2 : 1; }
constexpr int64_t input_scales(int64_t columns) { return ceil_div(columns, shared_by(columns) * kColumns); }

// y [tokens, rows] = x [tokens, columns] W^T (* scale [rows]) (+ bias [rows]); x, y and bias all of one kind.
struct Linear {
  const uint8_t* blocks;
  Values values;
  int64_t tokens, rows, columns;
  const void* x;
  void* y;
  const float* scale;  // of each row, or null
  const void* bias;    // or null
  Floats kind;
  const uint8_t* tiles = nullptr;  // x as amx::pack_tokens lays it out, or null
  Rounded rounded = {};
  bool prefetches = false;  // weights are prefetched with the fewest tokens, too: see gains_by_prefetch
};

// Superblocks [first, last) of it, on the calling thread.
using Run = void (*)(const Linear&, int64_t first, int64_t last);

namespace portable { void run(const Linear&, int64_t first, int64_t last); }
namespace avx2 { void run(const Linear&, int64_t first, int64_t last); }
namespace avx512 { void run(const Linear&, int64_t first, int64_t last); }

// With activations laid out as tiles before, by all threads; without them it is avx512's.
namespace amx {
bool takes(const Linear&);  // whether it has a way of its own for the layer, and for so many tokens
void pack_tokens(const Linear&, int64_t first, int64_t last, uint8_t* out);  // tokens from 16 * first on; out is for all
void run(const Linear&, int64_t first, int64_t last);

// The same for activations rounded before, and int8 or int4 values: what the others give, bit by bit.
bool takes_rounded(const Linear&);  // whether it is the faster one, for so many tokens
void run_rounded(const Linear&, int64_t first, int64_t last);
}  // namespace amx

// For activations rounded before, by all threads, and int8 or int4 values.
namespace vnni {
constexpr int kZero = 128;                                                                    // the code of 0
void round_tokens(const Linear&, int64_t first, int64_t last, uint8_t* codes, float* scale);  // tokens [first, last)
void run(const Linear&, int64_t first, int64_t last);
}  // namespace vnni
namespace avx2_int8 {
constexpr int zero_of(Values values) { return values == Values::kInt4 ? 128 : 0; }
void round_tokens(const Linear&, int64_t first, int64_t last, uint8_t* codes, float* scale);
void run(const Linear&, int64_t first, int64_t last);
}  // namespace avx2_int8

}  // namespace sparse24
