// Scratch memory of one thread, kept between calls: fresh large memory costs more in page faults than the arithmetic on
// it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "memory.h"

namespace scratch {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kOneAllocationAPiece = true;  // the sanitizer sees where each ends
#else
constexpr bool kOneAllocationAPiece = false;
#endif
constexpr size_t kAlign = 64, kSmallestChunk = size_t{1} << 20, kKept = size_t{1} << 26;

class Stack {
 public:
  struct Mark {
    size_t chunk, used;
  };

  Mark mark() const { return at_; }

  void* take(size_t bytes) {
    if (kOneAllocationAPiece) {
      at_ = {chunks_.size() + 1, 0};
      return chunks_.emplace_back(bytes).memory.get();
    }
    bytes = (bytes + kAlign - 1) / kAlign * kAlign;
    while (at_.chunk < chunks_.size() && at_.used + bytes > chunks_[at_.chunk].size) at_ = {at_.chunk + 1, 0};
    if (at_.chunk == chunks_.size()) chunks_.emplace_back(std::max({bytes, kSmallestChunk, total()}));
    void* memory = chunks_[at_.chunk].memory.get() + at_.used;
    at_.used += bytes;
    return memory;
  }

  void rewind(Mark mark) {
    at_ = mark;
    if (kOneAllocationAPiece) chunks_.erase(chunks_.begin() + static_cast<std::ptrdiff_t>(mark.chunk), chunks_.end());
    if (at_.chunk == 0 && at_.used == 0 && total() > kKept) chunks_.clear();
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  struct Chunk {
    explicit Chunk(size_t bytes) : memory(static_cast<char*>(memory::allocate(bytes, kAlign))), size(bytes) {}
    std::unique_ptr<char, Free> memory;
    size_t size;
  };

  size_t total() const {
    size_t sum = 0;
    for (const Chunk& chunk : chunks_) sum += chunk.size;
    return sum;
  }

  std::vector<Chunk> chunks_;
  Mark at_{0, 0};
};

inline Stack& stack() {
  thread_local Stack instance;
  return instance;
}

// What is taken from a frame lives as long as the frame; frames of one thread nest.
class Frame {
 public:
  Frame() : mark_(stack().mark()) {}
  ~Frame() { stack().rewind(mark_); }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(stack().take(count * sizeof(T)));
  }
  template <class T>
  T* zeros(int64_t count) {
    T* memory = take<T>(count);
    std::memset(static_cast<void*>(memory), 0, count * sizeof(T));
    return memory;
  }

 private:
  Stack::Mark mark_;
};

}  // namespace scratch
