// Depthwise k x k convolutions that stream over the rows of an image: each row enters a ring of padded rows once.
//
// A task works on one channel, whose rows are cut into vectors of neighbouring pixels, or, in a channels_last image, on
// as many channels as a vector has lanes, a vector to a pixel. One pixel to the side is then one element or one vector
// away: the `step`.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>
#include <vector>

#include "tasks.h"
#include "tensor.h"

namespace stencil {

using simd::Vec;

struct Task {
  int64_t image, channel, group;
  int lanes;           // how many channels
  int64_t begin, end;  // rows
};

// The images of a forward or a backward pass; the input may be stored otherwise than the rest.
template <class T, class X = T>
struct Problem {
  int64_t batch, channels, height, width;
  const X* x;
  tensor::Strides x_strides;
  const T* grad = nullptr;
  tensor::Strides grad_strides{};
  std::vector<simd::Acc<T>> grad_sums{};  // (B, C), part of the gradient of every pixel
  T* out = nullptr;
  tensor::Strides out_strides{};
};

// Where the task's first channel begins in an image, if there is one.
template <class P>
inline P* start(P* data, const tensor::Strides& strides, const Task& task) {
  return data ? data + task.image * strides.b + task.channel * strides.c : nullptr;
}

// A (B, C, rows, ...) image cut into tasks: groups of channels, and ranges of their rows.
class Tasks {
 public:
  Tasks(int64_t batch, int64_t channels, int64_t rows, int group_size)
      : channels_(channels), rows_(rows), group_size_(group_size), groups_((channels + group_size - 1) / group_size),
        ranges_(tasks::parts(batch * groups_, rows, kFewestRows)), size_(batch * groups_ * ranges_) {}
  int64_t size() const { return size_; }
  Task operator[](int64_t i) const {
    const int64_t group = i / ranges_ % groups_, channel = group * group_size_;
    const tasks::Range range = tasks::part(i % ranges_, ranges_, rows_);
    return {
        i / ranges_ / groups_, channel,  group, static_cast<int>(std::min<int64_t>(group_size_, channels_ - channel)),
        range.begin,           range.end};
  }
  // From one number for each channel of each task, their sums over the rows, (B, C).
  std::vector<double> by_plane(const tasks::Partial<>& numbers) const {
    std::vector<double> sums(size_ ? size_ / ranges_ / groups_ * channels_ : 0);
    numbers.each([&](int64_t index, const double* of_task) {
      const Task task = (*this)[index];
      for (int lane = 0; lane < task.lanes; ++lane) sums[task.image * channels_ + task.channel + lane] += of_task[lane];
    });
    return sums;
  }

 private:
  static constexpr int64_t kFewestRows = 64;
  int64_t channels_, rows_, group_size_, groups_, ranges_, size_;
};

constexpr int kMostRows = 2;  // rows of output that are made at a time

// Row i of `rows` lies in slot i % kDepth; the rows outside are zero. kLive rows are in use at a time: from the oldest
// that is still read to the newest.
template <class A, int kLive>
struct Ring {
  static constexpr int64_t kDepth = std::bit_ceil(static_cast<uint64_t>(kLive));  // for the sake of the remainder
  A* slots;
  const A* zero;
  int64_t stride, rows;
  A* slot(int64_t i) const { return slots + (i & (kDepth - 1)) * stride; }
  const A* row(int64_t i) const { return i < 0 || i >= rows ? zero : slot(i); }
  template <size_t kCount>
  void rows_from(int64_t first, const A* (&list)[kCount]) const {
    static_assert(kCount <= kLive, "rows that were overwritten");
    for (size_t r = 0; r < kCount; ++r) list[r] = row(first + static_cast<int64_t>(r));
  }
};

// Of the rows around kMostRows rows of output.
template <class A, int k>
using WindowRing = Ring<A, kMostRows + k - 1>;

// Rows of `vectors` vectors, with zeros between them for the columns outside the image.
template <class A>
struct Padding {
  static constexpr int n = simd::kLanes<A>;
  int64_t vectors, step, margin;
  Padding(int64_t vectors, int64_t step, int k)
      : vectors(vectors), step(step), margin(((k / 2 * step) + n - 1) / n * n) {}
  int64_t stride() const { return margin + vectors * n; }
  int64_t size(int64_t rows) const { return rows * stride() + margin; }
};

// f<2>(i), f<2>(i + 2), ... and at last f<1>, over [begin, end).
template <class F>
inline void by_pairs(int64_t begin, int64_t end, F&& f) {
  static_assert(kMostRows == 2);
  int64_t i = begin;
  for (; i + 2 <= end; i += 2) f(std::integral_constant<int, 2>{}, i);
  if (i < end) f(std::integral_constant<int, 1>{}, i);
}

// f(v, true) for the vectors that are full, f(v, false) for the others; inlined, so that what f adds up stays in
// registers.
template <class F>
__attribute__((always_inline)) inline void each_vector(int64_t full, int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v < full; ++v) f(v, std::true_type{});
  for (; v < vectors; ++v) f(v, std::false_type{});
}

