// AMX with bfloat16: 16 tokens by 16 rows by 32 columns with one instruction. It multiplies dense tiles, so the weight
// is made dense a few blocks at a time, in the nearest cache, for all tokens of a group at once:
//
//     for each 512 tokens, for each group of superblocks:
//         for so many columns that the tokens' inputs stay in a cache:
//             for each panel of 4 blocks (panels.h):     for each 32 tokens, 4 sums in registers
//                 for each 32 columns:                   4 products of tiles; and in between, a part of the next panel
//                                                        is made dense, and of the one after that asked for
//
// Twice the products of avx512's, each at a sixteenth of the cost. Up to 32 tokens sums stay in registers over all
// columns, and a step takes about as long as reading the weight. Int4 values have a scale for each 128 columns of a row:
// tiles hold their codes, and sums of 128 columns are scaled, in float32, when they are added to those before.
//
// Sums are float32; a token's are added in the same order whatever its place. Subnormal numbers count as zero, in inputs,
// weights and sums, as in avx512's products.
#include "isa.h"
#if SPARSE24_AMX
#include <immintrin.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "layout.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif
#include "panels.h"
#include "write_tiles.h"

namespace sparse24 {
namespace {

// Up to so many tokens avx512 is faster, which prefetches weights. Two threads of a Xeon with AMX, 4096 x 4096, in another
// run than that of isa.h: bfloat16 values 0.71 ms for one token, 0.81 for four, in tiles 0.82 for five and as long for fewer; int8 0.47 for one,
// 0.54 for two, 0.79 for three, in tiles 0.6 for each; int4 0.31 for one, 0.41 for two, in tiles 0.44.
constexpr int64_t few_tokens(Values values) { return values == Values::kBFloat16 ? 4 : 2; }
constexpr int kPanel = 4;         // blocks of a panel: two panels share the L1 cache with inputs
constexpr int kInputTiles = 256;  // of 1 KiB, read again for each panel: they and the sums share the L2 cache

struct Scratch {
  alignas(64) uint8_t weights[2][kPanel * kBlockTiles];
  alignas(64) float sums[kSumTiles * kLanes * kLanes];
};

// Sums of kM times 16 tokens and of kN blocks, as many of 32 columns as there are `steps`.
template <int kM, int kN, class Between>
INLINE void multiply_steps(int steps, const uint8_t* w, int64_t w_block, const uint8_t* x, int64_t x_tile, Between between) {
  for (; steps; --steps, x += kTileBytes, w += kTileBytes) {
    each<kM>([&](auto m) { load_tile<4 + m>(x + m * x_tile); });
    each<kN>([&](auto n) {
      constexpr int kW = kM == 2 ? 6 + n : 5 + n % 3;
      load_tile<kW>(w + n * w_block);
      each<kM>([&](auto m) { multiply_tiles<m * kN + n, 4 + m, kW>(); });
    });
    between();
  }
}

// Sums of codes of 128 columns, scaled, onto those of the columns before. A tile of fewer tokens has fewer rows.
INLINE void add_scaled(const float* codes, const uint8_t* scales, bool first, int rows, float* sums) {
  const __m512 scale = _mm512_loadu_ps(scales);
#pragma GCC unroll 4
  for (int m = 0; m < rows; ++m, sums += kLanes) {
    const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(sums);
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(codes + m * kLanes), scale, before));
  }
}

// Products of a panel of kN blocks with kM times 16 tokens, whose inputs are `x_tile` bytes apart.
template <Values kValues, int kM, int kN, class Between>
INLINE void multiply(const Panel& panel, const uint8_t* w, const uint8_t* x, int64_t x_tile, float* sums,
                     int64_t sum_block, int rows, Between between) {
  constexpr int kTile = kLanes * kLanes;
  const int64_t w_block = panel.parts * kBlockTiles;
  if constexpr (kValues == Values::kInt4) {
    alignas(64) float codes[kM * kN * kTile];
    for (int p = 0, steps = panel.steps; p < panel.parts; ++p, steps -= kSteps, w += kBlockTiles, x += kBlockTiles) {
      each<kM * kN>([&](auto i) { zero_tile<i>(); });
      multiply_steps<kM, kN>(std::min(steps, kSteps), w, w_block, x, x_tile, between);
      each<kM * kN>([&](auto i) { store_tile<i>(codes + i * kTile); });
      each<kM * kN>([&](auto i) {
        const uint8_t* scales = panel.data[p * kN + i % kN] + block_bytes(kValues) - kScaleBytes;
        add_scaled(codes + i * kTile, scales, panel.part + p == 0, rows, sums + i % kN * sum_block + i / kN * kTile);
      });
    }
    return;
  }
  if (panel.opens) {
    each<kM * kN>([&](auto i) {
      if (panel.part == 0) zero_tile<i>();
      else load_tile<i>(sums + i % kN * sum_block + i / kN * kTile);
    });
  }
  multiply_steps<kM, kN>(panel.steps, w, w_block, x, x_tile, between);
  if (panel.closes) each<kM * kN>([&](auto i) { store_tile<i>(sums + i % kN * sum_block + i / kN * kTile); });
}

