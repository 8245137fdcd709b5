// The loop for activations rounded to int8, written once for every instruction set, and the rounding itself.
//
//     for each superblock, for each tile of tokens:
//         for each 128 columns, for each block of 16 rows:
//             make it ready                          values and controls, which say what inputs each row keeps
//             for some tokens at a time:             their sums of codes in registers
//
// For a few tokens what is made ready goes straight into their products.
//
// Inputs have a scale for each 128 to 512 columns, so an outlier costs only its neighbours digits. Codes of these are
// summed as whole numbers (of int4 values those of 128 columns, which are scaled by the weight's and summed in
// float32), and their sums in float32, always in the same order: every instruction set gives the same bits.
#pragma once
#include <algorithm>
#include <limits>
#include <memory>

#include "activations.h"

namespace sparse24 {
namespace {

constexpr int kTile = 128;          // tokens of a tile
constexpr int kFew = 3;             // tokens for which nothing is stored between
constexpr int kFar = 8, kNear = 4;  // blocks that are asked for, into L2 and into L1, before they are needed

// Where the sums of some tokens are, [token][row]: `all` scaled, and of the columns before that share a scale of inputs,
// `kept`: whole numbers, or scaled by the weight's. This block `opens` or `closes` such columns.
struct Sums {
  float* all;
  int32_t* kept;
  bool opens, closes;
  INLINE Sums after(int64_t tokens) const { return {all + tokens * kLanes, kept + tokens * kLanes, opens, closes}; }
};

template <class Block>
void multiply_all(const typename Block::Ready& ready, const uint8_t* codes, const float* scale, int tokens, Sums sums) {
  for (int count; tokens > 0; tokens -= count, codes += count * kColumns, scale += count, sums = sums.after(count)) {
#define COUNT(n)                                                                    \
  if (n <= Block::kMost && tokens >= (count = n)) {                                 \
    Block::template multiply<n <= Block::kMost ? n : 1>(ready, codes, scale, sums); \
    continue;                                                                       \
  }
    COUNT(24) COUNT(16) COUNT(12) COUNT(8) COUNT(4) COUNT(2) COUNT(1)
#undef COUNT
  }
}

// `Way<kValues>` makes a block ready, and multiplies it with a few tokens or with all of a tile.
template <template <Values> class Way, Values kValues>
void run_values(const Linear& op, int64_t first, int64_t last) {
  using Block = Way<kValues>;
  struct Scratch {
    alignas(64) float sums[kSuper][kTile * kLanes];
    alignas(64) int32_t kept[kSuper][kTile * kLanes];
    typename Block::Ready ready;
  };
  static thread_local std::unique_ptr<Scratch> own;  // a stack may be smaller; given back with the thread
  if (!own) own = std::make_unique<Scratch>();
  const int64_t parts = column_blocks(op.columns), shared = op.rounded.shared;
  for (int64_t super = first; super < last; ++super) {
    const int count = blocks_of(op.rows, super);
    for (int64_t token = 0; token < op.tokens; token += kTile) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTile, op.tokens - token));
      const uint8_t* data = op.blocks + super * kSuper * parts * block_bytes(kValues);
      for (int b = 0; b < count; ++b) __builtin_memset(own->sums[b], 0, tokens * kLanes * sizeof(float));
      for (int64_t part = 0; part < parts; ++part) {
        const uint8_t* codes = op.rounded.codes + (part * op.rounded.tokens + token) * kColumns;
        const float* scale = op.rounded.scale + part / shared * op.rounded.tokens + token;
        const bool opens = part % shared == 0, closes = (part + 1) % shared == 0 || part == parts - 1;
        for (int b = 0; b < count; ++b, data += block_bytes(kValues)) {
          const Sums sums{own->sums[b], own->kept[b], opens, closes};
          if (tokens <= kFew && op.prefetches) prefetch_blocks<kValues, kFar, kNear>(data);
          switch (tokens) {
            case 1: Block::template multiply_few<1>(data, codes, scale, sums); break;
            case 2: Block::template multiply_few<2>(data, codes, scale, sums); break;
            case kFew: Block::template multiply_few<kFew>(data, codes, scale, sums); break;
            default:
              prefetch_blocks<kValues, kFar, kNear>(data);
              Block::make_ready(data, own->ready);
              multiply_all<Block>(own->ready, codes, scale, tokens, sums);
          }
        }
      }
      for (int b = 0; b < count; ++b) write_outputs(op, own->sums[b], (super * kSuper + b) * kLanes, token, tokens);
    }
  }
}

// Of all columns of a token that share a scale the largest magnitude becomes 127. Where an input is not finite the scale
// is NaN, which all outputs of the token show; where all are next to nothing they count as zero.
template <class Isa>
void round_inputs(const Linear& op, int64_t first, int64_t last, uint8_t* codes, float* scale) {
  constexpr float kNothing = 1e-30f;
  const int64_t together = op.rounded.shared * kColumns;
  alignas(64) float x[kMostShared * kColumns];
  for (int64_t token = first; token < last; ++token) {
    for (int64_t column = 0; column < op.columns; column += together) {
      float& step = scale[column / together * op.rounded.tokens + token];
      const int count = static_cast<int>(ceil_div(std::min(op.columns - column, together), kColumns) * kColumns);
      auto most = Isa::none();  // magnitudes, as whole numbers: above infinity is what is not a number
      if (token < op.tokens) {
        for (int at = 0; at < count; at += kColumns) read_inputs(op, token, column + at, x + at);
      } else {  // what fills up a tile
        __builtin_memset(x, 0, sizeof(x));
      }
      for (int i = 0; i < count; i += Isa::kNumbers) most = Isa::larger(most, x + i);
      const float largest = of_bits(Isa::largest(most));
      const bool finite = largest <= std::numeric_limits<float>::max(), counts = finite && largest > kNothing;
      const float each = counts ? 127 / largest : 0;
      step = counts ? largest / 127 : finite ? 0 : std::numeric_limits<float>::quiet_NaN();
      if (!counts) __builtin_memset(x, 0, sizeof(x));  // infinity times zero would be no number
      for (int line = 0; line < count; line += 64) {
        uint8_t* to = codes + code_at(op.rounded, token, column + line);
        for (int i = 0; i < 64; i += Isa::kNumbers) Isa::round(x + line + i, each, op.rounded.zero, to + i);
      }
    }
  }
}

}  // namespace
}  // namespace sparse24