// Which of the lanes are among the first `count`.
template <class A>
inline auto first_lanes(int count) {
  Vec<A> lane;
  for (int i = 0; i < simd::kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  return lane < simd::broadcast<A>(count);
}
template <class A>
inline Vec<A> first_lanes(Vec<A> v, int count) {
  return first_lanes<A>(count) ? v : Vec<A>{};
}

// How a row of the image lies in vectors.
template <class T, bool kChannelsLast>
struct Line {
  using A = simd::Acc<T>;
  static constexpr int n = simd::kLanes<A>;
  static constexpr int kGroup = kChannelsLast ? n : 1;  // channels of a task, and the step from pixel to pixel
  int64_t width, pixel;                                 // pixel: elements from one pixel to the next
  int lanes;

  int64_t vectors() const { return kChannelsLast ? width : (width + n - 1) / n; }
  int64_t full() const { return kChannelsLast ? (lanes == n ? width : 0) : width / n; }
  int last_lanes() const { return kChannelsLast ? n : static_cast<int>(width - (vectors() - 1) * n); }
  int64_t at(int64_t v) const { return v * (kChannelsLast ? pixel : n); }
  int count(int64_t v) const {
    return kChannelsLast ? lanes : static_cast<int>(std::clamp<int64_t>(width - v * n, 0, n));
  }

  template <class B>
  Vec<A> load(const T* row, int64_t v, B is_full) const {
    return is_full ? simd::load(row + at(v)) : simd::load_partial(row + at(v), count(v));
  }
  template <class B>
  void store(T* row, int64_t v, Vec<A> value, B is_full) const {
    if (is_full)
      simd::store(row + at(v), value);
    else
      simd::store_partial(row + at(v), value, count(v));
  }
};

// The value of each channel of a task, one per lane, or the one channel's in all.
template <bool kChannelsLast, class A>
inline Vec<A> per_channel(const std::vector<A>& values, const Task& task, int64_t count, int64_t index) {
  if (!kChannelsLast) return simd::broadcast(values[task.channel * count + index]);
  Vec<A> v = {};
  for (int lane = 0; lane < task.lanes; ++lane) v[lane] = values[(task.channel + lane) * count + index];
  return v;
}

// The same of values (B, C).
template <bool kChannelsLast, class A>
inline Vec<A> per_plane(const std::vector<A>& values, Task task, int64_t channels) {
  task.channel += task.image * channels;
  return per_channel<kChannelsLast>(values, task, 1, 0);
}

template <class L, class T, class A>
inline void load_row(const L& line, const T* row, A* padded) {
  each_vector(line.full(), line.vectors(), [&](int64_t v, auto full) __attribute__((always_inline)) {
    simd::store(padded + v * L::n, line.load(row, v, full));
  });
}

// The pixels kSide beside those at p, which is aligned to a vector: by shuffles where half of the loads would cross
// cache lines or more. With AVX2 it is less, and a shuffle across the register's halves takes two instructions.
template <int kSide, int64_t kStep, class A>
inline Vec<A> beside(const A* p) {
  constexpr int n = simd::kLanes<A>;
  if constexpr (kStep != 1 || kSide == 0 || kSide < -n || kSide > n || simd::kBytes == 32)
    return simd::load(p + kSide * kStep);
  else if constexpr (kSide < 0)
    return simd::window<n + kSide>(simd::load(p - n), simd::load(p));
  else
    return simd::window<kSide>(simd::load(p), simd::load(p + n));
}

// x[d]: the pixels d - k / 2 beside those at p.
template <int k, int64_t kStep, class A, int... d>
__attribute__((always_inline)) inline void all_beside(const A* p, Vec<A> (&x)[k], std::integer_sequence<int, d...>) {
  ((x[d] = beside<d - k / 2, kStep>(p)), ...);
}
template <int k, int64_t kStep, class A>
__attribute__((always_inline)) inline void all_beside(const A* p, Vec<A> (&x)[k]) {
  all_beside<k, kStep>(p, x, std::make_integer_sequence<int, k>{});
}

// Whether a convolution shifts sums of columns: of neighbouring pixels in a vector, with registers enough.
template <int64_t kStep>
constexpr bool kShiftsSums = kStep == 1 && simd::kBytes == 64;

// emit(v, sums, full) gets vector v of kRows output rows, bias + weight * rows; in: the kRows + k - 1 rows around
// them.
template <int k, int kRows, int64_t kStep, class A, class F>
  requires(!kShiftsSums<kStep>)
inline void convolve(
    const A* const (&in)[kRows + k - 1], const Vec<A>* weight, Vec<A> bias, int64_t full, int64_t vectors, F&& emit) {
  constexpr int n = simd::kLanes<A>;
  Vec<A> w[k * k];
#pragma GCC unroll 32
  for (int t = 0; t < k * k; ++t) w[t] = weight[t];
  each_vector(full, vectors, [&](int64_t v, auto is_full) __attribute__((always_inline)) {
    Vec<A> sums[kRows];
    for (int o = 0; o < kRows; ++o) sums[o] = bias;
#pragma GCC unroll 8
    for (int r = 0; r < kRows + k - 1; ++r) {
      Vec<A> x[k];
      all_beside<k, kStep>(in[r] + v * n, x);
#pragma GCC unroll 8
      for (int d = 0; d < k; ++d)
#pragma GCC unroll 2
        for (int o = 0; o < kRows; ++o)
          if (r - o >= 0 && r - o < k) sums[o] += w[(r - o) * k + d] * x[d];
    }
    emit(v, sums, is_full);
  });
}

// The same by shifting not the pixels but the sums over each column of the kernel, which are fewer; each vector is
// loaded once. A vector is emitted when the sums of the second after it are made: neither has to wait for the other.
// All vectors but the last are full.
template <int k, int kRows, int64_t kStep, class A, class F>
  requires(kShiftsSums<kStep>)
__attribute__((always_inline)) inline void convolve(
    const A* const (&in)[kRows + k - 1], const Vec<A>* weight, Vec<A> bias, int64_t full, int64_t vectors, F emit) {
  constexpr int n = simd::kLanes<A>, kMiddle = k / 2;
  using Columns = Vec<A>[kRows][k];
  Vec<A> w[k * k], begun[kRows] = {}, ready[kRows];
#pragma GCC unroll 32
  for (int t = 0; t < k * k; ++t) w[t] = weight[t];
  Columns before = {};
  const A* rows[kRows + k - 1];  // a local copy, as that of `emit`, that no store can alias stays in registers
  std::copy(std::begin(in), std::end(in), rows);

  // Makes vector v - 1 of the output ready; beyond the last vector all is zero.
  auto advance = [&](int64_t v, auto is_inside) __attribute__((always_inline)) {
    Columns now = {};
#pragma GCC unroll 8
    for (int r = 0; is_inside && r < kRows + k - 1; ++r) {
      const Vec<A> x = simd::load(rows[r] + v * n);
#pragma GCC unroll 2
      for (int o = 0; o < kRows; ++o)
#pragma GCC unroll 8
        for (int d = 0; d < k; ++d) {
          if (r == o) now[o][d] = d == kMiddle ? bias + w[d] * x : w[d] * x;
          if (r > o && r - o < k) now[o][d] += w[(r - o) * k + d] * x;
        }
    }
    const auto shift = [&]<int... d>(std::integer_sequence<int, d...>) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int o = 0; o < kRows; ++o) {
        ready[o] = begun[o];
        ((ready[o] += simd::window<d + 1>(before[o][kMiddle + 1 + d], now[o][kMiddle + 1 + d])), ...);
        begun[o] = now[o][kMiddle];
        ((begun[o] += simd::window<n - 1 - d>(before[o][kMiddle - 1 - d], now[o][kMiddle - 1 - d])), ...);
      }
    };
    shift(std::make_integer_sequence<int, kMiddle>{});
#pragma GCC unroll 2
    for (int o = 0; o < kRows; ++o)
#pragma GCC unroll 8
      for (int d = 0; d < k; ++d) before[o][d] = now[o][d];
  };

  advance(0, std::true_type{});
  for (int64_t v = 1; v < vectors; ++v) {
    Vec<A> sums[kRows];
    for (int o = 0; o < kRows; ++o) sums[o] = ready[o];
    advance(v, std::true_type{});
    if (v > 1) emit(v - 2, sums, std::true_type{});
  }
  if (vectors > 1) emit(vectors - 2, ready, std::true_type{});
  advance(vectors, std::false_type{});
  if (full == vectors)
    emit(vectors - 1, ready, std::true_type{});
  else
    emit(vectors - 1, ready, std::false_type{});
}