// Products of a panel with `tiles` times 16 tokens, into sums [block][16 tokens].
template <Values kValues, class Between>
void multiply_panel(const Panel& panel, const uint8_t* w, const uint8_t* x, int64_t x_tile, int tiles, float* sums,
                    int rows, Between between) {
  x += panel.part * kBlockTiles;
  for (int m = 0; m < tiles; m += 2, x += 2 * x_tile, sums += 2 * kLanes * kLanes) {
#define MULTIPLY(m, n) multiply<kValues, m, n>(panel, w, x, x_tile, sums, tiles * kLanes * kLanes, rows, between)
    if (m + 1 < tiles) {
      if (panel.blocks == 2) MULTIPLY(2, 2);
      else MULTIPLY(2, 1);
    } else {
      if (panel.blocks == 4) MULTIPLY(1, 4);
      else if (panel.blocks == 3) MULTIPLY(1, 3);
      else if (panel.blocks == 2) MULTIPLY(1, 2);
      else MULTIPLY(1, 1);
    }
#undef MULTIPLY
  }
}

// Superblocks [first, last), few enough for the sums, for the tokens [token, token + 16 * tiles).
template <Values kValues>
void group(const Linear& op, int64_t first, int64_t last, int64_t token, int tiles, Scratch& own) {
  const int64_t parts = column_blocks(op.columns), x_tile = tile_bytes(op.columns);
  const int64_t most = kInputTiles / (kSteps * tiles);
  const uint8_t* x = op.tiles + token / kLanes * x_tile;
  const int rows = static_cast<int>(std::min<int64_t>(op.tokens, kLanes));  // of a tile of tokens
  for (int64_t begin = 0; begin < parts; begin += most) {
    const int64_t end = std::min(begin + most, parts);
    const int blocks = tiles == 1 ? kPanel : kPanel / 2;
    Walk walk{op, last, begin, end, first, begin, blocks, kPanel / blocks, block_bytes(kValues), tiles <= 2};
    Panel panels[3];  // one is multiplied, the next made dense, the one after that asked for
    for (int i = 0; i < 3; ++i) walk.next(panels[i]);
    const auto make_dense = [&](const Panel& panel, const Panel& ahead, int turn, int i) {
      expand<kValues>(panel.data[i], own.weights[turn % 2] + panel.place[i] * kBlockTiles,
                      (i < ahead.count ? ahead : panel).data[i]);
    };
    for (int i = 0; i < panels[0].count; ++i) make_dense(panels[0], panels[1], 0, i);
    for (int turn = 0; panels[turn % 3].count; ++turn) {
      Panel &now = panels[turn % 3], &then = panels[(turn + 1) % 3], &later = panels[(turn + 2) % 3];
      float* sums = own.sums + ((now.super - first) * kSuper + now.block) * tiles * kLanes * kLanes;
      Even made(then.count, (tiles + 1) / 2 * now.steps);
      multiply_panel<kValues>(now, own.weights[turn % 2], x, x_tile, tiles, sums, rows, [&] {
        made.some([&](int i) { make_dense(then, later, turn + 1, i); });
      });
      walk.next(now);
    }
  }
  write_tiles(op, own.sums, first * kSuper * kLanes, std::min(op.rows, last * kSuper * kLanes), token, tiles,
              [](__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); });
}

template <Values kValues>
void run_tiles(const Linear& op, int64_t first, int64_t last) {
  static thread_local std::unique_ptr<Scratch> own;  // a stack may be smaller; given back with the thread
  if (!own) own.reset(new Scratch);                  // as it is: every byte is written before it is read
  const TileConfiguration configuration(static_cast<int>(std::min<int64_t>(op.tokens, kLanes)), 5);  // fewer rows to load
  each_group(op, first, last, [&](int64_t start, int64_t stop, int64_t token, int tiles) {
    group<kValues>(op, start, stop, token, tiles, *own);
  });
}

}  // namespace

bool amx::takes(const Linear& op) {
  if (op.kind != Floats::kBFloat16) return false;
  const bool in_bfloat16 = op.values != Values::kFloat32 && op.values != Values::kFloat16;  // without loss
  return in_bfloat16 && op.tokens > few_tokens(op.values);
}

void amx::pack_tokens(const Linear& op, int64_t first, int64_t last, uint8_t* out) {
  const uint16_t* x = static_cast<const uint16_t*>(op.x);
  out += first * tile_bytes(op.columns);
  for (int64_t token = first * kLanes; token < last * kLanes; token += kLanes) {
    for (int64_t column = 0; column < op.columns; column += kColumns, out += kBlockTiles) {
      const int64_t left = op.columns - column;
      for (int m = 0; m < kLanes; ++m) {
        const uint16_t* from = x + (token + m) * op.columns + column;
        alignas(64) uint16_t padded[kColumns];
        if (token + m >= op.tokens || left < kColumns) {
          __builtin_memset(padded, 0, sizeof(padded));
          if (token + m < op.tokens) __builtin_memcpy(padded, from, std::min<int64_t>(left, kColumns) * 2);
          from = padded;
        }
        for (int step = 0; step < kSteps; ++step) {
          _mm512_store_si512(out + step * kTileBytes + m * 64, _mm512_loadu_si512(from + step * 32));
        }
      }
    }
  }
}

void amx::run(const Linear& op, int64_t first, int64_t last) {
  if (!op.tiles) return avx512::run(op, first, last);
  if (op.values == Values::kBFloat16) return run_tiles<Values::kBFloat16>(op, first, last);
  if (op.values == Values::kInt4) return run_tiles<Values::kInt4>(op, first, last);
  run_tiles<Values::kInt8>(op, first, last);
}

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
