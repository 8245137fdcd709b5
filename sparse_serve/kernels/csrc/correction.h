// A correction y + S (X x) beside a sparse layer, all in bfloat16. No torch here.
//
// Layers that are fused have an X each, of `inner` rows, and a part's outputs see the part's X x only. Weights of both
// products lie as blocks of 16 rows, the last one of each part filled up with zeros: of a block, for every two columns 16
// dwords, one for each row, the left column in the low half. Those of S are followed by so many zeros that a tile of 16
// dwords in a row may begin at any block.
#pragma once
#include "layout.h"

namespace sparse24::correction {

struct Correction {
  int64_t tokens, columns, inner, rows;  // inner: rows of X of a part; rows: outputs of all parts
  const int64_t* rows_of;                // outputs of each part
  int64_t parts;
  const uint16_t *x, *pool, *out, *y;  // pool: the blocks of X; out: those of S
  uint16_t *z, *sum;                   // z: X x, [token][part][inner_apart], zero before
  bool tiles = false;                  // with AMX
};

constexpr int64_t kTilePairs = 16;

inline int64_t pairs(int64_t columns) { return ceil_div(columns, 2); }
inline int64_t inner_apart(int64_t inner) { return ceil_div(pairs(inner), kTilePairs) * kTilePairs * 2; }
inline int64_t z_numbers(const Correction& op) { return op.tokens * op.parts * inner_apart(op.inner); }
inline int64_t pool_blocks(const Correction& op) { return op.parts * row_blocks(op.inner); }
inline int64_t out_blocks(const Correction& op) {
  int64_t count = 0;
  for (int64_t part = 0; part < op.parts; ++part) count += row_blocks(op.rows_of[part]);
  return count;
}
inline int64_t out_numbers(const Correction& op) {
  return ((out_blocks(op) - 1) * pairs(op.inner) + inner_apart(op.inner) / 2) * 2 * kLanes;
}

// Whether AMX is the faster one for the layer and so many tokens, where the processor has it.
inline bool suits_tiles(const Correction& op) { return op.tokens > 4 && op.columns % (2 * kTilePairs) == 0; }

// Units of work are some blocks for some tokens.
inline int64_t unit_tokens(const Correction& op) { return op.tiles ? 16 : 4; }
constexpr int64_t kUnitBlocks = 4;
inline int64_t units(const Correction& op, int64_t blocks) {
  return ceil_div(op.tokens, unit_tokens(op)) * ceil_div(blocks, kUnitBlocks);
}

// Units [first, last) of z = X x, of which there are `units(op, pool_blocks(op))`, on the calling thread; and those of
// y + S z, `units(op, out_blocks(op))`.
void multiply_inner(const Correction&, int64_t first, int64_t last);
void add_outer(const Correction&, int64_t first, int64_t last);

}  // namespace sparse24::correction
