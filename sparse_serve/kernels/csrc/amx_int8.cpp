// AMX with int8 activations: 16 tokens by 16 rows by 64 columns with one instruction. As in amx.cpp the weight is made
// dense a few blocks at a time, in the nearest cache, here as bytes:
//
//     for each 512 tokens, for each group of superblocks:
//         for so many columns that the tokens' codes stay in a cache:
//             for each panel of 2 blocks (up to 64 tokens: of 1) by 512 columns:
//                 for each 32 tokens, for all columns that share a scale of inputs (int4 values: for each 128):
//                     for each 64 columns:      products; and a part of the next panel is made dense
//                     the sums of codes before these, scaled, onto float32 sums
//
// Sums of codes are whole numbers and exact, so what is added in float32, and in which order, is what rounded.h adds:
// the results are the same, bit by bit.
#include "isa.h"
#if SPARSE24_AMX
#include <immintrin.h>

#include <algorithm>
#include <memory>

#include "layout.h"  // before the pragma: what it declares is for every processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx2,fma")
#endif
#include "panels.h"
#include "write_tiles.h"

namespace sparse24 {
namespace {

constexpr int kByteSteps = kColumns / 64;               // tiles side by side in a block
constexpr int kBlockBytes = kByteSteps * kTileBytes;    // of a block made dense
constexpr int kTile = kLanes * kLanes;                  // numbers of a tile of sums
constexpr int kBlocks = 2, kParts = kMostShared;        // of a panel: two panels share the L1 cache with codes
constexpr int kFew = 4;                                 // tiles of tokens, for which panels of one block are faster
constexpr int kPair = 2;                                // tiles of tokens that are multiplied together
constexpr int kInputBytes = 256 << 10;                  // codes, read again for each panel: they and the sums share L2

static_assert(kBlocks * kParts <= kMostBlocks);
// No scale of inputs is shared by two panels, as panels, and what is chosen of the columns, begin at multiples of kParts.
static_assert(kParts % kMostShared == 0);

struct Scratch {
  alignas(64) uint8_t weights[2][kBlocks * kParts * kBlockBytes];
  alignas(64) int32_t codes[2][kPair * kBlocks * kTile];  // [tile of tokens][block]
  alignas(64) float kept[kPair * kBlocks * kTile];        // int4: of columns before that share a scale of inputs
  alignas(64) float sums[kSumTiles * kTile];
};

// By code, for each of 4 columns which byte of the kept pair it is, the right one `kRight` bytes behind the left one;
// or `kNone`.
template <int kRight, int kNone>
struct ByteControls {
  alignas(64) uint32_t by_code[16];
  constexpr ByteControls() : by_code() {
    constexpr int kLefts[8] = {0, 0, 0, 1, 1, 2, 4, 4}, kRights[8] = {1, 2, 3, 2, 3, 3, 4, 4};
    for (int code = 0; code < 16; ++code) {
      for (int column = 0; column < 4; ++column) {
        const bool left = column == kLefts[code % 8], right = column == kRights[code % 8];
        by_code[code] |= static_cast<uint32_t>(left ? 0 : right ? kRight : kNone) << (8 * column);
      }
    }
  }
};
constexpr ByteControls<1, 0x20> kPairs;    // 16 pairs of bytes, then zeros
constexpr ByteControls<2, 0x80> kSpread;   // in each of 16 dwords bytes 0 and 2

// A block as tiles of bytes: of each 4 columns those of 16 rows. What lies `ahead` is asked for, as many bytes.
template <Values kValues>
__attribute__((noinline)) void expand_bytes(const uint8_t* block, uint8_t* out, const uint8_t* ahead) {
  constexpr bool kNibbles = kValues == Values::kInt4;
  const __m512i table = _mm512_load_si512(kNibbles ? kSpread.by_code : kPairs.by_code);
  const __m512i used = _mm512_set1_epi8(static_cast<char>(kNibbles ? 0x82 : 0x21));
  const __m512i places = _mm512_mullo_epi32(  // of each row's pair
      kNibbles ? _mm512_set4_epi32(12, 8, 4, 0)
               : _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
      _mm512_set1_epi32(0x01010101));
  for (int line = 0; line < block_bytes(kValues); line += 64) __builtin_prefetch(ahead + line, 0, 2);
  const uint8_t* values = block + kCodeBytes;
  for (int quarter = 0; quarter < kGroups / 8; ++quarter) {
    __m512i codes = _mm512_loadu_si512(block + quarter * 64), four = codes;
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, out += 64) {
      const __m512i both = _mm512_permutexvar_epi32(codes, table);
      const __m512i control = _mm512_ternarylogic_epi32(both, used, places, 0xea);
      if constexpr (kNibbles) {
        if (g % 4 == 0) four = _mm512_loadu_si512(values), values += 64;
        const __m512i kept = _mm512_srai_epi16(_mm512_slli_epi16(four, 12 - g % 4 * 4), 12);  // bytes 0 and 2 count
        _mm512_store_si512(out, _mm512_shuffle_epi8(kept, control));
      } else {
        const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        _mm512_store_si512(out, _mm512_permutexvar_epi8(control, _mm512_zextsi256_si512(kept)));
        values += 32;
      }
      codes = _mm512_srli_epi32(codes, 4);
    }
  }
}

// Of kM tiles of tokens and kN blocks the sums of codes of `steps` times 64 columns. `between` is for other work after
// each of them, `before` for what is to be done before sums are stored.
template <int kM, int kN, class Between, class Before>
INLINE void multiply(const uint8_t* x, int64_t next_part, const uint8_t* w, int64_t next_block, int steps, int32_t* codes,
                     Between between, Before before) {
  each<kM * kN>([&](auto i) { zero_tile<i / kN * kBlocks + i % kN>(); });
  for (int s = 0; s < steps; ++s, w += kTileBytes) {
    const uint8_t* inputs = x + s / kByteSteps * next_part + s % kByteSteps * kTileBytes;
    each<kM>([&](auto m) {
      load_tile<4 + m>(inputs + m * kBlockBytes);
      each<kN>([&](auto n) {
        if constexpr (m == 0) load_tile<6 + n>(w + n * next_block);
        multiply_int8<m * kBlocks + n, 4 + m, 6 + n>();
      });
    });
    between();
  }
  before();
  each<kM * kN>([&](auto i) { store_tile<i / kN * kBlocks + i % kN>(codes + (i / kN * kBlocks + i % kN) * kTile); });
}

// Sums of codes of `tiles` tiles of tokens, of some columns, and where they belong.
struct Add {
  const int32_t* codes;
  const uint8_t* const* blocks;  // whose columns they are
  int tiles;
  bool opens, closes, first;  // columns that share a scale of inputs; of all such columns the first
  const float* of_token;
  float* sums;        // [block][token]
  int64_t sum_block;  // from one to the next
};

// Sums of codes, scaled, onto those of the columns before.
template <Values kValues, int kN>
INLINE void add_scaled(const Add& add, float* all_kept, int tokens) {
  __m512 of_row[kN];
  each<kN>([&](auto n) {
    if constexpr (kValues == Values::kInt4) {
      of_row[n] = _mm512_loadu_ps(add.blocks[n] + block_bytes(kValues) - kScaleBytes);
    }
  });
  for (int tile = 0; tile < add.tiles; ++tile) {
    const int32_t* codes = add.codes + tile * kBlocks * kTile;
    float *sums = add.sums + tile * kTile, *kept = all_kept + tile * kBlocks * kTile;
    const float* of_token = add.of_token + tile * kLanes;
#pragma GCC unroll 4
    for (int m = 0; m < tokens; ++m, codes += kLanes, sums += kLanes, kept += kLanes) {
      const __m512 scale = _mm512_set1_ps(of_token[m]);
#pragma GCC unroll 2
      for (int n = 0; n < kN; ++n) {
        __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(codes + n * kTile));
        if constexpr (kValues == Values::kInt4) {
          sum = _mm512_fmadd_ps(sum, of_row[n], add.opens ? _mm512_setzero_ps() : _mm512_load_ps(kept + n * kTile));
          if (!add.closes) {
            _mm512_store_ps(kept + n * kTile, sum);
            continue;
          }
        }
        float* to = sums + n * add.sum_block;
        _mm512_store_ps(to, _mm512_fmadd_ps(sum, scale, add.first ? _mm512_setzero_ps() : _mm512_load_ps(to)));
      }
    }
  }
}

