// The dense int8 layer at the ends of rows, columns and batches against a naive product, in buffers that end where the
// tensors end. Built with -fsanitize=address,undefined by test_dense_int8.py.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "activations.h"
#include "dense_int8.h"
#include "guarded.h"
#include "isa.h"

using namespace sparse24;

namespace {

std::mt19937 random_bits(0);
float number() { return std::uniform_real_distribution<float>(-1, 1)(random_bits); }

// In two shares, as two threads would.
int check(Floats io, int64_t tokens, int64_t rows, int64_t columns, bool biased, bool tiles) {
  const int64_t bytes = io == Floats::kFloat32 ? 4 : 2;
  std::vector<int8_t> codes(rows * columns);
  for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random_bits() % 255) - 127);
  std::vector<float> scale(rows);
  for (float& of_row : scale) of_row = std::fabs(number()) + 0.1f;
  std::vector<uint8_t> x(tokens * columns * bytes), y(tokens * rows * bytes), bias(rows * bytes);
  for (auto* buffer : {&x, &bias}) {
    for (size_t i = 0; i < buffer->size() / bytes; ++i) {
      const float value = number();
      const uint16_t half = io == Floats::kFloat16 ? to_f16(value) : to_bf16(value);
      __builtin_memcpy(buffer->data() + i * bytes, bytes == 4 ? static_cast<const void*>(&value) : &half, bytes);
    }
  }
  GuardedVector<uint8_t> blocks(dense_int8::weight_bytes(rows, columns));
  const int64_t count = row_blocks(rows), half = count / 2;
  for (int64_t first : {int64_t{0}, half}) {
    dense_int8::pack(codes.data(), rows, columns, blocks.data(), first, first == half ? count : half);
  }
  const Linear op{blocks.data(), Values::kInt8, tokens,       rows, columns, x.data(),
                  y.data(),      scale.data(),  biased ? bias.data() : nullptr, io};
  GuardedVector<int8_t> digits((tiles ? ceil_div(tokens, kLanes) * kLanes : tokens) * dense_int8::digit_bytes(columns));
  GuardedVector<int32_t> offset(2 * tokens);
  GuardedVector<float> step(tokens);
  const dense_int8::Digits split{digits.data(), offset.data(), step.data(), tiles};
  dense_int8::split_tokens(op, split);
  dense_int8::run(op, split, 0, half), dense_int8::run(op, split, half, count);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; ++row) {
      double expected = biased ? at(bias.data(), io, row) : 0, size = 1;
      for (int64_t column = 0; column < columns; ++column) {
        const double product = double(at(x.data(), io, token * columns + column)) * codes[row * columns + column] * scale[row];
        expected += product, size += std::fabs(product);
      }
      const float found = at(y.data(), io, token * rows + row);
      if (!(std::fabs(found - expected) <= (io == Floats::kFloat32 ? 5e-5 : 1e-2) * size)) {
        std::printf("inputs %d [%ld, %ld] token %ld row %ld: %g, expected %g\n", int(io), long(rows), long(columns),
                    long(token), long(row), found, expected);
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main() {
  int wrong = 0, checked = 0, tiles = 0;
  for (Floats io : {Floats::kFloat32, Floats::kBFloat16, Floats::kFloat16}) {
    for (int64_t tokens : {1, 2, 3, 4, 7, 8, 11, 12, 27}) {
      for (int64_t rows : {1, 16, 37}) {
        for (int64_t columns : {1, 128, 131, 516}) {
          wrong += check(io, tokens, rows, columns, rows == 37, false), ++checked;
          if (has_int8_tiles() && columns % 64 == 0) {
            wrong += check(io, tokens, rows, columns, rows == 37, true), ++tiles;
          }
        }
      }
    }
  }
  std::printf("%d of %d and %d in tiles wrong\n", wrong, checked, has_int8_tiles() ? tiles : -1);
  return wrong != 0;
}
