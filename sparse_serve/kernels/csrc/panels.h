// 2:4 blocks made dense, as tiles of weights, a few at a time.
//
// A tile holds 32 columns of 16 rows of the weight: for each 2 columns 16 pairs, one for each row. A block of layout.h
// has the kept pairs of 16 rows side by side too, for each 4 columns; two byte shuffles make of them what a tile has for
// those columns, by controls that are looked up by the codes. The weight itself stays as it is.
#pragma once
#include "activations.h"
#include "tiles.h"

namespace sparse24 {
namespace {

constexpr int kSteps = kColumns / 32;             // tiles side by side in a block
constexpr int kBlockTiles = kSteps * kTileBytes;  // bytes of a block made dense; and of 16 tokens of 128 columns
constexpr int kMostBlocks = 8;                    // of a panel
constexpr int kMostTokens = 512;                  // of a group
constexpr int kSumTiles = 512;                    // of 1 KiB, which a group has for sums

// By code, for each byte of the pair of columns 0 and 1 which byte of the kept pair it is: bits 0 and 1, or bit 7 if it
// is zero. Of columns 2 and 3 the same, in what a rotation to the left by 4 brings there.
constexpr uint32_t control(int code) {
  constexpr int kLeft[8] = {0, 0, 0, 1, 1, 2, 4, 4}, kRight[8] = {1, 2, 3, 2, 3, 3, 4, 4};
  uint32_t low = 0, high = 0;
  for (int column = 0; column < 4; ++column) {
    for (int byte = 0; byte < 2; ++byte) {
      const int kept = column == kLeft[code] ? byte : column == kRight[code] ? 2 + byte : 0x80;
      (column < 2 ? low : high) |= static_cast<uint32_t>(kept) << (16 * (column % 2) + 8 * byte);
    }
  }
  return low | high >> 4 | high << 28;
}

struct Controls {
  alignas(64) uint32_t by_code[16];
  constexpr Controls() : by_code() {
    for (int code = 0; code < 16; ++code) by_code[code] = control(code % 8);
  }
};
constexpr Controls kControls;

// The bfloat16 number of an int4 code, twice.
struct Numbers {
  alignas(64) uint16_t of[32];
  constexpr Numbers() : of() {
    constexpr uint16_t kOf[16] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,   // 0 to 7
                                  0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};  // -8 to -1
    for (int i = 0; i < 32; ++i) of[i] = kOf[i % 16];
  }
};
constexpr Numbers kNumbers;

// A block as tiles of weights: of each 2 columns the values of 16 rows. What lies `ahead` is asked for, as many bytes.
template <Values kValues>
__attribute__((noinline)) void expand(const uint8_t* block, uint8_t* out, const uint8_t* ahead) {
  constexpr int kValueBytes = together_bytes(kValues) / together(kValues);
  const __m512i numbers = _mm512_load_si512(kNumbers.of), table = _mm512_load_si512(kControls.by_code);
  const __m512i place = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const __m512i used = _mm512_set1_epi8(static_cast<char>(0x83));
  const uint8_t *values = block + kCodeBytes, *values_ahead = ahead + kCodeBytes;
  for (int step = 0; step < kSteps; ++step) {
    __m512i codes = _mm512_loadu_si512(block + step * 64), nibbles = codes;
    __builtin_prefetch(ahead + step * 64, 0, 2);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      if (g * kValueBytes % 64 == 0) __builtin_prefetch(values_ahead + g * kValueBytes, 0, 2);
      __m512i kept;
      if constexpr (kValues == Values::kInt4) {
        if (g % 4 == 0) nibbles = _mm512_loadu_si512(values + g / 4 * 64);
        kept = _mm512_permutexvar_epi16(nibbles, numbers);  // 5 bits count, and both halves of the table are the same
        nibbles = _mm512_srli_epi16(nibbles, 4);
      } else if constexpr (kValues == Values::kBFloat16) {
        kept = _mm512_loadu_si512(values + g * kValueBytes);
      } else {
        const __m128i* halves = reinterpret_cast<const __m128i*>(values + g * kValueBytes);
        const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves));
        const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1));
        kept = (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
      }
      const __m512i both = _mm512_permutexvar_epi32(codes, table);
      const __m512i low = _mm512_ternarylogic_epi32(both, used, place, 0xea);
      const __m512i high = _mm512_ternarylogic_epi32(_mm512_rol_epi32(both, 4), used, place, 0xea);
      _mm512_store_si512(out + 2 * g * 64, _mm512_shuffle_epi8(kept, low));
      _mm512_store_si512(out + (2 * g + 1) * 64, _mm512_shuffle_epi8(kept, high));
      codes = _mm512_srli_epi32(codes, 4);
    }
    values += 8 * kValueBytes, values_ahead += 8 * kValueBytes, out += kTileBytes;
  }
}

