// Vectors that end where a page begins that may not be touched. The sanitizers do not see what assembly reads and writes,
// such as tiles of AMX; the processor does. What lies before one is poisoned.
#pragma once
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

template <class T>
struct Guarded {
  using value_type = T;
  static constexpr size_t kPage = 4096;

  Guarded() = default;
  template <class U>
  Guarded(const Guarded<U>&) {}

  static size_t mapped(size_t count) { return (count * sizeof(T) + kPage - 1) / kPage * kPage; }
  T* allocate(size_t count) {
    const size_t bytes = mapped(count), before = bytes - count * sizeof(T);
    void* start = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<uint8_t*>(start) + bytes, kPage, PROT_NONE)) throw std::bad_alloc();
    ASAN_POISON_MEMORY_REGION(start, before);
    return reinterpret_cast<T*>(static_cast<uint8_t*>(start) + before);
  }
  void deallocate(T* data, size_t count) {
    const size_t bytes = mapped(count);
    uint8_t* start = reinterpret_cast<uint8_t*>(data) + count * sizeof(T) - bytes;
    ASAN_UNPOISON_MEMORY_REGION(start, bytes);
    munmap(start, bytes + kPage);
  }
  bool operator==(const Guarded&) const { return true; }
};

template <class T>
using GuardedVector = std::vector<T, Guarded<T>>;
