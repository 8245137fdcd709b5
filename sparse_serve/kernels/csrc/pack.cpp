// From the stored form to blocks. Once per layer, when a model is loaded.
#include "layout.h"

namespace sparse24 {
namespace {

constexpr uint8_t kCode[16] = {0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 0, 5, 0, 0, 0};  // by the bits of a group

// Both codes of a group of int4.
void place_nibbles(uint8_t* values, int lane, int group, uint32_t kept) {
  uint32_t word;
  uint8_t* at = values + (group / 4 * kLanes + lane) * 4;
  __builtin_memcpy(&word, at, 4);
  word |= ((kept & 15) | (kept >> 4) << 16) << (4 * (group % 4));
  __builtin_memcpy(at, &word, 4);
}

void place(uint8_t* block, Values kind, int lane, int group, int mask, const uint8_t* kept) {
  const int size = value_bytes(kind);
  uint32_t codes;
  uint8_t* word = block + (group / 8 * kLanes + lane) * 4;
  __builtin_memcpy(&codes, word, 4);
  codes |= static_cast<uint32_t>(kCode[mask & 15]) << (4 * (group % 8));
  __builtin_memcpy(word, &codes, 4);
  if (kind == Values::kInt4) return place_nibbles(block + kCodeBytes, lane, group, *kept);
  uint8_t* values = block + kCodeBytes + group * kLanes * 2 * size;
  const bool planes = kind == Values::kFloat32;  // all left values, then all right ones
  uint8_t* left = values + lane * (planes ? size : 2 * size);
  __builtin_memcpy(left, kept, size);
  __builtin_memcpy(left + (planes ? kLanes * size : size), kept + size, size);
}

}  // namespace

void pack(const uint8_t* values, const uint8_t* bitmask, Values kind, int64_t rows, int64_t columns, uint8_t* blocks,
          int64_t first, int64_t last, Scales scales) {
  const int64_t parts = column_blocks(columns), bytes = block_bytes(kind);
  const int64_t size = kind == Values::kInt4 ? 1 : 2 * value_bytes(kind);  // of a group
  for (int64_t super = first; super < last; ++super) {
    const int count = blocks_of(rows, super);
    uint8_t* start = blocks + super * kSuper * parts * bytes;
    __builtin_memset(start, 0, count * parts * bytes);
    for (int64_t row = super * kSuper * kLanes; row < rows && row < (super + 1) * kSuper * kLanes; ++row) {
      const int64_t block = row / kLanes - super * kSuper;
      for (int64_t group = 0; group < columns / 4; ++group) {
        const int mask = bitmask[row * (columns / 8) + group / 2] >> (4 * (group % 2));
        uint8_t* into = start + (group / kGroups * count + block) * bytes;
        place(into, kind, row % kLanes, group % kGroups, mask, values + (row * (columns / 4) + group) * size);
      }
      for (int64_t part = 0; kind == Values::kInt4 && part < parts; ++part) {
        const float* scale = scales.of + row * ceil_div(columns / 2, scales.each) + part * kKept / scales.each;
        uint8_t* block_start = start + (part * count + block) * bytes;
        __builtin_memcpy(block_start + bytes - kScaleBytes + row % kLanes * 4, scale, 4);
      }
    }
  }
}

}  // namespace sparse24
