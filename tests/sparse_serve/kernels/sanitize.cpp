// Every instruction set of the CPU kernel on every kind of value, at the ends of rows, columns and batches, against a
// naive product, in buffers that end where the tensors end. Built with -fsanitize=address,undefined by test_cpu.py.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "activations.h"  // its conversions are compared with torch's in test_cpu.py
#include "guarded.h"
#include "isa.h"
#include "share.h"

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

struct alignas(64) Line { uint8_t bytes[64]; };  // as torch aligns what it allocates

using RoundTokens = void (*)(const Linear&, int64_t, int64_t, uint8_t*, float*);

struct Isa {
  const char* name;
  Run run;
  bool here;
  RoundTokens round_tokens = nullptr;  // for codes only
  bool tiles = false;
  int zero = 0;
};

// As so many threads would share it; with a bias, or without.
int check(const Isa& isa, Values kind, Floats io, int64_t tokens, int64_t rows, int64_t columns,
          int64_t threads = 1, bool biased = true) {
  static const int kPairs[6] = {3, 5, 9, 6, 10, 12};
  const bool nibbles = kind == Values::kInt4;
  const int64_t kept = columns / 2, each = tokens % 3 == 0 ? 64 : tokens % 3 == 1 ? 128 : std::max<int64_t>(kept, 64);
  const int64_t groups = nibbles ? ceil_div(kept, each) : 1;
  const bool scaled = nibbles || kind == Values::kInt8 || (kind == Values::kBFloat16 && tokens == 5);  // as fp8 values are
  std::vector<uint8_t> bitmask(rows * columns / 8), values;
  std::vector<float> dense(rows * columns), scale(rows * groups);
  for (float& of_group : scale) of_group = std::fabs(number()) + 0.1f;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < columns / 4; ++group) {
      const int mask = kPairs[random_bits() % 6];
      const float of_group = scale[row * groups + (nibbles ? 2 * group / each : 0)];
      const uint8_t octet = static_cast<uint8_t>(random_bits());
      int taken = 0;
      bitmask[row * (columns / 8) + group / 2] |= static_cast<uint8_t>(mask << (4 * (group % 2)));
      for (int column = 0; column < 4; ++column) {
        if (!(mask >> column & 1)) continue;
        if (nibbles) {
          const int code = ((taken ? octet >> 4 : octet & 15) ^ 8) - 8;
          dense[row * columns + group * 4 + column] = static_cast<float>(code) * of_group;
          if (!taken++) values.push_back(octet);
          continue;
        }
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
          __builtin_memcpy(bytes, &code, 1), value = static_cast<float>(code);
        }
        values.insert(values.end(), bytes, bytes + value_bytes(kind));
        dense[row * columns + group * 4 + column] = scaled ? value * of_group : value;
      }
    }
  }
  GuardedVector<uint8_t> blocks(row_blocks(rows) * column_blocks(columns) * block_bytes(kind));
  pack(values.data(), bitmask.data(), kind, rows, columns, blocks.data(), 0, superblocks(rows),
       {scale.data(), each});
  Buffer x(tokens * columns, io), y(tokens * rows, io), bias(rows, io);
  Linear op{blocks.data(), kind,     tokens,      rows, columns, x.data(), y.data(),
            scaled && !nibbles ? scale.data() : nullptr, biased ? bias.data() : nullptr, io};
  op.prefetches = rows % 2 == 1;
  GuardedVector<Line> tiles;
#if SPARSE24_AMX
  if (isa.run == amx::run && amx::takes(op)) {
    tiles.resize(ceil_div(tokens, kLanes) * tile_bytes(columns) / sizeof(Line));
    amx::pack_tokens(op, 0, ceil_div(tokens, kLanes), tiles.data()->bytes);
    op.tiles = tiles.data()->bytes;
  }