// Blocks that are made dense together: `blocks` one below another, of `parts` times 128 columns.
struct Panel {
  int64_t super, part;
  int block, blocks, parts, count, steps;
  bool opens, closes;                // its sums, which stay in tiles from one to the other
  const uint8_t* data[kMostBlocks];  // [part][block]
  int place[kMostBlocks];            // made dense: [block][part]
};

// Panels of superblocks [super, last) for the parts [begin, end), in the order in which a thread meets them: all parts
// of some blocks, then the next blocks.
struct Walk {
  const Linear& op;
  int64_t last, begin, end, super, part;
  int blocks, parts, bytes;
  bool stay;  // sums stay in tiles
  int block = 0;

  // The next one; of no blocks after the last.
  __attribute__((noinline)) void next(Panel& panel) {
    panel.count = 0;
    if (super >= last) return;
    const int count = blocks_of(op.rows, super);
    panel.super = super, panel.part = part, panel.block = block;
    panel.blocks = std::min(count - block, blocks);
    panel.parts = static_cast<int>(std::min<int64_t>(end - part, parts));
    panel.steps = static_cast<int>(std::min<int64_t>(panel.parts * kSteps, ceil_div(op.columns, 32) - part * kSteps));
    panel.opens = !stay || part == begin, panel.closes = !stay || part + parts >= end;
    const uint8_t* data = op.blocks + (super * kSuper * column_blocks(op.columns) + part * count + block) * bytes;
    for (int p = 0; p < panel.parts; ++p, data += count * bytes) {
      for (int b = 0; b < panel.blocks; ++b, ++panel.count) {
        panel.data[panel.count] = data + b * bytes;
        panel.place[panel.count] = b * panel.parts + p;
      }
    }
    part += parts;
    if (part >= end) part = begin, block += blocks;
    if (block >= count) block = 0, ++super;
  }
};

// Deals out `all` things over `calls`.
struct Even {
  int all, calls, credit = 0, done = 0;
  Even(int all, int calls) : all(all), calls(calls) {}
  template <class Do>
  INLINE void some(Do run) {
    for (credit += all; credit >= calls; credit -= calls) run(done++);
  }
};

// Superblocks [first, last) and all tokens in groups: so many tokens, and so many superblocks that their sums have room.
template <class Run>
INLINE void each_group(const Linear& op, int64_t first, int64_t last, Run run) {
  const int64_t groups = ceil_div(op.tokens, kMostTokens);
  const int64_t even = ceil_div(ceil_div(op.tokens, groups), kLanes) * kLanes;
  const int64_t supers = kSumTiles / (even / kLanes) / kSuper;
  for (int64_t token = 0; token < op.tokens; token += even) {
    const int tiles = static_cast<int>(ceil_div(std::min(even, op.tokens - token), kLanes));
    for (int64_t start = first; start < last; start += supers) {
      run(start, std::min(start + supers, last), token, tiles);
    }
  }
}

}  // namespace
}  // namespace sparse24
