// The loop for many tokens: tokens in the lanes, and the code of a group is an address.
//
//     for each group of superblocks, for each tile of tokens:
//         for each 128 columns:
//             tables of x                            once, for all rows of the group
//             for each row:                          its sums of all tokens in registers
//                 for each group of 4 columns:       inputs from where its code points to, times the two values
//
// With rows in the lanes (linear.h) every product costs a permute too, and both compete for the same execution ports.
// Here the load that fetches the operand does the selecting. Two kinds of tables and products: many_pairs.h has those of
// linear.h's Pairs, many_columns.h those of its Exact. The sums come out with rows and tokens changed round.
#pragma once
#include <memory>

#include "activations.h"

namespace sparse24 {
namespace {

constexpr int kManySupers = 8;  // superblocks of a group

// Superblocks [first, last) for as many tokens as fill whole tiles; returns how many. `Way` says whether it
// takes the layer, makes tables of x for its kTile tokens, and has the sums of a block, of which so many columns are
// left.
template <class Isa, class Way>
int64_t run_many(const Linear& op, int64_t first, int64_t last) {
  constexpr int kTile = Way::kTile;
  struct Scratch {
    alignas(64) float sums[kManySupers * kSuper * kLanes * kTile];
    alignas(64) uint8_t tables[Way::kTables];
  };
  static thread_local std::unique_ptr<Scratch> own;  // a stack may be smaller; given back with the thread
  const int64_t parts = column_blocks(op.columns), whole = op.tokens / kTile * kTile;
  if (!whole || !Way::takes(op)) return 0;
  if (!own) own = std::make_unique<Scratch>();
  float* sums = own->sums;
  uint8_t* tables = own->tables;
  for (int64_t start = first; start < last; start += kManySupers) {
    const int64_t stop = start + kManySupers < last ? start + kManySupers : last;
    for (int64_t token = 0; token < whole; token += kTile) {
      __builtin_memset(sums, 0, (stop - start) * kSuper * kLanes * kTile * sizeof(float));
      for (int64_t part = 0; part < parts; ++part) {
        Way::tables(op, token, part * kColumns, tables);
        const int64_t left = op.columns - part * kColumns;
        float* sum = sums;
        for (int64_t super = start; super < stop; ++super) {
          const int count = blocks_of(op.rows, super);
          const uint8_t* data = op.blocks + (super * kSuper * parts + part * count) * Way::kBlockBytes;
          for (int b = 0; b < count; ++b, data += Way::kBlockBytes, sum += kLanes * kTile) {
            Way::block(data, tables, sum, left);
          }
        }
      }
      for (int v = 0; v < kTile / kLanes; ++v) {  // row after row of 16 tokens: few places are written at a time
        const float* sum = sums + v * kLanes;
        for (int64_t row = start * kSuper * kLanes; row < op.rows && row < stop * kSuper * kLanes; row += kLanes) {
          alignas(64) float by_token[kLanes * kLanes];
          Isa::by_token(sum, kTile, by_token);
          write_outputs(op, by_token, row, token + v * kLanes, kLanes);
          sum += kLanes * kTile;
        }
      }
    }
  }
  return whole;
}

}  // namespace
}  // namespace sparse24
