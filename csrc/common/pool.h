// Memory for large results, kept when they are freed. glibc's malloc gives large blocks back to the system (beyond 32
// MiB always, below when enough is free), and fresh pages cost more than most operators' arithmetic on them.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#endif

#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "memory.h"

namespace pool {

constexpr size_t kSmallest = size_t{1} << 22, kKept = size_t{1} << 27, kHugePage = size_t{1} << 21;

class Pool;
Pool& instance();

class Pool {
 public:
  struct Block {
    void* memory;
    size_t bytes;
  };

  // At least `bytes` bytes, in huge pages where the system gives them; to be given back.
  Block take(size_t bytes) {
    const size_t asked = bytes;
    bytes = rounded(bytes);
    if (const std::optional<Block> block = idle(bytes)) return bounded(*block, asked);
    void* memory = std::aligned_alloc(kHugePage, bytes);
    if (!memory) {
      clear();
      memory = memory::allocate(bytes, kHugePage);
    }
    madvise(memory, bytes, MADV_HUGEPAGE);
    return bounded({memory, bytes}, asked);
  }

  void give(Block block) {
    if (block.bytes > kKept) return std::free(block.memory);
    bounded(block, 0);
    const std::lock_guard lock(mutex_);
    idle_.push_back(block);
    kept_ += block.bytes;
    release_beyond(kKept);
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    release_beyond(0);
  }

 private:
  // For an address sanitizer: what lies beyond these bytes is nobody's.
  static Block bounded(Block block, size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(block.memory, bytes);
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(block.memory) + bytes, block.bytes - bytes);
    return block;
  }

  // To an eighth of the next power of two, so that results of almost one size share blocks.
  static size_t rounded(size_t bytes) {
    size_t step = kHugePage;
    while (step * 8 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  // The smallest idle block that wastes little of itself; if there is none, blocks of other sizes make room.
  std::optional<Block> idle(size_t bytes) {
    const std::lock_guard lock(mutex_);
    size_t best = idle_.size();
    for (size_t i = idle_.size(); i-- > 0;)
      if (idle_[i].bytes >= bytes && idle_[i].bytes - bytes <= bytes / 4 &&
          (best == idle_.size() || idle_[i].bytes < idle_[best].bytes))
        best = i;
    if (best == idle_.size()) {
      release_beyond(kept_ > bytes ? kept_ - bytes : 0);
      return std::nullopt;
    }
    const Block block = idle_[best];
    idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
    kept_ -= block.bytes;
    return block;
  }

  // The longest idle first.
  void release_beyond(size_t limit) {
    size_t count = 0;
    for (; kept_ > limit; ++count) {
      kept_ -= idle_[count].bytes;
      std::free(idle_[count].memory);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(count));
  }

  friend Pool& instance();
  // `give` runs in destructors and may not fail: there is room for all that is ever kept. A child of fork() gets the
  // pool whole and unlocked, whatever its parent's threads are at.
  Pool() {
    idle_.reserve(kKept / kSmallest + 1);
    pthread_atfork(
        [] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::vector<Block> idle_;
  size_t kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
inline Pool& instance() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace pool
