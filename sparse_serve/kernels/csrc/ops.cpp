// The torch operators of 2:4 weights on a CPU, on torch's stable ABI (one build serves every torch from 2.11 on):
//
//     sparse_serve_cpu::pack(values, bitmask, scale?) -> uint8 [bytes]     the blocks of layout.h; scale of int4 only
//     sparse_serve_cpu::linear(x, blocks, form, scale?, bias?, isa=-1) -> y
//     sparse_serve_cpu::linear_int8(x, blocks, form, scale?, bias?, isa=-1) -> y    the same, with x rounded to int8
//     sparse_serve_cpu::read(bytes) -> int  reads uint8 memory, for comparison
//     sparse_serve_cpu::isa() -> int       the best instruction set here, by its number in isa.h
//     sparse_serve_cpu::int8_isa() -> int  the same for linear_int8; 0 is none
//
// `isa` asks for another set than the best, for tests; one that the processor lacks is refused. All errors say what was
// given and what was expected. Of `linear_int8` every set gives the same bits.
//
// `form` is an empty tensor [rows, 0, columns] of the dtype of the values, none of which blocks alone tell; uint8 is
// that of int4 codes, of which two share a byte.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "isa.h"
#include "share.h"
#include "tensors.h"

namespace sparse24 {
namespace {

// Products below which a second thread costs more than it brings; and with tiles.
constexpr int64_t kWorthAThread = 1 << 17, kWorthAThreadOfTiles = 1 << 20;

int64_t isa() { return best_isa(); }

int64_t int8_isa() { return best_int8_isa(); }

Run runner(int64_t wanted) {
  const int64_t best = best_isa();
  const std::string refusal = isa_refusal(wanted, best);
  STD_TORCH_CHECK(refusal.empty(), refusal);
  if (wanted < 0) wanted = best;
#if defined(__x86_64__)
#if SPARSE24_AMX
  if (wanted == 3) return amx::run;
#endif
  if (wanted == 2) return avx512::run;
  if (wanted == 1) return avx2::run;
#endif
  return portable::run;
}

Values values_of(ScalarType type) {
  if (type == ScalarType::BFloat16) return Values::kBFloat16;
  if (type == ScalarType::Float) return Values::kFloat32;
  if (type == ScalarType::Half) return Values::kFloat16;
  if (type == ScalarType::Byte) return Values::kInt4;
  STD_TORCH_CHECK(type == ScalarType::Char, "values are ", type, ", expected BFloat16, Half, Float, Char or Byte");
  return Values::kInt8;
}

// The scales of int4 values: one a row, or one for each 64 or 128 that a row keeps.
Scales scales_of(const std::optional<Tensor>& scale, Values kind, int64_t rows, int64_t kept) {
  if (kind != Values::kInt4) {
    STD_TORCH_CHECK(!scale, "scale is ", text(*scale), ", expected none: only those of int4 values are in the blocks");
    return {};
  }
  STD_TORCH_CHECK(scale, "scale is missing, expected Float [", rows, "] or [", rows, ", groups]: values are Byte");
  const bool fits = scale->scalar_type() == ScalarType::Float && scale->is_contiguous() && scale->dim() > 0 &&
                    scale->size(0) == rows;
  const float* of = fits ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  if (fits && scale->dim() == 1) return {of, std::max<int64_t>(kept, kKept)};
  for (int64_t each : {int64_t{kKept}, int64_t{2 * kKept}}) {
    if (fits && scale->dim() == 2 && scale->size(1) == ceil_div(kept, each)) return {of, each};
  }
  STD_TORCH_CHECK(false, "scale is ", text(*scale), ", expected contiguous Float [", rows, "], [", rows, ", ",
                  ceil_div(kept, kKept), "] or [", rows, ", ", ceil_div(kept, 2 * kKept), "]");
  return {};
}

Tensor pack_weight(const Tensor& values, const Tensor& bitmask, const std::optional<Tensor>& scale) {
  const Values kind = values_of(values.scalar_type());
  STD_TORCH_CHECK(bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Byte && bitmask.is_contiguous(),
                  "bitmask is ", text(bitmask), ", expected contiguous Byte [rows, columns / 8]");
  const int64_t rows = bitmask.size(0), columns = bitmask.size(1) * 8, parts = column_blocks(columns);
  const int64_t each = kind == Values::kInt4 ? 4 : 2;  // columns of one element
  const bool fits = values.dim() == 2 && values.size(0) == rows && values.size(1) * each == columns;
  STD_TORCH_CHECK(fits && values.is_contiguous(), "values are ", text(values), ", expected contiguous [", rows, ", ",
                  columns / each, "], as the bitmask is ", text(bitmask));
  const Scales scales = scales_of(scale, kind, rows, columns / 2);
  const int64_t bytes = row_blocks(rows) * parts * block_bytes(kind);
  Tensor out = empty({bytes}, ScalarType::Byte);
  uint8_t* blocks = static_cast<uint8_t*>(out.mutable_data_ptr());
  advise_huge_pages(blocks, bytes);
  const uint8_t* from = static_cast<const uint8_t*>(values.const_data_ptr());
  const uint8_t* bits = static_cast<const uint8_t*>(bitmask.const_data_ptr());
  torch::stable::parallel_for(0, superblocks(rows), 1, [&](int64_t first, int64_t last) {
    pack(from, bits, kind, rows, columns, blocks, first, last, scales);
  });
  return out;
}

#if SPARSE24_AMX
// The activations as tiles.
Tensor tiles_of(const Linear& op, const Tensor& blocks) {
  constexpr int64_t kBytesAThread = 1 << 17;
  const int64_t tiles = ceil_div(op.tokens, kLanes), bytes = tile_bytes(op.columns);
  Tensor out = empty({tiles * bytes}, ScalarType::Byte);
  uint8_t* start = static_cast<uint8_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, tiles, ceil_div(kBytesAThread, bytes), [&](int64_t first, int64_t last) {
    amx::pack_tokens(op, first, last, start);
  });
  return out;
}
#endif

// What the operators are given, as `Linear`; y is still to be set.
Linear checked(const Tensor& x, const Tensor& blocks, const Tensor& form, const std::optional<Tensor>& scale,
               const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(form.dim() == 3, "form is ", text(form), ", expected [rows, 0, columns]");
  const int64_t rows = form.size(0), columns = form.size(2);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns, "x is ", text(x), ", expected [..., ", columns,
                  "]: the weight is [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(columns > 0, "the weight is [", rows, ", 0], expected columns");
  const Values kind = values_of(form.scalar_type());
  const int64_t bytes = row_blocks(rows) * column_blocks(columns) * block_bytes(kind);
  STD_TORCH_CHECK(blocks.numel() == bytes && blocks.scalar_type() == ScalarType::Byte && blocks.is_contiguous(),
                  "blocks are ", text(blocks), ", expected contiguous Byte [", bytes, "] for a form of ", text(form));
  const Floats of_x = floats_of(x.scalar_type());
  if (bias) check_per_row(*bias, "bias", x.scalar_type(), rows);
  if (scale) check_per_row(*scale, "scale", ScalarType::Float, rows);
  STD_TORCH_CHECK(scale || kind != Values::kInt8, "scale is missing, expected Float [", rows, "]: values are Char");
  STD_TORCH_CHECK(!scale || kind != Values::kInt4, "scale is given, expected none: those of Byte values are in the blocks");
  return {static_cast<const uint8_t*>(blocks.const_data_ptr()), kind, x.numel() / columns, rows, columns,
          x.const_data_ptr(), nullptr, scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr,
          bias ? bias->const_data_ptr() : nullptr, of_x, nullptr, {}, gains_by_prefetch()};
}

void run_threads(Run run, const Linear& op, int64_t worth_a_thread) {
  const int64_t worth = ceil_div(op.tokens * op.columns * op.rows, worth_a_thread);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), worth), tile = tile_of(op, threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    run_shares(run, op, tile, first, last, threads);
  });
}

