// Depthwise k x k convolution and GELU: the forward pass over the rows of one channel (or one vector of channels).
#pragma once

#include "accumulate.h"
#include "gelu.h"
#include "stencil.h"

namespace spatial {

using simd::Acc;
using simd::Vec;
using stencil::Line;
using stencil::Padding;
using stencil::Problem;
using stencil::Task;

template <class A>
struct Parameters {
  std::vector<A> weight, bias;
};

// A task's ring of rows. Its output may come in several runs, each of the rows that follow the last run's.
template <class T, bool kChannelsLast, int k, class X = T>
class Forward {
 public:
  using A = Acc<T>;
  using Lines = Line<T, kChannelsLast>;
  using Images = Problem<T, X>;
  using Rows = stencil::WindowRing<A, k>;
  static constexpr int64_t kStep = Lines::kGroup;

  static Padding<A> padding(int64_t width) { return Padding<A>(Lines{width, 0, 0}.vectors(), kStep, k); }
  // Elements of the memory of a ring, which must hold zeros.
  static int64_t size(int64_t width) { return padding(width).size(Rows::kDepth + 1); }

  Forward(A* memory, const Images& g, const Task& task) : loaded_(std::max<int64_t>(0, task.begin - k / 2)) {
    const Padding<A> p = padding(g.width);
    rows_ = {memory + p.margin, memory + p.margin + Rows::kDepth * p.stride(), p.stride(), g.height};
  }

  // Output rows [begin, end), from the rows of x up to `available`. With kSums, adds their sums to those of the task's
  // channels.
  template <bool kSums>
  void run(
      const Images& g, const Parameters<A>& p, const Task& task, int64_t begin, int64_t end, int64_t available,
      double* totals) {
    const Line<X, kChannelsLast> in{g.width, g.x_strides.w, task.lanes};
    const Lines out{g.width, g.out_strides.w, task.lanes};
    const X* x = stencil::start(g.x, g.x_strides, task);
    T* y = stencil::start(g.out, g.out_strides, task);
    const int64_t stride = g.out_strides.h;
    Vec<A> w[k * k];
    for (int t = 0; t < k * k; ++t) w[t] = stencil::per_channel<kChannelsLast>(p.weight, task, k * k, t);
    const Vec<A> b = stencil::per_channel<kChannelsLast>(p.bias, task, 1, 0);
    accumulate::Sums<A, 1> sums;
    const Rows rows = rows_;  // a local copy that no store can alias stays in registers
    int64_t loaded = loaded_;
    auto load_to = [&](int64_t row) {
      for (; loaded < std::min(available, row); ++loaded)
        stencil::load_row(in, x + loaded * g.x_strides.h, rows.slot(loaded));
    };
    stencil::by_pairs(begin, end, [&](auto count, int64_t i) {
      constexpr int kRows = count;
      load_to(i + kRows + k / 2);
      const A* around[kRows + k - 1];
      rows.rows_from(i - k / 2, around);
      Vec<A> run = sums.run[0];
      T* const row = y + i * stride;
      stencil::convolve<k, kRows, kStep>(
          around, w, b, out.full(), out.vectors(),
          [=, &run](int64_t v, auto& z, auto full) __attribute__((always_inline)) {
            for (int o = 0; o < kRows; ++o) {
              const Vec<A> value = simd::gelu_of<T>(z[o]);
              out.store(row + o * stride, v, value, full);
              if (kSums) run += full ? value : stencil::first_lanes<A>(value, out.count(v));
            }
          });
      if (kSums) {
        sums.run[0] = run;
        sums.count(out.vectors() * kRows);
      }
    });
    load_to(available);
    loaded_ = loaded;
    if (!kSums) return;
    sums.flush();
    for (int lane = 0; lane < task.lanes; ++lane) totals[lane] += kChannelsLast ? sums.lane(0, lane) : sums.sum(0);
  }

 private:
  Rows rows_;
  int64_t loaded_;
};

}  // namespace spatial
