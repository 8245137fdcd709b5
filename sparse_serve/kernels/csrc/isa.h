// Which of the kernel's instruction sets a processor has, and why another one is refused. No torch here.
#pragma once
#include <cstdint>
#include <string>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define SPARSE24_AMX 1  // the compiler is not too old to have an assembler that knows tiles
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define SPARSE24_AMX 0
#endif

namespace sparse24 {

constexpr const char* kIsas[] = {"portable", "avx2", "avx512", "amx"};  // by number, each with those before it
constexpr int64_t kIsaCount = sizeof(kIsas) / sizeof(*kIsas);

// What a processor may do with tiles; bits of what CPUID says.
constexpr unsigned kTilesOfBFloat16 = 1u << 22, kTilesOfInt8 = 1u << 25;

#if SPARSE24_AMX
// Whether the processor has tiles, the operating system keeps them for a thread that waits, and this process may use
// them: Linux wants to be asked, and a sandbox may refuse.
inline bool tiles_are_given() {
  constexpr unsigned kOsXsave = 1u << 27, kBoth = 3u << 17, kTile = 1u << 24;
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kBoth) == kBoth && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}

// Whether this process may multiply tiles of `numbers`.
inline bool may_use_amx(unsigned numbers) {
  static const bool given = tiles_are_given();  // asked once
  unsigned a, b, c, d;
  return given && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & numbers);
}
#else
inline bool may_use_amx(unsigned) { return false; }
#endif

// The number of the best one that this processor, and its operating system, can run.
inline int64_t best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bf16");
  static const bool amx = avx512 && may_use_amx(kTilesOfBFloat16);
  return amx ? 3 : avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

// Whether prefetching weights pays with one token, and with int8 activations of up to three. On a Zen 4 it does not: the
// processor is ahead by itself, and faster left alone. On a Xeon with AMX, two threads, it does: of one token 4096 x 4096
// took 1.25 ms in bfloat16 without and 0.83 ms with it, 14336 x 4096 with int4 values and int8 activations 1.72 and 1.24.
inline bool gains_by_prefetch() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Whether it has what dense_int8.cpp is compiled for.
inline bool has_vnni() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return best_isa() >= 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Whether it has what vnni.cpp is compiled for.
inline bool has_vbmi() {
#if defined(__x86_64__)
  return has_vnni() && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

// Whether it has what amx_int8.cpp is compiled for, too.
inline bool has_int8_tiles() {
  static const bool has = has_vbmi() && may_use_amx(kTilesOfInt8);
  return has;
}

// The number of the best set for rounded activations: with AVX-512 it takes VNNI and VBMI, and 0 is none.
inline int64_t best_int8_isa() { return has_int8_tiles() ? 3 : has_vbmi() ? 2 : best_isa() >= 1 ? 1 : 0; }

// Empty, or why code for the instruction set `wanted` (-1: the best) must not run on a processor whose best is `best`.
inline std::string isa_refusal(int64_t wanted, int64_t best) {
  if (wanted >= -1 && wanted <= best) return "";
  const std::string known = wanted >= 0 && wanted < kIsaCount ? std::string(" (") + kIsas[wanted] + ")" : "";
  const char* why = known.empty() ? ", which is none" : ", which this processor lacks";
  return "isa is " + std::to_string(wanted) + known + why + "; expected -1 (the best here) or 0 to " +
         std::to_string(best) + " (" + kIsas[best] + ")";
}

}  // namespace sparse24