// Adds to sums[tap] the products of `grad` with the rows shifted by that tap, and to sums[k * k] `grad` itself; with
// kConvolve, `emit` gets what it gets from `convolve`. Only the first `last_lanes` lanes of the last vector count in
// the sums: the products of padding would turn infinities into NaN. Not inlined: in larger functions GCC keeps the sums
// in memory.
template <bool kConvolve, int k, int kRows, int64_t kStep, class A, class F>
  requires(k <= 5)
__attribute__((noinline)) void correlate(
    const A* const (&in)[kRows + k - 1], const A* const (&grad)[kRows], Vec<A>* sums, int64_t vectors, int last_lanes,
    const Vec<A>* weight, Vec<A> bias, F&& emit) {
  constexpr int n = simd::kLanes<A>;
  const int64_t full = last_lanes == n ? vectors : vectors - 1;
  const auto counted = first_lanes<A>(last_lanes);
  Vec<A> total[k * k + 1], w[k * k];
#pragma GCC unroll 32
  for (int t = 0; t <= k * k; ++t) total[t] = sums[t];  // unrolled, not std::copy, so that they stay in registers
  if (kConvolve) {
#pragma GCC unroll 32
    for (int t = 0; t < k * k; ++t) w[t] = weight[t];
  }
  each_vector(full, vectors, [&](int64_t v, auto is_full) __attribute__((always_inline)) {
    Vec<A> g[kRows], convolved[kRows];
    for (int o = 0; o < kRows; ++o) {
      g[o] = simd::load(grad[o] + v * n);
      total[k * k] += g[o];
      convolved[o] = bias;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows + k - 1; ++r) {
      Vec<A> x[k];
      all_beside<k, kStep>(in[r] + v * n, x);
#pragma GCC unroll 8
      for (int d = 0; d < k; ++d) {
        const Vec<A> in_image = is_full ? x[d] : counted ? x[d] : Vec<A>{};
#pragma GCC unroll 2
        for (int o = 0; o < kRows; ++o) {
          const int tap = (r - o) * k + d;
          if (r < o || r - o >= k) continue;
          total[tap] += g[o] * in_image;
          if (kConvolve) convolved[o] += w[tap] * x[d];
        }
      }
    }
    if constexpr (kConvolve) emit(v, convolved, is_full);
  });
#pragma GCC unroll 32
  for (int t = 0; t <= k * k; ++t) sums[t] = total[t];
}

