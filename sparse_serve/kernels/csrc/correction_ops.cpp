// The torch operator of a correction beside a sparse layer:
//
//     sparse_serve_cpu::add_correction(y, x, pool, out, rows, inner) -> y + S (X x)      bfloat16
//     sparse_serve_cpu::corrects() -> bool                                       whether this processor has what it needs
//
// y is [..., outputs], x [..., columns]. `pool` [blocks, columns / 2, 16, 2] holds the blocks of X and `out` [numbers] those
// of S, as correction.h wants them; `rows` are the outputs of each part, and `inner` the columns of S.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "correction.h"
#include "isa.h"
#include "tensors.h"

namespace sparse24 {
namespace {

constexpr int64_t kMostInner = 1 << 20;

bool corrects() { return best_isa() >= 2; }

void check_bf16(const Tensor& tensor, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16 && tensor.is_contiguous() && tensor.dim() == dimensions,
                  name, " is ", text(tensor), ", expected contiguous BFloat16 of ", dimensions, " dimensions");
}

const uint16_t* bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }

correction::Correction checked(const Tensor& y, const Tensor& x, const Tensor& pool, const Tensor& out,
                               const std::vector<int64_t>& rows, int64_t inner) {
  STD_TORCH_CHECK(!rows.empty() && inner > 0 && inner <= kMostInner, "rows are of ", rows.size(), " parts, and inner is ", inner,
                  ", expected parts, and 1 to ", kMostInner);
  check_bf16(pool, "pool", 4), check_bf16(out, "out", 1), check_bf16(x, "x", x.dim()), check_bf16(y, "y", x.dim());
  const int64_t columns = 2 * pool.size(1), outputs = y.size(y.dim() - 1);
  STD_TORCH_CHECK(columns > 0 && x.dim() > 0 && x.size(x.dim() - 1) == columns, "x is ", text(x), ", expected [..., ",
                  columns, "]: the pool is ", text(pool));
  correction::Correction op{x.numel() / columns, columns, inner, 0, rows.data(), static_cast<int64_t>(rows.size()), bits(x),
                            bits(pool), bits(out), bits(y), nullptr, nullptr};
  for (int64_t count : rows) {
    STD_TORCH_CHECK(count > 0 && count <= outputs - op.rows, "rows has ", count, ", expected outputs for each part, together ",
                    outputs);
    op.rows += count;
  }
  const int64_t blocks = correction::pool_blocks(op), numbers = correction::out_numbers(op);
  STD_TORCH_CHECK(pool.size(0) == blocks && pool.size(2) == kLanes && pool.size(3) == 2, "pool is ", text(pool),
                  ", expected [", blocks, ", columns / 2, 16, 2]: inner is ", inner);
  STD_TORCH_CHECK(out.numel() == numbers, "out is ", text(out), ", expected [", numbers, "]: inner is ", inner);
  STD_TORCH_CHECK(y.size(y.dim() - 1) == op.rows && y.numel() == op.tokens * op.rows, "y is ", text(y),
                  ", expected [..., ", op.rows, "] for ", op.tokens, " tokens");
  return op;
}

Tensor add_correction(const Tensor& of_y, const Tensor& of_x, const Tensor& pool, const Tensor& out,
                      std::vector<int64_t> rows, int64_t inner) {
  constexpr int64_t kWorthAThread = 1 << 17, kWorthAThreadOfTiles = 1 << 20;  // products
  STD_TORCH_CHECK(corrects(), "this processor lacks AVX-512 with bfloat16, which add_correction is written for");
  const Tensor x = as_contiguous(of_x), y = as_contiguous(of_y);
  correction::Correction op = checked(y, x, pool, out, rows, inner);
  Tensor sum = empty(std::vector<int64_t>(y.sizes().begin(), y.sizes().end()), ScalarType::BFloat16);
  if (op.tokens == 0) return sum;
  op.sum = static_cast<uint16_t*>(sum.mutable_data_ptr());
  const Tensor z = empty({correction::z_numbers(op)}, ScalarType::BFloat16);
  op.z = static_cast<uint16_t*>(z.mutable_data_ptr());
  std::fill_n(op.z, z.numel(), uint16_t{0});
#if defined(__x86_64__)
  op.tiles = best_isa() >= 3 && correction::suits_tiles(op);
  const int64_t worth = op.tiles ? kWorthAThreadOfTiles : kWorthAThread;
  const int64_t of_unit = std::min(op.tokens, correction::unit_tokens(op)) * correction::kUnitBlocks * kLanes;
  const auto run = [&](int64_t blocks, int64_t columns, auto units) {
    torch::stable::parallel_for(0, correction::units(op, blocks), ceil_div(worth, of_unit * columns), units);
  };
  run(correction::pool_blocks(op), op.columns,
      [&](int64_t first, int64_t last) { correction::multiply_inner(op, first, last); });
  run(correction::out_blocks(op), op.inner, [&](int64_t first, int64_t last) { correction::add_outer(op, first, last); });
#endif
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_serve_cpu, m) {
  m.def("corrects() -> bool");
  m.def("add_correction(Tensor y, Tensor x, Tensor pool, Tensor out, int[] rows, int inner) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_serve_cpu, CPU, m) { m.impl("add_correction", TORCH_BOX(&add_correction)); }

STABLE_TORCH_LIBRARY_IMPL(sparse_serve_cpu, CompositeExplicitAutograd, m) { m.impl("corrects", TORCH_BOX(&corrects)); }

}  // namespace sparse24
