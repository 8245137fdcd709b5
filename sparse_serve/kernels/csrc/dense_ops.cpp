// The torch operators of dense int8 weights:
//
//     sparse_serve_cpu::pack_int8(codes) -> uint8 [bytes]                     the blocks of dense_int8.cpp
//     sparse_serve_cpu::dense_int8(x, blocks, form, scale, bias?) -> y        inputs keep 16 bits
//     sparse_serve_cpu::vnni() -> bool                                        whether this processor has what both need
//
// `form` is an empty int8 tensor [rows, 0, columns].
#include <torch/csrc/stable/library.h>

#include <optional>

#include "dense_int8.h"
#include "isa.h"
#include "tensors.h"

namespace sparse24 {
namespace {

bool vnni_here() { return has_vnni(); }

void check_processor() {
  STD_TORCH_CHECK(has_vnni(), "this processor lacks AVX-512 with VNNI, which dense_int8 is written for");
}

Tensor pack_int8(const Tensor& codes) {
  check_processor();
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == ScalarType::Char && codes.is_contiguous(), "codes are ",
                  text(codes), ", expected contiguous Char [rows, columns]");
  const int64_t rows = codes.size(0), columns = codes.size(1);
  Tensor out = empty({dense_int8::weight_bytes(rows, columns)}, ScalarType::Byte);
#if defined(__x86_64__)
  uint8_t* blocks = static_cast<uint8_t*>(out.mutable_data_ptr());
  advise_huge_pages(blocks, out.numel());
  const int8_t* from = static_cast<const int8_t*>(codes.const_data_ptr());
  torch::stable::parallel_for(0, row_blocks(rows), 1, [&](int64_t first, int64_t last) {
    dense_int8::pack(from, rows, columns, blocks, first, last);
  });
#endif
  return out;
}

Tensor linear_dense_int8(const Tensor& input, const Tensor& blocks, const Tensor& form, const Tensor& scale,
                         const std::optional<Tensor>& bias) {
  constexpr int64_t kBlocksAThread = 8;
  check_processor();
  STD_TORCH_CHECK(form.dim() == 3 && form.scalar_type() == ScalarType::Char, "form is ", text(form),
                  ", expected Char [rows, 0, columns]");
  const Tensor x = as_contiguous(input);
  const int64_t rows = form.size(0), columns = form.size(2), bytes = dense_int8::weight_bytes(rows, columns);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns, "x is ", text(x), ", expected [..., ", columns,
                  "]: the weight is [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(columns > 0 && columns <= dense_int8::kMostColumns, "the weight has ", columns, " columns, expected 1 to ",
                  dense_int8::kMostColumns, ": sums of more could overflow");
  STD_TORCH_CHECK(blocks.numel() == bytes && blocks.scalar_type() == ScalarType::Byte && blocks.is_contiguous(),
                  "blocks are ", text(blocks), ", expected contiguous Byte [", bytes, "] for a form of ", text(form));
  check_per_row(scale, "scale", ScalarType::Float, rows);
  const Floats of_x = floats_of(x.scalar_type());
  if (bias) check_per_row(*bias, "bias", x.scalar_type(), rows);
  Linear op{static_cast<const uint8_t*>(blocks.const_data_ptr()), Values::kInt8, x.numel() / columns, rows,
            columns, x.const_data_ptr(), nullptr, static_cast<const float*>(scale.const_data_ptr()),
            bias ? bias->const_data_ptr() : nullptr, of_x};
  Tensor y = outputs(x, op);
  if (op.tokens == 0 || op.rows == 0) return y;
#if defined(__x86_64__)
  const int64_t numbers = 3 * int64_t{sizeof(float)}, each = dense_int8::digit_bytes(columns);
  const bool tiles = has_int8_tiles() && dense_int8::suits_tiles(op.tokens, columns);
  const int64_t places = tiles ? ceil_div(op.tokens, kLanes) * kLanes : op.tokens;
  const Tensor scratch = empty({op.tokens * numbers + places * each}, ScalarType::Byte);
  uint8_t* start = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  uint8_t* behind = start + places * each;  // first the digits, whose tiles then begin with a line of the cache
  const dense_int8::Digits digits{reinterpret_cast<int8_t*>(start), reinterpret_cast<int32_t*>(behind),
                                  reinterpret_cast<float*>(behind) + 2 * op.tokens, tiles};
  dense_int8::split_tokens(op, digits);
  torch::stable::parallel_for(0, row_blocks(rows), kBlocksAThread, [&](int64_t first, int64_t last) {
    dense_int8::run(op, digits, first, last);
  });
#endif
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_serve_cpu, m) {
  m.def("vnni() -> bool");
  m.def("pack_int8(Tensor codes) -> Tensor");
  m.def("dense_int8(Tensor x, Tensor blocks, Tensor form, Tensor scale, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_serve_cpu, CPU, m) {
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
  m.impl("dense_int8", TORCH_BOX(&linear_dense_int8));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_serve_cpu, CompositeExplicitAutograd, m) { m.impl("vnni", TORCH_BOX(&vnni_here)); }

}  // namespace sparse24
