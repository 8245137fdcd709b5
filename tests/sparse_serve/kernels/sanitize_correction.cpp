// Corrections at the ends of parts, columns and batches against naive products, in buffers that end where the tensors
// end. Built with -fsanitize=address,undefined by test_correction.py.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "activations.h"
#include "correction.h"
#include "guarded.h"
#include "isa.h"

using namespace sparse24;

namespace {

std::mt19937 random_bits(0);

GuardedVector<uint16_t> numbers(int64_t count) {
  GuardedVector<uint16_t> all(count);
  for (uint16_t& one : all) one = to_bf16(std::uniform_real_distribution<float>(-1, 1)(random_bits));
  return all;
}

// A weight of parts in blocks, of so many numbers.
GuardedVector<uint16_t> in_blocks(const GuardedVector<uint16_t>& weight, const std::vector<int64_t>& rows, int64_t columns, int64_t count) {
  GuardedVector<uint16_t> blocks(count);
  int64_t block = 0, before = 0;
  for (int64_t of_part : rows) {
    for (int64_t row = 0; row < of_part; ++row) {
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t dword = ((block + row / kLanes) * correction::pairs(columns) + k / 2) * kLanes + row % kLanes;
        blocks[2 * dword + k % 2] = weight[(before + row) * columns + k];
      }
    }
    before += of_part, block += row_blocks(of_part);
  }
  return blocks;
}

// In two shares, as two threads would.
int check(int64_t tokens, const std::vector<int64_t>& rows, int64_t columns, int64_t inner, bool tiles) {
  const int64_t parts = static_cast<int64_t>(rows.size());
  int64_t outputs = 0;
  for (int64_t count : rows) outputs += count;
  const auto x = numbers(tokens * columns), y = numbers(tokens * outputs);
  const auto pool = numbers(parts * inner * columns), out = numbers(outputs * inner);
  GuardedVector<uint16_t> sum(tokens * outputs);
  correction::Correction op{tokens, columns, inner, outputs, rows.data(), parts, x.data(), nullptr, nullptr, y.data(), nullptr, sum.data(), tiles};
  const auto pool_blocks = in_blocks(pool, std::vector<int64_t>(parts, inner), columns, correction::pool_blocks(op) * columns * kLanes);
  const auto out_blocks = in_blocks(out, rows, inner, correction::out_numbers(op));
  GuardedVector<uint16_t> z(correction::z_numbers(op));
  op.pool = pool_blocks.data(), op.out = out_blocks.data(), op.z = z.data();
  const int64_t inner_units = correction::units(op, correction::pool_blocks(op));
  const int64_t outer_units = correction::units(op, correction::out_blocks(op));
  correction::multiply_inner(op, 0, inner_units / 2), correction::multiply_inner(op, inner_units / 2, inner_units);
  correction::add_outer(op, 0, outer_units / 2), correction::add_outer(op, outer_units / 2, outer_units);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t part = 0, row = 0; part < parts; ++part) {
      for (const int64_t end = row + rows[part]; row < end; ++row) {
        double expected = from_bf16(y[token * outputs + row]), size = std::fabs(expected);
        for (int64_t k = 0; k < inner; ++k) {
          for (int64_t column = 0; column < columns; ++column) {
            const double product = double(from_bf16(out[row * inner + k])) * from_bf16(x[token * columns + column]) *
                                   from_bf16(pool[(part * inner + k) * columns + column]);
            expected += product, size += std::fabs(product);
          }
        }
        const float found = from_bf16(sum[token * outputs + row]);
        if (!(std::fabs(found - expected) <= 1e-2 * size)) {
          std::printf("tokens %ld, %ld parts, [%ld, %ld], inner %ld, token %ld row %ld: %g, expected %g\n", long(tokens),
                      long(parts), long(outputs), long(columns), long(inner), long(token), long(row), found, expected);
          return 1;
        }
      }
    }
  }
  return 0;
}

}  // namespace

int main() {
  int wrong = 0, all = 0, in_tiles = may_use_amx(kTilesOfBFloat16) ? 0 : -1;
  for (int64_t tokens : {1, 3, 4, 8, 21}) {
    for (const std::vector<int64_t>& rows : {std::vector<int64_t>{1}, {16}, {90}, {33, 15, 16}}) {
      for (int64_t columns : {2, 32, 34, 96}) {
        for (int64_t inner : {1, 4, 17, 40}) {
          ++all, wrong += check(tokens, rows, columns, inner, false);
          if (in_tiles >= 0 && tokens > 4 && columns % 32 == 0) ++in_tiles, wrong += check(tokens, rows, columns, inner, true);
        }
      }
    }
  }
  std::printf("%d of %d and %d in tiles wrong\n", wrong, all, in_tiles);
  return wrong != 0;
}