#endif
  GuardedVector<Line> codes;
  GuardedVector<float> steps(tokens * input_scales(columns));
  if (isa.round_tokens) {
    const int64_t padded = isa.tiles ? ceil_div(tokens, kLanes) * kLanes : tokens;
    op.rounded.tokens = padded, op.rounded.tiles = isa.tiles, op.rounded.shared = shared_by(columns);
    op.rounded.zero = isa.zero;
#if defined(__x86_64__)
    if (isa.run == avx2_int8::run) op.rounded.zero = avx2_int8::zero_of(kind);
#endif
    steps.resize(padded * input_scales(columns)), codes.resize(padded * column_blocks(columns) * kColumns / sizeof(Line));
    for (int64_t half : {padded / 2, padded}) {  // by two threads
      isa.round_tokens(op, half == padded ? padded / 2 : 0, half, codes.data()->bytes, steps.data());
    }
    op.rounded.codes = codes.data()->bytes, op.rounded.scale = steps.data();
  }
  const int64_t tile = tile_of(op, threads);
  for (int64_t share = 0; share < threads; ++share) run_shares(isa.run, op, tile, share, share + 1, threads);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; ++row) {
      double expected = biased ? bias.at(row) : 0, size = 1;
      for (int64_t column = 0; column < columns; ++column) {
        double input = x.at(token * columns + column);
        if (!codes.empty()) {
          const double step = steps[column / (kColumns * op.rounded.shared) * op.rounded.tokens + token];
          const uint8_t code = codes.data()->bytes[code_at(op.rounded, token, column)];
          const double rounded = (op.rounded.zero ? code - op.rounded.zero : static_cast<int8_t>(code)) * step;
          if (std::fabs(rounded - input) > 0.5001 * step) return 1;
          input = rounded;
        }
        const double product = input * dense[row * columns + column];
        expected += product;
        size += std::fabs(product);
      }
      const double tolerance = io == Floats::kFloat32 ? 1e-5 : 1e-2;
      const float found = y.at(token * rows + row);
      if (!(std::fabs(found - expected) <= tolerance * size)) {
        std::printf("%s values %d inputs %d [%ld, %ld] token %ld row %ld: %g, expected %g\n", isa.name, int(kind), int(io), long(rows),
                    long(columns), long(token), long(row), found, expected);
        return 1;
      }
    }
  }
  return 0;
}

std::vector<int> visits;  // of each token and superblock

void visit(const Linear& op, int64_t first, int64_t last) {
  const int64_t supers = superblocks(op.rows), token = static_cast<float*>(op.y) - static_cast<const float*>(op.bias);
  for (int64_t t = 0; t < op.tokens; ++t) {
    for (int64_t super = first; super < last; ++super) ++visits[(token / op.rows + t) * supers + super];
  }
}

// Every product is one share's; and of many tokens and rows no share is a quarter larger than the mean, nor for AMX by
// more than a superblock, for which weights are made dense once, nor for rounded inputs by a tenth and a superblock.
int check_shares(int64_t tokens, int64_t rows, int64_t threads, bool tiled, bool rounded) {
  std::vector<float> x(tokens * 8), y(tokens * rows);
  std::vector<uint8_t> tiles(ceil_div(tokens, kLanes) * tile_bytes(8));
  const Linear op{nullptr, Values::kFloat32, tokens, rows, 8, x.data(), y.data(), nullptr, y.data(), Floats::kFloat32,
                  tiled ? tiles.data() : nullptr, {rounded ? tiles.data() : nullptr, x.data(), 0}};
  const int64_t tile = tile_of(op, threads), supers = superblocks(rows);
  visits.assign(tokens * supers, 0);
  double all = 0, most = 0;
  for (int64_t share = 0; share < threads; ++share) {
    run_shares(visit, op, tile, share, share + 1, threads);
    double done = 0;
    for (int64_t i = 0; i < tokens * supers; ++i) done += visits[i] * blocks_of(rows, i % supers);
    most = std::max(most, done - all), all = done;
  }
  bool wrong = tokens >= 128 && rows >= 100 * threads && !tiled && !rounded && most * threads > 1.25 * all;
  wrong = wrong || (rounded && most > 1.1 * all / threads + kSuper * tile);
  wrong = wrong || (tiled && (most > all / threads + kSuper * tile || (tile < tokens && tile % kLanes)));
  for (int count : visits) wrong = wrong || count != 1;
  if (wrong) std::printf("%ld tokens, %ld rows, %ld threads: largest share %g\n", long(tokens), long(rows), long(threads), most * threads / all);
  return wrong;
}

