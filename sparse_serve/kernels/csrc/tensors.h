// What the torch operators of the CPU kernel ask of tensors.
#pragma once
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "layout.h"

namespace sparse24 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor in an error: `Float [3, 256]`, as C++ names the type.
inline std::string text(const Tensor& tensor) {
  std::string sizes;
  for (int64_t size : tensor.sizes()) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  const char* strided = tensor.is_contiguous() ? "" : ", not contiguous";
  return std::string(torch::headeronly::toString(tensor.scalar_type())) + " [" + sizes + "]" + strided;
}

inline Floats floats_of(ScalarType type) {
  if (type == ScalarType::BFloat16) return Floats::kBFloat16;
  if (type == ScalarType::Half) return Floats::kFloat16;
  STD_TORCH_CHECK(type == ScalarType::Float, "x is ", type, ", expected BFloat16, Half or Float");
  return Floats::kFloat32;
}

// `tensor`, called `name`, is of `type` and contiguous with `rows` numbers.
inline void check_per_row(const Tensor& tensor, const char* name, ScalarType type, int64_t rows) {
  STD_TORCH_CHECK(tensor.numel() == rows && tensor.scalar_type() == type && tensor.is_contiguous(), name, " is ",
                  text(tensor), ", expected contiguous ", type, " [", rows, "]");
}

// 2 MiB pages: with 4 KiB ones a sequential read is a quarter slower. Advice only, so failure is fine. Not for less than
// such a page: every range with advice of its own counts against the 65,530 that a process may have.
inline void advise_huge_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, from = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
  if (bytes >= 2 << 20) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// Not initialised, on the CPU. torch::stable::new_empty looks its operator up by name at each call, as contiguous does,
// which takes longer than a small layer's products.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// y for it, [..., rows].
inline Tensor outputs(const Tensor& x, Linear& op) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = op.rows;
  Tensor y = empty(shape, x.scalar_type());
  op.y = y.mutable_data_ptr();
  return y;
}

}  // namespace sparse24
