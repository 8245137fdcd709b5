// What the loops of a linear layer read and write of its activations.
#pragma once
#include "layout.h"

#define INLINE inline __attribute__((always_inline))

namespace sparse24 {
namespace {  // every instruction set compiles a copy of its own

INLINE float of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

INLINE float from_bf16(uint16_t bits) { return of_bits(static_cast<uint32_t>(bits) << 16); }

INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float from_f16(uint16_t half) {
  constexpr uint32_t kRebias = 112u << 23;  // what float32 adds to an exponent
  const uint32_t magnitude = (half & 0x7fffu) << 13, exponent = magnitude & 0x0f800000;
  float value = of_bits(magnitude + kRebias);
  if (exponent == 0x0f800000) value = of_bits(magnitude + 2 * kRebias);                                   // not finite
  if (exponent == 0) value = of_bits(magnitude + kRebias + (1u << 23)) - of_bits(kRebias + (1u << 23));  // subnormal
  return half >> 15 ? -value : value;
}

INLINE uint16_t to_f16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits & 0x80000000u, size = bits ^ sign;
  uint32_t half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;  // ties to even
  if (size < 113u << 23) {                                                 // subnormal: the addition rounds
    const float rounded = of_bits(size) + 0.5f;
    __builtin_memcpy(&half, &rounded, 4);
    half -= 0x3f000000;
  }
  if (size >= 143u << 23) half = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  return static_cast<uint16_t>(half | sign >> 16);
}

// 128 inputs of one token as float32, zero beyond the last column.
INLINE void read_inputs(const Linear& op, int64_t token, int64_t column, float* out) {
  const int64_t left = op.columns - column, count = left < kColumns ? left : kColumns;
  const int64_t start = token * op.columns + column;
  const uint16_t* x = static_cast<const uint16_t*>(op.x) + start;
  if (op.kind == Floats::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(x[i]);
  } else if (op.kind == Floats::kFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_f16(x[i]);
  } else {
    __builtin_memcpy(out, static_cast<const float*>(op.x) + start, count * sizeof(float));
  }
  for (int64_t i = count; i < kColumns; ++i) out[i] = 0;
}

INLINE float at(const void* values, Floats kind, int64_t i) {
  if (kind == Floats::kFloat32) return static_cast<const float*>(values)[i];
  const uint16_t half = static_cast<const uint16_t*>(values)[i];
  return kind == Floats::kBFloat16 ? from_bf16(half) : from_f16(half);
}

template <class T>
INLINE void put(T* to, const T* values, int count) {
  if (count == kLanes) {
    __builtin_memcpy(to, values, kLanes * sizeof(T));  // of a size the compiler knows: no call
  } else {
    __builtin_memcpy(to, values, count * sizeof(T));
  }
}

// Sums of one block of rows, for `tokens` of the tile's tokens, into y.
inline void write_outputs(const Linear& op, const float* sums, int64_t row, int64_t token, int tokens) {
  const int64_t left = op.rows - row;
  const int count = left < kLanes ? static_cast<int>(left) : kLanes;
  alignas(64) float scale[kLanes] = {}, bias[kLanes] = {}, value[kLanes];
  for (int i = 0; i < count; ++i) {
    if (op.scale) scale[i] = op.scale[row + i];
    if (op.bias) bias[i] = at(op.bias, op.kind, row + i);
  }
  for (int m = 0; m < tokens; ++m, sums += kLanes) {
    const int64_t start = (token + m) * op.rows + row;
    for (int i = 0; i < kLanes; ++i) value[i] = op.scale ? sums[i] * scale[i] : sums[i];
    if (op.bias) {
      for (int i = 0; i < kLanes; ++i) value[i] += bias[i];
    }
    if (op.kind == Floats::kFloat32) {
      put(static_cast<float*>(op.y) + start, value, count);
      continue;
    }
    alignas(32) uint16_t rounded[kLanes];
    if (op.kind == Floats::kBFloat16) {
#pragma GCC unroll 1  // else it is unrolled before it could be made one vector
      for (int i = 0; i < kLanes; ++i) rounded[i] = to_bf16(value[i]);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < kLanes; ++i) rounded[i] = to_f16(value[i]);
    }
    put(static_cast<uint16_t*>(op.y) + start, rounded, count);
  }
}

}  // namespace
}  // namespace sparse24
