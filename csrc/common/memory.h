// Memory, or an error that says how much was asked for.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace memory {

// In the words of torch's allocator: tools that try again with a smaller batch look for them.
[[noreturn]] inline void fail(size_t bytes) {
  throw std::runtime_error(
      "DefaultCPUAllocator: can't allocate memory: you tried to allocate " + std::to_string(bytes) + " bytes");
}

// To be given back by std::free.
inline void* allocate(size_t bytes, size_t alignment) {
  void* memory;
  if (posix_memalign(&memory, alignment, bytes) != 0) fail(bytes);
  return memory;
}

}  // namespace memory
