// Sums of tiles into outputs of bfloat16.
#pragma once
#include "activations.h"

namespace sparse24 {
namespace {

INLINE __m512 widened(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

// Sums [block][token][16 rows] of rows [first, end) for `tiles` times 16 tokens into y, which is bfloat16: two blocks
// at once, for whole lines of the cache. `rounded` makes bfloat16 of the low and the high half of a line.
template <class Rounded>
void write_tiles(const Linear& op, const float* sums, int64_t first, int64_t end, int64_t token, int tiles,
                 Rounded rounded) {
  constexpr int kTwo = 2 * kLanes;
  const int64_t block = tiles * kLanes * kLanes, tokens = std::min<int64_t>(op.tokens - token, tiles * kLanes);
  uint16_t* y = static_cast<uint16_t*>(op.y) + token * op.rows;
  for (int64_t m = 0; m < tokens; ++m, y += op.rows, sums += kLanes) {
    const float* sum = sums;
    for (int64_t row = first; row < end; row += kTwo, sum += 2 * block) {
      const int64_t left = end - row;
      const __mmask32 here = left < kTwo ? (__mmask32{1} << left) - 1 : ~__mmask32{0};
      const __mmask16 near = static_cast<__mmask16>(here), far = static_cast<__mmask16>(here >> kLanes);
      __m512 a = _mm512_load_ps(sum), b = far ? _mm512_load_ps(sum + block) : _mm512_setzero_ps();
      if (op.scale) {
        a = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(near, op.scale + row));
        b = _mm512_mul_ps(b, _mm512_maskz_loadu_ps(far, op.scale + row + kLanes));
      }
      if (op.bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(here, static_cast<const uint16_t*>(op.bias) + row);
        a = _mm512_add_ps(a, widened(_mm512_castsi512_si256(both)));
        b = _mm512_add_ps(b, widened(_mm512_extracti64x4_epi64(both, 1)));
      }
      _mm512_mask_storeu_epi16(y + row, here, rounded(a, b));
    }
  }
}

}  // namespace
}  // namespace sparse24
