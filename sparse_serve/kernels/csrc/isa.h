// Which of the kernel's instruction sets a processor has, and why another one is refused. No torch here.
#pragma once
#include <cstdint>
#include <string>

namespace sparse24 {

constexpr const char* kIsas[] = {"portable", "avx2", "avx512"};  // by number, each with those before it
constexpr int64_t kIsaCount = sizeof(kIsas) / sizeof(*kIsas);

// The number of the best one that this processor, and its operating system, can run.
inline int64_t best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bf16");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

// Empty, or why code for the instruction set `wanted` (-1: the best) must not run on a processor whose best is `best`.
inline std::string isa_refusal(int64_t wanted, int64_t best) {
  if (wanted >= -1 && wanted <= best) return "";
  const std::string known = wanted >= 0 && wanted < kIsaCount ? std::string(" (") + kIsas[wanted] + ")" : "";
  const char* why = known.empty() ? ", which is none" : ", which this processor lacks";
  return "isa is " + std::to_string(wanted) + known + why + "; expected -1 (the best here) or 0 to " +
         std::to_string(best) + " (" + kIsas[best] + ")";
}

}  // namespace sparse24