// Code for a set that a processor lacks would end the process with an illegal instruction: it has to be refused.
int check_refusals() {
  int wrong = 0;
  for (int64_t best = 0; best < kIsaCount; ++best) {
    for (int64_t wanted : {-3, -2, -1, 0, 1, 2, 3, 4, 99}) {
      const std::string refusal = isa_refusal(wanted, best);
      bool right = refusal.empty() == (wanted >= -1 && wanted <= best);
      if (!refusal.empty()) {
        right = right && refusal.find("isa is " + std::to_string(wanted)) == 0;
        right = right && refusal.find("expected -1 (the best here) or 0 to " + std::to_string(best)) != std::string::npos;
        right = right && (refusal.find("which this processor lacks") != std::string::npos) == (wanted >= 0 && wanted < kIsaCount);
      }
      if (!right) std::printf("isa %ld of %ld: '%s'\n", long(wanted), long(best), refusal.c_str()), ++wrong;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  const Isa isas[] = {
      {"portable", portable::run, true},
#if defined(__x86_64__)
      {"avx2", avx2::run, best_isa() >= 1},
      {"avx512", avx512::run, best_isa() >= 2},
#endif
#if SPARSE24_AMX
      {"amx", amx::run, best_isa() >= 3},
#endif
#if defined(__x86_64__)
      {"avx2_int8", avx2_int8::run, best_int8_isa() >= 1, avx2_int8::round_tokens},
      {"vnni", vnni::run, best_int8_isa() >= 2, vnni::round_tokens, false, vnni::kZero},
#endif
#if SPARSE24_AMX
      {"amx_int8", amx::run_rounded, best_int8_isa() >= 3, vnni::round_tokens, true},
#endif
  };
  int wrong = check_refusals(), checked = 0;
  for (int64_t tokens : {1, 7, 31, 32, 63, 64, 127, 128, 129, 135, 160, 200, 257}) {
    for (int64_t rows : {16, 300, 512, 576, 1153, 4096}) {
      for (int64_t threads : {1, 2, 3, 5, 16, 32}) {
        for (int way : {0, 1, 2}) wrong += check_shares(tokens, rows, threads, way == 1, way == 2), ++checked;
      }
    }
  }
  for (const auto& isa : isas) {
    if (!isa.here) continue;
    std::printf("%s ", isa.name);
    const bool bytes = isa.round_tokens != nullptr;  // takes codes only
    for (Values kind : {Values::kBFloat16, Values::kFloat32, Values::kFloat16, Values::kInt8, Values::kInt4}) {
      if (bytes && kind != Values::kInt8 && kind != Values::kInt4) continue;
      for (Floats io : {Floats::kFloat32, Floats::kBFloat16, Floats::kFloat16}) {
        for (int64_t tokens : {1, 2, 3, 5, 16, 17, 33, 64, 82, 135}) {
          for (int64_t rows : {1, 16, 37, 300}) {
            for (int64_t columns : {8, 128, 136, 1032}) {
              if (tokens > 128 && (!bytes || rows > 37)) continue;  // more than a tile of rounded.h
              if (columns > 1000 && !(tokens >= 64 && io == Floats::kBFloat16)) continue;  // what many.h asks for
              wrong += check(isa, kind, io, tokens, rows, columns, 1 + tokens % 3), ++checked;
            }
          }
        }
        for (int64_t tokens : {1, 6, 65}) {  // more than one group of superblocks, for few tokens and for many
          const int64_t columns = tokens >= 64 && io == Floats::kBFloat16 ? 1032 : 136;
          wrong += check(isa, kind, io, tokens, 1153, columns, tokens == 1 ? 3 : 1, tokens != 6), ++checked;
        }
        for (int64_t tokens : {1, 4, 33, 82}) {  // fewer scales of rounded inputs; with 82, columns in two chunks
          for (int64_t columns : {1288, 4680}) {
            if (bytes) wrong += check(isa, kind, io, tokens, 40, columns), ++checked;
          }
        }
      }
    }
  }
  std::printf("%d of %d wrong\n", wrong, checked);
  return wrong != 0;
}
