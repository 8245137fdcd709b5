// Any processor: the 16 lanes are an array, and the compiler makes of it what it can.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O2")  // -O3 takes half a minute to unroll what nobody will run
#endif
#include "linear.h"

namespace sparse24 {
namespace {

constexpr int kLeft[8] = {0, 0, 0, 1, 1, 2, 0, 0}, kRight[8] = {1, 2, 3, 2, 3, 3, 0, 0};

template <class To, class From>
INLINE To bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

struct Portable {
  struct Lanes { uint32_t at[kLanes]; };
  struct Table { uint32_t at[16]; };
  using Codes = Lanes;
  static constexpr int kRows = kLanes, kTable = 64, kTokens = 4;
  static constexpr bool kDotBf16 = false, kManyColumns = false;

  template <class Make>
  static INLINE Lanes each(Make make) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.at[i] = make(i);
    return out;
  }
  static INLINE Lanes load(const void* from) {
    Lanes out;
    __builtin_memcpy(&out, from, sizeof(out));
    return out;
  }
  static INLINE void store(void* to, const Lanes& lanes) { __builtin_memcpy(to, &lanes, sizeof(lanes)); }
  static INLINE Codes codes(const uint8_t* from) { return load(from); }
  static INLINE Codes next(const Codes& codes) { return each([&](int i) { return codes.at[i] >> 4; }); }
  static INLINE Table table(const uint8_t* from) {
    Table out;
    __builtin_memcpy(&out, from, sizeof(out));
    return out;
  }
  template <int kHalf>
  static INLINE Lanes pick(const Table& table, const Codes& codes) {
    return each([&](int i) { return table.at[8 * kHalf + (codes.at[i] & 7)]; });
  }
  static INLINE Lanes low_bf16(const Lanes& both) { return each([&](int i) { return both.at[i] << 16; }); }
  static INLINE Lanes high_bf16(const Lanes& both) { return each([&](int i) { return both.at[i] & 0xffff0000u; }); }
  static INLINE Lanes low_f16(const Lanes& both) {
    return each([&](int i) { return bits<uint32_t>(from_f16(static_cast<uint16_t>(both.at[i]))); });
  }
  static INLINE Lanes high_f16(const Lanes& both) {
    return each([&](int i) { return bits<uint32_t>(from_f16(static_cast<uint16_t>(both.at[i] >> 16))); });
  }
  static INLINE Lanes low_int16(const Lanes& both) {
    return each([&](int i) { return bits<uint32_t>(static_cast<float>(static_cast<int16_t>(both.at[i]))); });
  }
  static INLINE Lanes high_int16(const Lanes& both) {
    return each([&](int i) { return bits<uint32_t>(static_cast<float>(static_cast<int16_t>(both.at[i] >> 16))); });
  }
  static INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& sum) {
    return each([&](int i) {
      return bits<uint32_t>(bits<float>(a.at[i]) * bits<float>(b.at[i]) + bits<float>(sum.at[i]));
    });
  }
  static INLINE Lanes multiply_add_in_place(const Lanes& a, const Lanes& b, const Lanes& sum) {
    return multiply_add(a, b, sum);
  }
  static INLINE Lanes widen(const uint8_t* from) {
    return each([&](int i) {
      const uint32_t left = static_cast<uint16_t>(static_cast<int8_t>(from[2 * i]));
      const uint32_t right = static_cast<uint16_t>(static_cast<int8_t>(from[2 * i + 1]));
      return left | right << 16;
    });
  }
  static INLINE Lanes zero() { return {}; }
  static INLINE Lanes next_nibbles(const Lanes& words) {
    return each([&](int i) { return (words.at[i] >> 4 & 0x0fff0fffu); });
  }
  static INLINE Lanes nibbles_to_int16(const Lanes& words) {
    return each([&](int i) {
      const uint32_t left = ((words.at[i] & 15) ^ 8) - 8, right = ((words.at[i] >> 16 & 15) ^ 8) - 8;
      return (left & 0xffff) | right << 16;
    });
  }
  static INLINE void spread(const float* x, uint8_t* to) {
    float out[16];
    for (int p = 0; p < 8; ++p) out[p] = x[kLeft[p]], out[8 + p] = x[kRight[p]];
    __builtin_memcpy(to, out, sizeof(out));
  }
};

}  // namespace

void portable::run(const Linear& op, int64_t first, int64_t last) { run_any<Portable>(op, first, last); }

}  // namespace sparse24