// The same for a kernel whose sums are too many for the registers: one of its rows at a time.
template <bool kConvolve, int k, int kRows, int64_t kStep, class A, class F>
  requires(k > 5)
inline void correlate(
    const A* const (&in)[kRows + k - 1], const A* const (&grad)[kRows], Vec<A>* sums, int64_t vectors, int last_lanes,
    const Vec<A>* weight, Vec<A> bias, F&& emit) {
  constexpr int n = simd::kLanes<A>;
  const int64_t full = last_lanes == n ? vectors : vectors - 1;
  const auto counted = first_lanes<A>(last_lanes);
  for (int row = 0; row < k; ++row) {
    Vec<A> total[k], all = {};
#pragma GCC unroll 8
    for (int d = 0; d < k; ++d) total[d] = sums[row * k + d];
    each_vector(full, vectors, [&](int64_t v, auto is_full) __attribute__((always_inline)) {
      for (int o = 0; o < kRows; ++o) {
        const Vec<A> g = simd::load(grad[o] + v * n);
        all += g;
        Vec<A> x[k];
        all_beside<k, kStep>(in[row + o] + v * n, x);
#pragma GCC unroll 8
        for (int d = 0; d < k; ++d) total[d] += g * (is_full ? x[d] : counted ? x[d] : Vec<A>{});
      }
    });
#pragma GCC unroll 8
    for (int d = 0; d < k; ++d) sums[row * k + d] = total[d];
    if (row == 0) sums[k * k] += all;
  }
  if (kConvolve) convolve<k, kRows, kStep>(in, weight, bias, full, vectors, emit);
}