Tensor linear(const Tensor& input, const Tensor& blocks, const Tensor& form, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& bias, int64_t wanted) {
  const Tensor x = as_contiguous(input);
  const Run run = runner(wanted);
  Linear op = checked(x, blocks, form, scale, bias);
  Tensor y = outputs(x, op);
  if (op.tokens == 0 || op.rows == 0) return y;
#if SPARSE24_AMX
  std::optional<Tensor> tiles;
  if (run == amx::run && amx::takes(op)) {
    tiles = tiles_of(op, blocks);
    op.tiles = static_cast<const uint8_t*>(tiles->const_data_ptr());
  }
#endif
  run_threads(run, op, op.tiles ? kWorthAThreadOfTiles : kWorthAThread);
  return y;
}

Tensor linear_int8(const Tensor& input, const Tensor& blocks, const Tensor& form, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& bias, int64_t wanted) {
  constexpr int64_t kInputsAThread = 1 << 15;
  const int64_t best = best_int8_isa();
  STD_TORCH_CHECK(best > 0, "this processor lacks AVX2, FMA or F16C, which linear_int8 is written for");
  STD_TORCH_CHECK(wanted == -1 || (wanted > 0 && wanted <= best), "isa is ", wanted, ", expected -1 (the best here) or 1 "
                  "to ", best, ": of AVX2, AVX-512 with VNNI and VBMI, and AMX with int8, those that this process may use");
  const Tensor x = as_contiguous(input);
  Linear op = checked(x, blocks, form, scale, bias);
  STD_TORCH_CHECK(op.values == Values::kInt8 || op.values == Values::kInt4, "values are ", form.scalar_type(),
                  ", expected Char or Byte: what meets int8 inputs are codes");
  Tensor y = outputs(x, op);
  if (op.tokens == 0 || op.rows == 0) return y;
#if defined(__x86_64__)
#if SPARSE24_AMX
  op.rounded.tiles = wanted == 3 || (wanted < 0 && best == 3 && amx::takes_rounded(op));
#endif
  const bool avx512 = wanted < 0 ? best > 1 : wanted > 1;
  Run run = avx512 ? vnni::run : avx2_int8::run;
#if SPARSE24_AMX
  if (op.rounded.tiles) run = amx::run_rounded;
#endif
  op.rounded.zero = op.rounded.tiles ? 0 : avx512 ? vnni::kZero : avx2_int8::zero_of(op.values);
  op.rounded.tokens = op.rounded.tiles ? ceil_div(op.tokens, kLanes) * kLanes : op.tokens;
  op.rounded.shared = shared_by(op.columns);
  const int64_t bytes = op.rounded.tokens * column_blocks(op.columns) * kColumns;
  const int64_t scaled = op.rounded.tokens * input_scales(op.columns);
  const Tensor rounded = empty({bytes + scaled * int64_t{sizeof(float)}}, ScalarType::Byte);
  uint8_t* codes = static_cast<uint8_t*>(rounded.mutable_data_ptr());
  float* scales = reinterpret_cast<float*>(codes + bytes);
  op.rounded.codes = codes, op.rounded.scale = scales;
  torch::stable::parallel_for(0, op.rounded.tokens, ceil_div(kInputsAThread, std::max<int64_t>(op.columns, 1)),
                              [&](int64_t first, int64_t last) {
                                if (avx512) vnni::round_tokens(op, first, last, codes, scales);
                                else avx2_int8::round_tokens(op, first, last, codes, scales);
                              });
  run_threads(run, op, op.rounded.tiles ? kWorthAThreadOfTiles : kWorthAThread);
#endif
  return y;
}

