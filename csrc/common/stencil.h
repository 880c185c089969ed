// Depthwise k x k convolutions that stream over the rows of an image: each row enters a ring of padded rows once.
//
// A task works on one channel, whose rows are cut into vectors of neighbouring pixels, or, in a channels_last image, on as many
// channels as a vector has lanes, a vector to a pixel. One pixel to the side is then one element or one vector away: the `step`.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace stencil {

using simd::Vec;

struct Task {
  int64_t image, channel, group;
  int lanes;  // how many channels
  int64_t begin, end;  // rows
};

// The images of a forward or a backward pass.
template <class T>
struct Problem {
  int64_t batch, channels, height, width;
  const T* x;
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

// A (B, C, rows, ...) image cut into tasks by its shape alone, so that sums over tasks are the same for every number of threads.
class Tasks {
 public:
  Tasks(int64_t batch, int64_t channels, int64_t rows, int group_size)
      : channels_(channels), rows_(rows), group_size_(group_size), groups_((channels + group_size - 1) / group_size) {
    const int64_t columns = std::max<int64_t>(1, batch * groups_);
    ranges_ = std::clamp<int64_t>(kWanted / columns, 1, std::max<int64_t>(1, rows / kFewestRows));
    size_ = batch * groups_ * ranges_;
  }
  int64_t size() const { return size_; }
  Task operator[](int64_t i) const {
    const int64_t range = i % ranges_, group = i / ranges_ % groups_, channel = group * group_size_;
    return {i / ranges_ / groups_, channel, group, static_cast<int>(std::min<int64_t>(group_size_, channels_ - channel)),
            range * rows_ / ranges_, (range + 1) * rows_ / ranges_};
  }
  // From one number for each channel of each task, group_size a task, their sums over the rows, (B, C).
  std::vector<double> by_plane(const std::vector<double>& numbers) const {
    std::vector<double> sums(size_ / ranges_ / groups_ * channels_);
    for (int64_t index = 0; index < size_; ++index) {
      const Task task = (*this)[index];
      for (int lane = 0; lane < task.lanes; ++lane)
        sums[task.image * channels_ + task.channel + lane] += numbers[index * group_size_ + lane];
    }
    return sums;
  }
  // Tasks worth a thread of their own, when a task costs about `elements` elements.
  static int64_t grain(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

 private:
  static constexpr int64_t kWanted = 16, kFewestRows = 64;
  int64_t channels_, rows_, group_size_, groups_, ranges_ = 1, size_ = 0;
};

// Zeroed memory of this thread, valid until its next call.
template <class A>
inline A* workspace(size_t count) {
  struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  thread_local Buffer buffer;
  const size_t size = (count * sizeof(A) + 4095) / 4096 * 4096;
  if (buffer.size < size) {
    std::free(buffer.memory);
    buffer.memory = std::aligned_alloc(4096, size);
    buffer.size = buffer.memory ? size : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  std::memset(buffer.memory, 0, count * sizeof(A));
  return static_cast<A*>(buffer.memory);
}

// Row i of `rows` lies in slot i % kDepth; the rows outside are zero.
template <class A, int64_t kDepth>
struct Ring {
  static_assert((kDepth & (kDepth - 1)) == 0, "a power of two, for the sake of the remainder");
  A* slots;
  const A* zero;
  int64_t stride, rows;
  A* slot(int64_t i) const { return slots + (i & (kDepth - 1)) * stride; }
  const A* row(int64_t i) const { return i < 0 || i >= rows ? zero : slot(i); }
};

// Rows of `vectors` vectors, with zeros between them for the columns outside the image.
template <class A>
struct Padding {
  static constexpr int n = simd::kLanes<A>;
  int64_t vectors, step, margin;
  Padding(int64_t vectors, int64_t step, int k) : vectors(vectors), step(step), margin(step == 1 ? n : k / 2 * step) {}
  int64_t stride() const { return margin + vectors * n; }
  int64_t size(int64_t rows) const { return rows * stride() + margin; }
};

// f<2>(i), f<2>(i + 2), ... and at last f<1>, over [begin, end).
template <class F>
inline void by_pairs(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + 2 <= end; i += 2) f(std::integral_constant<int, 2>{}, i);
  if (i < end) f(std::integral_constant<int, 1>{}, i);
}

// f(v, true) for the vectors that are whole, f(v, false) for the others; inlined, so that what f adds up stays in registers.
template <class F>
__attribute__((always_inline)) inline void each_vector(int64_t whole, int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v < whole; ++v) f(v, std::true_type{});
  for (; v < vectors; ++v) f(v, std::false_type{});
}

template <class A>
inline auto first_lanes(Vec<A> v, int count) {
  Vec<A> lane;
  for (int i = 0; i < simd::kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  return lane < simd::broadcast<A>(count) ? v : Vec<A>{};
}

// How a row of the image lies in vectors.
template <class T, bool kChannelsLast>
struct Line {
  using A = simd::Acc<T>;
  static constexpr int n = simd::kLanes<A>;
  static constexpr int kGroup = kChannelsLast ? n : 1;  // channels of a task, and the step from pixel to pixel
  int64_t width, pixel;  // pixel: elements from one pixel to the next
  int lanes;

  int64_t vectors() const { return kChannelsLast ? width : (width + n - 1) / n; }
  int64_t whole() const { return kChannelsLast ? (lanes == n ? width : 0) : width / n; }
  int last_lanes() const { return kChannelsLast ? n : static_cast<int>(width - (vectors() - 1) * n); }
  int64_t at(int64_t v) const { return v * (kChannelsLast ? pixel : n); }
  int count(int64_t v) const { return kChannelsLast ? lanes : static_cast<int>(std::clamp<int64_t>(width - v * n, 0, n)); }

  template <class B>
  Vec<A> load(const T* row, int64_t v, B is_whole) const {
    return is_whole ? simd::load(row + at(v)) : simd::load_partial(row + at(v), count(v));
  }
  template <class B>
  void store(T* row, int64_t v, Vec<A> value, B is_whole) const {
    if (is_whole)
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
  each_vector(line.whole(), line.vectors(), [&](int64_t v, auto whole) __attribute__((always_inline)) {
    simd::store(padded + v * L::n, line.load(row, v, whole));
  });
}

// The pixels kSide beside those at p, which is aligned to a vector: by shuffles where half of the loads would cross cache lines or
// more. With AVX2 it is less, and a shuffle across the register's halves takes two instructions.
template <int kSide, int64_t kStep, class A>
inline Vec<A> beside(const A* p) {
  constexpr int n = simd::kLanes<A>;
  if constexpr (kStep != 1 || kSide == 0 || simd::kBytes == 32)
    return simd::load(p + kSide * kStep);
  else if constexpr (kSide < 0)
    return simd::window<n + kSide>(simd::load(p - n), simd::load(p));
  else
    return simd::window<kSide>(simd::load(p), simd::load(p + n));
}

template <int... I, class F>
inline void each_of(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0), ..., f(kCount - 1), the arguments as types.
template <int kCount, class F>
inline void each_of(F&& f) {
  each_of(std::make_integer_sequence<int, kCount>{}, f);
}

// emit(v, sums, whole) gets vector v of kRows output rows, bias + weight * rows; in: the kRows + k - 1 rows around them.
template <int k, int kRows, int64_t kStep, class A, class F>
inline void convolve(const A* const (&in)[kRows + k - 1], const Vec<A>* weight, Vec<A> bias, int64_t whole, int64_t vectors, F&& emit) {
  constexpr int n = simd::kLanes<A>;
  Vec<A> w[k * k];
#pragma GCC unroll 32
  for (int t = 0; t < k * k; ++t) w[t] = weight[t];
  each_vector(whole, vectors, [&](int64_t v, auto is_whole) __attribute__((always_inline)) {
    Vec<A> sums[kRows];
    for (int o = 0; o < kRows; ++o) sums[o] = bias;
    each_of<kRows + k - 1>([&](auto r) __attribute__((always_inline)) {
      each_of<k>([&](auto d) __attribute__((always_inline)) {
        const Vec<A> x = beside<d - k / 2, kStep>(in[r] + v * n);
        each_of<kRows>([&](auto o) __attribute__((always_inline)) {
          if constexpr (r - o >= 0 && r - o < k) sums[o] += w[(r - o) * k + d] * x;
        });
      });
    });
    emit(v, sums, is_whole);
  });
}

// Adds to sums[tap] the products of `grad` with the rows shifted by that tap, and to sums[k * k] `grad` itself; with kConvolve,
// `emit` gets what it gets from `convolve`. Only the first `last_lanes` lanes of the last vector count in the sums: the products
// of padding would turn infinities into NaN.
template <bool kConvolve, int k, int kRows, int64_t kStep, class A, class F>
inline void correlate(
    const A* const (&in)[kRows + k - 1], const A* const (&grad)[kRows], Vec<A>* sums, int64_t vectors, int last_lanes,
    const Vec<A>* weight, Vec<A> bias, F&& emit) {
  constexpr int n = simd::kLanes<A>;
  Vec<A> total[k * k + 1], w[k * k];
#pragma GCC unroll 32
  for (int t = 0; t <= k * k; ++t) total[t] = sums[t];  // unrolled, not std::copy, so that they stay in registers
  if (kConvolve) {
#pragma GCC unroll 32
    for (int t = 0; t < k * k; ++t) w[t] = weight[t];
  }
  each_vector(last_lanes == n ? vectors : vectors - 1, vectors, [&](int64_t v, auto is_whole) __attribute__((always_inline)) {
    Vec<A> g[kRows], convolved[kRows];
    for (int o = 0; o < kRows; ++o) {
      g[o] = simd::load(grad[o] + v * n);
      total[k * k] += g[o];
      convolved[o] = bias;
    }
    each_of<kRows + k - 1>([&](auto r) __attribute__((always_inline)) {
      each_of<k>([&](auto d) __attribute__((always_inline)) {
        const Vec<A> x = beside<d - k / 2, kStep>(in[r] + v * n);
        const Vec<A> counted = is_whole ? x : first_lanes<A>(x, last_lanes);
        each_of<kRows>([&](auto o) __attribute__((always_inline)) {
          if constexpr (r - o >= 0 && r - o < k) {
            constexpr int tap = (r - o) * k + d;
            total[tap] += g[o] * counted;
            if constexpr (kConvolve) convolved[o] += w[tap] * x;
          }
        });
      });
    });
    if constexpr (kConvolve) emit(v, convolved, is_whole);
  });
#pragma GCC unroll 32
  for (int t = 0; t <= k * k; ++t) sums[t] = total[t];
}

// Sums that are kept in A for short runs and in double beyond.
template <class A, int kCount>
struct Sums {
  static constexpr int n = simd::kLanes<A>, kWide = simd::kLanes<double>, kParts = n / kWide;
  static constexpr int64_t kTermsPerFlush = 128;
  using Wide = Vec<double>;
  Vec<A> run[kCount] = {};
  Wide total[kCount][kParts] = {};
  int64_t terms = 0;

  void count(int64_t added) {
    if ((terms += added) >= kTermsPerFlush) flush();
  }
  void flush() {
    typedef A Part __attribute__((vector_size(kWide * sizeof(A))));
    for (int i = 0; i < kCount; ++i) {
      for (int part = 0; part < kParts; ++part)
        total[i][part] += __builtin_convertvector(simd::load_raw<Part>(reinterpret_cast<A*>(&run[i]) + part * kWide), Wide);
      run[i] = Vec<A>{};
    }
    terms = 0;
  }
  double lane(int i, int l) const { return total[i][l / kWide][l % kWide]; }
  double sum(int i) const {
    Wide all = total[i][0];
    for (int part = 1; part < kParts; ++part) all += total[i][part];
    double s = 0;
    for (int l = 0; l < kWide; ++l) s += all[l];
    return s;
  }
};

// The sums over the pixels of images like `x`, (B, C), as an operator returns them: empty where they were not asked for.
inline tensor::Tensor plane_sums(const tensor::Tensor& x, bool needed, const std::vector<double>& sums) {
  using tensor::ScalarType;
  const auto size = needed ? std::vector<int64_t>{x.size(0), x.size(1)} : std::vector<int64_t>{0};
  return tensor::write(x, size, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, sums.data());
}

// Their gradient: zero where there is none.
template <class A>
inline std::vector<A> read_plane_sums(const tensor::Tensor& x, const std::optional<tensor::Tensor>& grad_sums) {
  return grad_sums ? tensor::read<A>(*grad_sums) : std::vector<A>(x.size(0) * x.size(1));
}

// f(k) with the kernel size as a type.
template <class F>
inline void specialise_kernel(int64_t k, F&& f) {
  STD_TORCH_CHECK(k == 3 || k == 5, "expected a 3 x 3 or 5 x 5 kernel, got ", k, " x ", k);
  if (k == 3)
    f(std::integral_constant<int, 3>{});
  else
    f(std::integral_constant<int, 5>{});
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
