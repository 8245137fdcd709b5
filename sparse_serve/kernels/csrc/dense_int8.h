// A dense int8 weight, as dense_int8.cpp keeps it, and inputs of 16 bits.
#pragma once
#include "layout.h"

namespace sparse24::dense_int8 {

// Sums of 255 times 128 are whole numbers of 32 bits up to here.
constexpr int64_t kMostColumns = 1 << 16;

// Inputs as digits, with what is needed to make numbers of their sums; of each token `digit_bytes`, two and one. For
// `tiles` digits lie as AMX wants them, for so many tokens that they are a multiple of 16.
struct Digits {
  int8_t* digits;
  int32_t* offset;
  float* step;
  bool tiles = false;
};

inline int64_t quads(int64_t columns) { return ceil_div(columns, 4); }
inline int64_t weight_bytes(int64_t rows, int64_t columns) { return row_blocks(rows) * quads(columns) * 4 * kLanes; }
inline int64_t digit_bytes(int64_t columns) { return quads(columns) * 8; }  // of a token

// Whether AMX is the faster one for the layer and so many tokens, where the processor has it.
inline bool suits_tiles(int64_t tokens, int64_t columns) { return tokens > 3 && columns % 64 == 0; }

// Blocks [first, last) of 16 rows, from codes [rows, columns]; `blocks` is for all.
void pack(const int8_t* codes, int64_t rows, int64_t columns, uint8_t* blocks, int64_t first, int64_t last);

// All tokens. Where an input is not finite the step is NaN, which all outputs of the token show.
void split_tokens(const Linear&, const Digits& out);

// Blocks [first, last) of 16 rows of y, on the calling thread. Of `Linear`, blocks are this file's, and values are not read.
void run(const Linear&, const Digits&, int64_t first, int64_t last);

}  // namespace sparse24::dense_int8