// Every byte once, in order, by all threads: what a weight costs to read and nothing else.
int64_t read(const Tensor& bytes) {
  STD_TORCH_CHECK(bytes.scalar_type() == ScalarType::Byte && bytes.is_contiguous(), "bytes are ", text(bytes),
                  ", expected contiguous Byte");
  const uint64_t* words = static_cast<const uint64_t*>(bytes.const_data_ptr());
  std::atomic<uint64_t> all{0};
  torch::stable::parallel_for(0, bytes.numel() / 64, 1 << 12, [&](int64_t first, int64_t last) {
    uint64_t sum[8] = {};
    for (int64_t line = first; line < last; ++line) {
      for (int i = 0; i < 8; ++i) sum[i] ^= words[8 * line + i];
    }
    for (uint64_t part : sum) all ^= part;
  });
  return static_cast<int64_t>(all.load());
}

}  // namespace

STABLE_TORCH_LIBRARY(sparse_serve_cpu, m) {
  m.def("isa() -> int");
  m.def("int8_isa() -> int");
  m.def("read(Tensor bytes) -> int");
  m.def("pack(Tensor values, Tensor bitmask, Tensor? scale=None) -> Tensor");
  m.def("linear(Tensor x, Tensor blocks, Tensor form, Tensor? scale, Tensor? bias, int isa=-1) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor blocks, Tensor form, Tensor? scale, Tensor? bias, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_serve_cpu, CPU, m) {
  m.impl("read", TORCH_BOX(&read));
  m.impl("pack", TORCH_BOX(&pack_weight));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_serve_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("int8_isa", TORCH_BOX(&int8_isa));
}

}  // namespace sparse24
