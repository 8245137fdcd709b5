// The kept values of a block as float32 numbers.
#pragma once
#include "activations.h"

namespace sparse24 {
namespace {

// Of one group of 4 columns the left and right values of so many rows as a register holds. Of int4 values `nibbles` are
// the words whose lowest codes are this group's; the others are at `values`.
template <class Isa, Values kValues>
INLINE void kept_values(const uint8_t* values, typename Isa::Lanes nibbles, typename Isa::Lanes& left,
                        typename Isa::Lanes& right) {
  if constexpr (kValues == Values::kFloat32) {
    left = Isa::load(values), right = Isa::load(values + kLanes * 4);
  } else if constexpr (kValues == Values::kBFloat16) {
    const auto both = Isa::load(values);
    left = Isa::low_bf16(both), right = Isa::high_bf16(both);
  } else if constexpr (kValues == Values::kFloat16) {
    const auto both = Isa::load(values);
    left = Isa::low_f16(both), right = Isa::high_f16(both);
  } else {
    const auto both = kValues == Values::kInt4 ? Isa::nibbles_to_int16(nibbles) : Isa::widen(values);
    left = Isa::low_int16(both), right = Isa::high_int16(both);
  }
}

}  // namespace
}  // namespace sparse24