// What to do with the vectors of convolved rows, of types that do not depend on the images', so that all share the
// loops: nothing, ...
struct Ignore {
  template <class V, class B>
  void operator()(int64_t, V&, B) const {}
};
// ... or to keep them in rows `stride` apart.
template <class A>
struct Keep {
  A* to;
  int64_t stride;
  template <int kRows, class B>
  __attribute__((always_inline)) void operator()(int64_t v, Vec<A> (&value)[kRows], B) const {
    for (int o = 0; o < kRows; ++o) simd::store(to + o * stride + v * simd::kLanes<A>, value[o]);
  }
};

// The sums over the pixels of images like `x`, (B, C), as an operator returns them: empty where they were not asked
// for.
inline tensor::Tensor plane_sums(const tensor::Tensor& x, bool needed, const std::vector<double>& sums) {
  const auto size = needed ? std::vector<int64_t>{x.size(0), x.size(1)} : std::vector<int64_t>{0};
  return tensor::write(x, size, tensor::dtype_of_sums(x.scalar_type()), sums.data());
}

// Their gradient: zero where there is none.
template <class A>
inline std::vector<A> read_plane_sums(const tensor::Tensor& x, const std::optional<tensor::Tensor>& grad_sums) {
  return grad_sums ? tensor::read<A>(*grad_sums) : std::vector<A>(x.size(0) * x.size(1));
}

// f(k) with the kernel size as a type.
template <class F, int... k>
inline void specialise_kernel(int64_t size, F&& f, std::integer_sequence<int, k...>) {
  const bool matched = ((size == k && (f(std::integral_constant<int, k>{}), true)) || ...);
  STD_TORCH_CHECK(matched, "there is no kernel of ", size, " x ", size);
}
template <class F>
inline void specialise_kernel(int64_t size, F&& f) {
  specialise_kernel(size, f, std::integer_sequence<int, 3, 5, 7>{});
}

// f(T*, channels_last, k) with the storage type, the layout and the kernel size as types.
template <class F>
inline void specialise(const tensor::Tensor& x, bool channels_last, int64_t k, F&& f) {
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    specialise_kernel(k, [&](auto kernel) {
      if (channels_last)
        f(tag, std::true_type{}, kernel);
      else
        f(tag, std::false_type{}, kernel);
    });
  });
}

}  // namespace stencil