// Products of a panel of kN blocks with `tiles` times 16 tokens from `token` on, into sums [block][token].
template <Values kValues, int kN, class Between>
INLINE void multiply_panel(const Linear& op, const Panel& panel, const uint8_t* weights, int64_t token, int tiles,
                           float* sums, Scratch& own, Between between) {
  const Rounded& inputs = op.rounded;
  const int rows = static_cast<int>(std::min<int64_t>(op.tokens, kLanes));  // of a tile of tokens
  const int together = kValues == Values::kInt4 ? 1 : static_cast<int>(inputs.shared);  // parts whose codes are summed
  const int64_t parts = column_blocks(op.columns), steps = ceil_div(panel.steps, 2);
  Add last{};
  for (int tile = 0; tile < tiles; tile += kPair) {
    const int count = std::min(kPair, tiles - tile);
    for (int p = 0; p < panel.parts; p += together) {
      const int64_t part = panel.part + p, end = part + together, first_token = token + tile * kLanes;
      const uint8_t *x = inputs.codes + (part * inputs.tokens + first_token) * kColumns, *w = weights + p * kBlockBytes;
      const int here = static_cast<int>(std::min<int64_t>(together * kByteSteps, steps - p * kByteSteps));
      int32_t* codes = last.codes == own.codes[0] ? own.codes[1] : own.codes[0];
      const auto add = [&] {
        if (last.codes) add_scaled<kValues, kN>(last, own.kept, rows);
      };
      const int64_t next_part = inputs.tokens * kColumns, next_block = panel.parts * kBlockBytes;
      if (count == kPair) multiply<kPair, kN>(x, next_part, w, next_block, here, codes, between, add);
      else multiply<1, kN>(x, next_part, w, next_block, here, codes, between, add);
      last = {codes, panel.data + p * kN, count, part % inputs.shared == 0, end % inputs.shared == 0 || end >= parts,
              part < inputs.shared, inputs.scale + part / inputs.shared * inputs.tokens + first_token,
              sums + tile * kTile, tiles * kTile};
    }
  }
  add_scaled<kValues, kN>(last, own.kept, rows);
}

