// Every instruction set of the CPU kernel on every kind of value, at the ends of rows, columns and batches, against a
// naive product, in buffers that end where the tensors end. Built with -fsanitize=address,undefined by test_cpu.py.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "activations.h"

using namespace sparse24;

namespace {

std::mt19937 random_bits(0);
float number() { return std::uniform_real_distribution<float>(-1, 1)(random_bits); }
uint16_t to_half(float value, Floats kind) { return kind == Floats::kFloat16 ? to_f16(value) : to_bf16(value); }
float from_half(uint16_t half, Floats kind) { return kind == Floats::kFloat16 ? from_f16(half) : from_bf16(half); }

struct Buffer {  // of floats, read as what they are rounded to
  Floats kind;
  std::vector<float> exact;
  std::vector<uint16_t> halves;
  Buffer(size_t count, Floats kind) : kind(kind) {
    for (size_t i = 0; i < count; ++i) {
      float value = number();
      if (kind != Floats::kFloat32) halves.push_back(to_half(value, kind)), value = from_half(halves.back(), kind);
      exact.push_back(value);
    }
  }
  void* data() { return kind == Floats::kFloat32 ? exact.data() : static_cast<void*>(halves.data()); }
  float at(size_t i) const { return kind == Floats::kFloat32 ? exact[i] : from_half(halves[i], kind); }
};

// In one go, or as three threads would divide it; with a bias, or without.
int check(Run run, const char* name, Values kind, Floats io, int64_t tokens, int64_t rows, int64_t columns,
          bool divided = false, bool biased = true) {
  static const int kPairs[6] = {3, 5, 9, 6, 10, 12};
  std::vector<uint8_t> bitmask(rows * columns / 8), values;
  std::vector<float> dense(rows * columns), scale(rows);
  for (int64_t row = 0; row < rows; ++row) {
    scale[row] = std::fabs(number()) + 0.1f;
    for (int64_t group = 0; group < columns / 4; ++group) {
      const int mask = kPairs[random_bits() % 6];
      bitmask[row * (columns / 8) + group / 2] |= static_cast<uint8_t>(mask << (4 * (group % 2)));
      for (int column = 0; column < 4; ++column) {
        if (!(mask >> column & 1)) continue;
        float value = number();
        uint8_t bytes[4];
        if (kind == Values::kBFloat16 || kind == Values::kFloat16) {
          const Floats as = kind == Values::kFloat16 ? Floats::kFloat16 : Floats::kBFloat16;
          const uint16_t stored = to_half(value, as);
          __builtin_memcpy(bytes, &stored, 2), value = from_half(stored, as);
        } else if (kind == Values::kFloat32) {
          __builtin_memcpy(bytes, &value, 4);
        } else {
          const int8_t code = static_cast<int8_t>(std::lrint(value * 127));
          __builtin_memcpy(bytes, &code, 1), value = static_cast<float>(code) * scale[row];
        }
        values.insert(values.end(), bytes, bytes + value_bytes(kind));
        dense[row * columns + group * 4 + column] = value;
      }
    }
  }
  std::vector<uint8_t> blocks(row_blocks(rows) * column_blocks(columns) * block_bytes(kind));
  pack(values.data(), bitmask.data(), kind, rows, columns, blocks.data(), 0, superblocks(rows));
  Buffer x(tokens * columns, io), y(tokens * rows, io), bias(rows, io);
  const Linear op{blocks.data(), kind,     tokens,      rows, columns, x.data(), y.data(),
                  kind == Values::kInt8 ? scale.data() : nullptr, biased ? bias.data() : nullptr, io};
  const int64_t supers = superblocks(rows), third = divided ? ceil_div(supers, 3) : supers;
  for (int64_t first = 0; first < supers; first += third) run(op, first, first + third < supers ? first + third : supers);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; ++row) {
      double expected = biased ? bias.at(row) : 0, size = 1;
      for (int64_t column = 0; column < columns; ++column) {
        const double product = double(x.at(token * columns + column)) * dense[row * columns + column];
        expected += product;
        size += std::fabs(product);
      }
      const double tolerance = io == Floats::kFloat32 ? 1e-5 : 1e-2;
      const float found = y.at(token * rows + row);
      if (!(std::fabs(found - expected) <= tolerance * size)) {
        std::printf("%s values %d inputs %d [%ld, %ld] token %ld row %ld: %g, expected %g\n", name, int(kind), int(io), long(rows),
                    long(columns), long(token), long(row), found, expected);
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main() {
  struct { const char* name; Run run; bool here; } isas[] = {
      {"portable", portable::run, true},
#if defined(__x86_64__)
      {"avx2", avx2::run, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"avx512", avx512::run, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16")},
#endif
  };
  int wrong = 0, checked = 0;
  for (const auto& isa : isas) {
    if (!isa.here) continue;
    std::printf("%s ", isa.name);
    for (Values kind : {Values::kBFloat16, Values::kFloat32, Values::kFloat16, Values::kInt8}) {
      for (Floats io : {Floats::kFloat32, Floats::kBFloat16, Floats::kFloat16}) {
        for (int64_t tokens : {1, 2, 3, 5, 16, 17, 64, 81}) {
          for (int64_t rows : {1, 16, 37, 300}) {
            for (int64_t columns : {8, 128, 136, 1032}) {
              if (columns > 1000 && tokens < 64) continue;  // as many columns as many tokens of bfloat16 ask for
              wrong += check(isa.run, isa.name, kind, io, tokens, rows, columns), ++checked;
            }
          }
        }
        for (int64_t tokens : {1, 6, 65}) {  // more than one group of superblocks, for few tokens and for many
          const int64_t columns = tokens < 64 ? 136 : 1032;
          wrong += check(isa.run, isa.name, kind, io, tokens, 1153, columns, tokens == 1, tokens != 6), ++checked;
        }
      }
    }
  }
  std::printf("%d of %d wrong\n", wrong, checked);
  return wrong != 0;
}
