// How threads share a linear layer. A unit of work is a superblock of rows for a tile of tokens; units are numbered tile
// by tile, and a thread gets a range of them, of about as much work as any other's.
#pragma once
#include <algorithm>

#include "layout.h"

namespace sparse24 {

// What a unit of some tokens costs. Reading its weights takes as long as the products of 8 tokens, so a tile of fewer is
// no cheaper. For AMX, reading them and making them dense takes as long as the products of some 48. With
// rounded inputs it takes as long as those of some 4, which the least of 8 stands for.
inline int64_t work_of(const Linear& op, int64_t tokens) {
  constexpr int64_t kReading = 8, kExpanding = 48;
  return op.tiles || op.rounded.tiles ? kExpanding + tokens : std::max(kReading, tokens);
}

// With tiles, and with rounded inputs, weights are made ready for all tokens of a unit, so it has as many as let the
// longest share end soonest: all, if superblocks alone can be dealt out.
inline int64_t tile_of_most(const Linear& op, int64_t threads) {
  const int64_t supers = superblocks(op.rows), most = std::min(ceil_div(op.tokens, kLanes), 2 * threads);
  int64_t best = op.tokens, least = INT64_MAX;
  for (int64_t count = 1; count <= most; ++count) {
    const int64_t tile = ceil_div(ceil_div(op.tokens, count), kLanes) * kLanes;
    const int64_t longest = ceil_div(count * supers, threads) * work_of(op, tile);
    if (longest < least) best = tile, least = longest;
  }
  return best;
}

// A tile of 64 tokens is what many_pairs.h wants, and two of many_columns.h's. Each thread makes tables of x for many
// rows, and reads the weights for its own tiles, which so many tokens pay for. Few tokens are one tile, so that weights
// are read once, unless superblocks alone cannot be dealt out within 5 %. Shares differ by a unit at most, so there have
// to be some for each.
inline int64_t tile_of(const Linear& op, int64_t threads) {
  constexpr int64_t kSome = 32, kUnits = 8;
  const int64_t tokens = op.tokens, rows = op.rows;
  if (op.tiles || op.rounded.codes) return tile_of_most(op, threads);
  const int64_t supers = superblocks(rows), most = ceil_div(supers, threads) * kSuper * threads;
  for (int64_t tile : {int64_t{kMany}, kSome}) {
    if (tokens >= 2 * kMany && ceil_div(tokens, tile) * supers >= kUnits * threads) return tile;
  }
  return tokens < kSome || most * 20 <= row_blocks(rows) * 21 ? tokens : kTokens;
}

// Of all units before `unit`, in row blocks times tokens.
inline int64_t work_before(const Linear& op, int64_t tile, int64_t unit) {
  const int64_t supers = superblocks(op.rows), blocks = row_blocks(op.rows), left = op.tokens % tile;
  const int64_t before = unit / supers, whole = std::min(before, op.tokens / tile);
  const int64_t done = whole * work_of(op, tile) + (before - whole) * work_of(op, left);
  return done * blocks + work_of(op, whole < op.tokens / tile ? tile : left) * std::min(unit % supers * kSuper, blocks);
}

// The first unit of a share.
inline int64_t unit_of(const Linear& op, int64_t tile, int64_t share, int64_t shares) {
  const int64_t units = ceil_div(op.tokens, tile) * superblocks(op.rows), all = work_before(op, tile, units);
  int64_t low = 0, high = units;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work_before(op, tile, middle) * shares < all * share) low = middle + 1;
    else high = middle;
  }
  return low;
}

inline Linear tokens_of(Linear op, int64_t first, int64_t count) {
  const int64_t bytes = op.kind == Floats::kFloat32 ? 4 : 2;
  op.x = static_cast<const uint8_t*>(op.x) + first * op.columns * bytes;
  op.y = static_cast<uint8_t*>(op.y) + first * op.rows * bytes;
  if (op.tiles) op.tiles += first / kLanes * tile_bytes(op.columns);
  if (op.rounded.codes) op.rounded.codes += first * kColumns, op.rounded.scale += first;
  op.tokens = std::min(count, op.tokens - first);
  return op;
}

// Shares [first, last) of them, on the calling thread; whole tiles at once.
inline void run_shares(Run run, const Linear& op, int64_t tile, int64_t first, int64_t last, int64_t shares) {
  const int64_t supers = superblocks(op.rows), stop = unit_of(op, tile, last, shares);
  for (int64_t unit = unit_of(op, tile, first, shares); unit < stop;) {
    const int64_t start = unit % supers, tiles = start ? 0 : (stop - unit) / supers;
    const int64_t end = tiles ? supers : std::min(supers, start + stop - unit);
    run(tokens_of(op, unit / supers * tile, std::max<int64_t>(tiles, 1) * tile), start, end);
    unit += std::max<int64_t>(tiles, 1) * (end - start);
  }
}

}  // namespace sparse24