// Of two vectors of 32-bit lanes the upper halves, by number.
struct UpperHalves {
  alignas(64) uint16_t of[32];
  constexpr UpperHalves() : of() {
    for (int i = 0; i < 32; ++i) of[i] = static_cast<uint16_t>(2 * i + 1);
  }
};
constexpr UpperHalves kUpperHalves;

// As to_bf16 of activations.h.
INLINE __m512i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_blend_epi32(none, up, _mm512_set1_epi32(0x7fc00000));
}

// Superblocks [first, last), few enough for the sums, for the tokens [token, token + 16 * tiles).
template <Values kValues>
void group(const Linear& op, int64_t first, int64_t last, int64_t token, int tiles, Scratch& own) {
  const int64_t parts = column_blocks(op.columns);
  const int64_t most = std::max<int64_t>(kInputBytes / (kBlockBytes * tiles) / kParts, 1) * kParts;
  for (int64_t begin = 0; begin < parts; begin += most) {
    const int64_t end = std::min(begin + most, parts);
    const int blocks = tiles <= kFew ? 1 : kBlocks;
    Walk walk{op, last, begin, end, first, begin, blocks, kParts, block_bytes(kValues), false};
    Panel panels[3];  // one is multiplied, the next made dense, the one after that asked for
    for (int i = 0; i < 3; ++i) walk.next(panels[i]);
    const auto make_dense = [&](const Panel& panel, const Panel& ahead, int turn, int i) {
      expand_bytes<kValues>(panel.data[i], own.weights[turn % 2] + panel.place[i] * kBlockBytes,
                            (i < ahead.count ? ahead : panel).data[i]);
    };
    for (int i = 0; i < panels[0].count; ++i) make_dense(panels[0], panels[1], 0, i);
    for (int turn = 0; panels[turn % 3].count; ++turn) {
      Panel &now = panels[turn % 3], &then = panels[(turn + 1) % 3], &later = panels[(turn + 2) % 3];
      float* sums = own.sums + ((now.super - first) * kSuper + now.block) * tiles * kTile;
      Even made(then.count, static_cast<int>(ceil_div(tiles, kPair) * ceil_div(now.steps, 2)));
      const auto between = [&] { made.some([&](int i) { make_dense(then, later, turn + 1, i); }); };
      const uint8_t* weights = own.weights[turn % 2];
      if (now.blocks == 2) multiply_panel<kValues, 2>(op, now, weights, token, tiles, sums, own, between);
      else multiply_panel<kValues, 1>(op, now, weights, token, tiles, sums, own, between);
      walk.next(now);
    }
  }
  const int64_t row = first * kSuper * kLanes, last_row = std::min(op.rows, last * kSuper * kLanes);
  if (op.kind == Floats::kBFloat16) {
    const __m512i upper = _mm512_load_si512(kUpperHalves.of);
    return write_tiles(op, own.sums, row, last_row, token, tiles, [&](__m512 low, __m512 high) {
      return _mm512_permutex2var_epi16(to_bf16(low), upper, to_bf16(high));
    });
  }
  const int tokens = static_cast<int>(std::min<int64_t>(op.tokens - token, tiles * kLanes));
  const float* sums = own.sums;
  for (int64_t at = row; at < last_row; at += kLanes, sums += tiles * kTile) write_outputs(op, sums, at, token, tokens);
}

template <Values kValues>
void run_values(const Linear& op, int64_t first, int64_t last) {
  static thread_local std::unique_ptr<Scratch> own;  // a stack may be smaller; given back with the thread
  if (!own) own.reset(new Scratch);                  // as it is: every byte is written before it is read
  const TileConfiguration configuration(static_cast<int>(std::min<int64_t>(op.tokens, kLanes)), 6);
  each_group(op, first, last, [&](int64_t start, int64_t stop, int64_t token, int tiles) {
    group<kValues>(op, start, stop, token, tiles, *own);
  });
}

}  // namespace

bool amx::takes_rounded(const Linear& op) { return op.tokens > 8; }

void amx::run_rounded(const Linear& op, int64_t first, int64_t last) {
  if (op.values == Values::kInt4) return run_values<Values::kInt4>(op, first, last);
  run_values<Values::kInt8>(op, first, last);
}

}  // namespace sparse24
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
