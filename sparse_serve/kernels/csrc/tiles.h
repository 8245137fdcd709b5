// AMX tiles: 8 registers of 16 rows of 64 bytes. Written as assembly that says which memory is read and written, which
// GCC 12's own functions do not.
#pragma once
#include <cstdint>
#include <utility>

#include "activations.h"

namespace sparse24 {
namespace {

constexpr int kTileBytes = 1024;

// For the numbers below kCount, each as a constant.
template <int kCount, class Do>
INLINE void each(Do run) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) __attribute__((always_inline)) {
    (run(std::integral_constant<int, kI>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// A tile of 16 rows of 64 bytes, one after another or `apart` bytes apart.
template <int kTile>
INLINE void load_tile(const void* from, int64_t apart = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(apart), "i"(kTile) : "memory");
}
template <int kTile>
INLINE void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(int64_t{64}), "i"(kTile) : "memory");
}
template <int kTile>
INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Sums [16 tokens][16 rows] += pairs of inputs [16 tokens][16] times pairs of weights [16][16 rows].
template <int kSums, int kInputs, int kWeights>
INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kInputs), "i"(kWeights));
}

// The same for int8 numbers, four to a lane: sums in int32.
template <int kSums, int kInputs, int kWeights>
INLINE void multiply_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kInputs), "i"(kWeights));
}

// The same for int8 inputs and uint8 weights.
template <int kSums, int kInputs, int kWeights>
INLINE void multiply_int8_uint8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kInputs), "i"(kWeights));
}

// Eight tiles while it lives: the first `own_tiles`, of sums and inputs, for `tokens`, the others whole. Then as the thread
// had them, for libraries that configure theirs once.
class TileConfiguration {
  struct alignas(64) Layout {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Layout before_;

 public:
  TileConfiguration(int tokens, int own_tiles) {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Layout own;
    own.palette = 1;
    for (int i = 0; i < 8; ++i) own.bytes[i] = 64, own.rows[i] = static_cast<uint8_t>(i < own_tiles ? tokens : 16);
    asm volatile("ldtilecfg %0" : : "m"(own));
  }
  ~TileConfiguration() {
    if (before_.palette) asm volatile("ldtilecfg %0" : : "m"(before_));
    else asm volatile("tilerelease");
  }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;
};

}  // namespace
}  // namespace sparse24
