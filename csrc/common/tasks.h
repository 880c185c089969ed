// Work cut into tasks by its shape alone, so that sums over the tasks are the same for every number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "scratch.h"

namespace tasks {

constexpr int64_t kWanted = 16, kPartialBytes = int64_t{1} << 24;

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, count).
inline Range part(int64_t index, int64_t parts, int64_t count) {
  return {index * count / parts, (index + 1) * count / parts};
}

// In how many parts to cut each of `groups` runs of `count` pieces: no part of less than `fewest` pieces, and of `sums`
// doubles each.
inline int64_t parts(int64_t groups, int64_t count, int64_t fewest, int64_t sums = 0) {
  groups = std::max<int64_t>(1, groups);
  const int64_t most = std::max<int64_t>(1, count / fewest),
                held = kPartialBytes / (8 * groups * std::max<int64_t>(1, sums));
  return std::clamp<int64_t>(std::min(kWanted / groups, held), 1, most);
}

// Tasks worth a thread of their own, when a task costs about `elements` elements.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// work(begin, end) for ranges of [0, count), on torch's threads. An error comes out as it was thrown, which torch's own
// `parallel_for` would not let it.
template <class Work>
inline void parallel(int64_t count, int64_t grain, Work&& work) {
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// `size` sums of each task.
template <class A = double>
class Partial {
 public:
  Partial(scratch::Frame& frame, int64_t tasks, int64_t size)
      : tasks_(tasks), size_(size), sums_(frame.take<A>(tasks * size)) {}

  // The sums of a task that begins: zero; null where there are none.
  A* start(int64_t task) const { return size_ ? std::fill_n(of(task), size_, A(0)) - size_ : nullptr; }
  // add(task, sums), one task after the other.
  template <class Add>
  void each(Add&& add) const {
    for (int64_t task = 0; size_ && task < tasks_; ++task) add(task, of(task));
  }
  void add_to(double* totals) const {
    each([&](int64_t, const A* sums) {
      for (int64_t i = 0; i < size_; ++i) totals[i] += sums[i];
    });
  }

 private:
  A* of(int64_t task) const { return sums_ + task * size_; }

  int64_t tasks_, size_;
  A* sums_;
};

}  // namespace tasks
