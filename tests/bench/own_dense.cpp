// A dense bfloat16 matrix times one token, with the same care as sparse_serve/kernels/csrc: the peer that says what
// sparsity alone brings. Weights lie as [16 rows][2 columns] dwords, so that reading them is one sequential stream for
// each thread and sums need no work across lanes: per 64 bytes one load and one vdpbf16ps.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16, kAtOnce = 8;

__attribute__((target("avx512f,avx512bf16"))) void strip(const uint8_t* w, const uint16_t* x, int64_t columns, uint16_t* y) {
  __m512 sums[kAtOnce];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t column = 0; column < columns; column += 2 * kAtOnce) {
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i, w += 64) {
      int pair;
      memcpy(&pair, x + column + 2 * i, 4);
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair));
    }
  }
  for (int some = kAtOnce / 2; some; some /= 2) {
    for (int i = 0; i < some; ++i) sums[i] = _mm512_add_ps(sums[i], sums[i + some]);
  }
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), rounded);
}

}  // namespace

// y [rows] = W [rows / 16][columns / 2][16][2] x [columns]; rows and columns are multiples of 16.
extern "C" void own_dense(const uint8_t* w, const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row += kLanes) strip(w + row * columns * 2, x, columns, y + row);
}
