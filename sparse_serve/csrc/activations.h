// What the loops of a linear layer read and write of its activations.
#pragma once
#include "layout.h"

#define INLINE inline __attribute__((always_inline))

namespace sparse24 {
namespace {  // every instruction set compiles a copy of its own

INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// 128 inputs of one token as float32, zero beyond the last column.
INLINE void read_inputs(const Linear& op, int64_t token, int64_t column, float* out) {
  const int64_t left = op.columns - column, count = left < kColumns ? left : kColumns;
  const int64_t start = token * op.columns + column;
  if (op.bfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(op.x) + start;
    for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(x[i]);
  } else {
    __builtin_memcpy(out, static_cast<const float*>(op.x) + start, count * sizeof(float));
  }
  for (int64_t i = count; i < kColumns; ++i) out[i] = 0;
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
    if (op.bias && op.bfloat16) bias[i] = from_bf16(static_cast<const uint16_t*>(op.bias)[row + i]);
    if (op.bias && !op.bfloat16) bias[i] = static_cast<const float*>(op.bias)[row + i];
  }
  for (int m = 0; m < tokens; ++m, sums += kLanes) {
    const int64_t start = (token + m) * op.rows + row;
    for (int i = 0; i < kLanes; ++i) value[i] = op.scale ? sums[i] * scale[i] : sums[i];
    if (op.bias) {
      for (int i = 0; i < kLanes; ++i) value[i] += bias[i];
    }
    if (op.bfloat16) {
      alignas(32) uint16_t rounded[kLanes];
#pragma GCC unroll 1  // else it is unrolled before it could be made one vector
      for (int i = 0; i < kLanes; ++i) rounded[i] = to_bf16(value[i]);
      put(static_cast<uint16_t*>(op.y) + start, rounded, count);
    } else {
      put(static_cast<float*>(op.y) + start, value, count);
    }
  }
}

}  // namespace
}  // namespace sparse24
