// Real two-dimensional Fourier transforms, norm="ortho", of planes: images <-> spectra as spectrum.h lays them out.
//
// Rows are transformed kFloats at a time, transposed in registers, columns kFloats at a time as they lie in the groups.
// A row of even width is transformed as W / 2 complex numbers; what its spectrum has at Nyquist is real, as is the zero
// frequency, whose imaginary part it becomes until the columns are transformed.
//
// Most of an image's energy may be in the zero frequency, from where rounding errors would spread over all others: so
// what is transformed is the image less about its mean, and the zero frequency is a sum of its own. So it is in the
// inverse.
#include <optional>

#include "fft.h"
#include "scratch.h"
#include "spectrum.h"
#include "stages.h"
#include "tasks.h"

namespace fourier {

namespace {

using fft::Complex;
using simd::Pair;
using simd::VecF;
using spectrum::kBlock;
using spectrum::kLanes;

struct Geometry : spectrum::HalfSpectrum {
  int64_t length;  // complex numbers that a row is transformed as
  fft::Plan rows, column;
  float scale;
  std::vector<float> roots;  // exp(-2 pi i k / W), k <= W / 4

  Geometry(int64_t height, int64_t width, bool inverse)
      : HalfSpectrum(height, width), length(width % 2 ? width : width / 2), rows(length, inverse),
        column(height, inverse), scale(static_cast<float>(1 / std::sqrt(static_cast<double>(height * width)))),
        roots(2 * (length / 2 + 1)) {
    for (int64_t k = 0; k <= length / 2; ++k) fft::root(k, width, &roots[2 * k]);
  }
  bool even() const { return width % 2 == 0; }
  int64_t nyquist_blocks() const { return blocks - nyquist; }
  int64_t row_floats() const { return std::max(length, groups * kLanes) * kBlock; }
};

// Scratch of one thread.
struct Buffers {
  float *row, *transformed, *first, *plane, *work, *group, *last;  // group, last: a group's and Nyquist's, of pairs
  Buffers(scratch::Frame& frame, const Geometry& g)
      : row(frame.zeros<float>(std::max(g.row_floats(), g.rows.work()))),
        transformed(frame.zeros<float>(g.row_floats())), first(frame.take<float>(g.height * kBlock)),
        plane(frame.take<float>(g.nyquist * kBlock)), work(frame.take<float>(g.column.work())),
        group(frame.take<float>(g.height * kBlock)), last(frame.take<float>(g.nyquist_blocks() * kBlock)) {}
};

// The mean of the first rows, of few bits: all bits would be cut from numbers of one exponent alike, errors that add
// up.
template <class T>
float near_mean(const Geometry& g, const T* in) {
  const int64_t count = std::min(kLanes, g.height) * g.width;
  VecF sum = {};
  for (int64_t i = 0; i < count; i += kLanes)
    sum += i + kLanes <= count ? simd::load(in + i) : simd::load_partial(in + i, count - i);
  return static_cast<float>(
      static_cast<simd::BFloat16>(static_cast<float>(simd::sum_of_lanes(sum) / static_cast<double>(count))));
}

// kLanes rows of `in` from row h less `mean`, transposed: sample j of the rows becomes vector j. Rows past the last are
// zeros. Returns the sum of what is written.
template <class T>
double read_rows(const Geometry& g, const T* in, float mean, int64_t h, float* out) {
  const int64_t count = std::min(kLanes, g.height - h), step = g.even() ? kLanes : kBlock;
  double sum = 0;
  for (int64_t j = 0; j < g.width; j += kLanes) {
    VecF x[kLanes];
    const int64_t n = std::min(kLanes, g.width - j);
#pragma GCC unroll 16
    for (int64_t l = 0; l < kLanes; ++l) {
      const T* row = in + (h + l) * g.width + j;
      x[l] = l >= count ? VecF{} : (n == kLanes ? simd::load(row) : simd::load_partial(row, n)) - mean;
    }
    simd::transpose(x);
#pragma GCC unroll 16
    for (int64_t l = 0; l < kLanes; ++l)
      if (l < n)
        simd::store(out + (j + l) * step, x[l]);
      else
        x[l] = VecF{};
    // In pairs: the zero frequency is to be no less accurate than the others.
#pragma GCC unroll 4
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int64_t l = 0; l < half; ++l) x[l] += x[l + half];
    sum += simd::sum_of_lanes(x[0]);
  }
  for (int64_t j = 0; !g.even() && j < g.width; ++j) simd::store(out + j * kBlock + kLanes, VecF{});
  return sum;
}

// The reverse, plus `offset`.
template <class T>
void write_rows(const Geometry& g, const float* in, float offset, int64_t h, T* out) {
  const int64_t count = std::min(kLanes, g.height - h), step = g.even() ? kLanes : kBlock;
  for (int64_t j = 0; j < g.width; j += kLanes) {
    VecF x[kLanes];
    const int64_t n = std::min(kLanes, g.width - j);
#pragma GCC unroll 16
    for (int64_t l = 0; l < kLanes; ++l) x[l] = l < n ? simd::load(in + (j + l) * step) + offset : VecF{};
    simd::transpose(x);
#pragma GCC unroll 16
    for (int64_t l = 0; l < kLanes; ++l) {
      T* row = out + (h + l) * g.width + j;
      if (l >= count) continue;
      n == kLanes ? simd::store(row, x[l]) : simd::store_partial(row, x[l], n);
    }
  }
}

// Complex numbers k of kLanes rows, from row h: with the rows in the lanes (`row`), or with the columns (`plane`).
void to_plane(const Geometry& g, const float* row, int64_t h, float* plane) {
  const int64_t count = std::min(kLanes, g.height - h);
  for (int64_t group = 0; group < g.groups; ++group)
    for (int64_t part = 0; part < kBlock; part += kLanes) {
      VecF x[kLanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) x[l] = simd::load(row + (group * kLanes + l) * kBlock + part);
      simd::transpose(x);
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l)
        if (l < count) simd::store(plane + (group * g.height + h + l) * kBlock + part, x[l]);
    }
}
void from_plane(const Geometry& g, const float* plane, int64_t h, float* row) {
  const int64_t count = std::min(kLanes, g.height - h);
  for (int64_t group = 0; group < g.groups; ++group)
    for (int64_t part = 0; part < kBlock; part += kLanes) {
      VecF x[kLanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l)
        x[l] = l < count ? simd::load(plane + (group * g.height + h + l) * kBlock + part) : VecF{};
      simd::transpose(x);
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) simd::store(row + (group * kLanes + l) * kBlock + part, x[l]);
    }
}

// From the transforms of W / 2 complex numbers, the spectra of the rows of W real ones.
void split(const Geometry& g, float* row) {
  const Complex zero = fft::load(row);
  fft::store(row, {(zero.re + zero.im) * g.scale, (zero.re - zero.im) * g.scale});
  const float half = 0.5f * g.scale;
  for (int64_t k = 1; k <= g.length / 2; ++k) {
    float *low = row + k * kBlock, *high = row + (g.length - k) * kBlock;
    const Complex a = fft::load(low), b = fft::conj(fft::load(high));
    const float w[2] = {half * g.roots[2 * k], half * g.roots[2 * k + 1]};
    const Complex even = (a + b) * half, odd = fft::times_minus_i(a - b) * w;
    fft::store(low, even + odd);
    fft::store(high, fft::conj(even - odd));
  }
}

// The reverse.
void join(const Geometry& g, float* row) {
  const Complex zero = fft::load(row);
  fft::store(row, {(zero.re + zero.im) * g.scale, (zero.re - zero.im) * g.scale});
  for (int64_t k = 1; k <= g.length / 2; ++k) {
    float *low = row + k * kBlock, *high = row + (g.length - k) * kBlock;
    const Complex a = fft::load(low), b = fft::conj(fft::load(high));
    const float w[2] = {g.scale * g.roots[2 * k + 1], g.scale * g.roots[2 * k]};  // i exp(2 pi i k / W)
    const Complex even = (a + b) * g.scale, odd = (a - b) * w;
    fft::store(low, even + odd);
    fft::store(high, fft::conj(even - odd));
  }
}

// The same for odd widths, where a row is W complex numbers.
void scale_row(const Geometry& g, float* row) {
  for (int64_t k = 0; k < g.columns; ++k) fft::store(row + k * kBlock, fft::load(row + k * kBlock) * g.scale);
}
void mirror_row(const Geometry& g, float* row) {
  scale_row(g, row);
  simd::store(row + kLanes, VecF{});  // a transform to real numbers does not see it
  for (int64_t k = 1; k < g.columns; ++k)
    fft::store(row + (g.width - k) * kBlock, fft::conj(fft::load(row + k * kBlock)));
}

// The first column's transform is a + i b of the spectra a and b of two real columns: the first, and Nyquist's.
void separate(const Geometry& g, float* out, float* last) {
  for (int64_t h = 0; h <= g.height / 2; ++h) {
    const int64_t mirror = h ? g.height - h : 0;
    float *z = out + h * kBlock, *z_mirror = out + mirror * kBlock;
    const float re = 0.5f * (z[0] + z_mirror[0]), im = 0.5f * (z[kLanes] - z_mirror[kLanes]);
    const float nyquist_re = 0.5f * (z[kLanes] + z_mirror[kLanes]), nyquist_im = 0.5f * (z_mirror[0] - z[0]);
    auto store = [&](int64_t row, float* at, float sign) {
      float* nyquist = last + row / kLanes * kBlock + row % kLanes;
      at[0] = re;
      at[kLanes] = sign * im;
      nyquist[0] = nyquist_re;
      nyquist[kLanes] = sign * nyquist_im;
    };
    store(mirror, z_mirror, -1);
    store(h, z, 1);
  }
}

// The reverse, of the Hermitian parts of a and b: the transform to real numbers sees no more of them.
void combine(const Geometry& g, const float* in, const float* last, float* first) {
  for (int64_t h = 0; h < g.height; ++h) {
    const int64_t mirror = h ? g.height - h : 0;
    const float *a = in + h * kBlock, *a_mirror = in + mirror * kBlock;
    const float* b = last + h / kLanes * kBlock + h % kLanes;
    const float* b_mirror = last + mirror / kLanes * kBlock + mirror % kLanes;
    first[h * kBlock] = 0.5f * (a[0] + a_mirror[0] - b[kLanes] + b_mirror[kLanes]);
    first[h * kBlock + kLanes] = 0.5f * (a[kLanes] - a_mirror[kLanes] + b[0] + b_mirror[0]);
  }
}

// Blocks of floats to memory and back, where they do not lie there as floats.
void pack(int64_t blocks, const float* in, Pair* out) {
  for (int64_t i = 0; i < blocks; ++i, in += kBlock, out += kLanes)
    simd::store(out, simd::pair(simd::load(in), simd::load(in + kLanes)));
}
void unpack(int64_t blocks, const Pair* in, float* out) {
  for (int64_t i = 0; i < blocks; ++i, in += kLanes, out += kBlock) {
    const simd::VecU both = simd::load(in);
    simd::store(out, simd::first_of(both));
    simd::store(out + kLanes, simd::second_of(both));
  }
}

// Returns the zero frequency.
template <class T, class S>
double forward(const Geometry& g, const Buffers& b, const T* in, S* out) {
  const float mean = near_mean(g, in);
  double sum = static_cast<double>(mean) * static_cast<double>(g.height * g.width);
  for (int64_t h = 0; h < g.height; h += kLanes) {
    sum += read_rows(g, in, mean, h, b.row);
    g.rows.run(b.row, b.row, b.transformed);
    g.even() ? split(g, b.transformed) : scale_row(g, b.transformed);
    to_plane(g, b.transformed, h, b.plane);
  }
  const double zero = sum * g.scale;
  for (int64_t group = 0; group < g.groups; ++group) {
    float* column = b.plane + group * g.height * kBlock;
    float* const work = g.column.in_place() ? column : b.work;
    if constexpr (std::is_same_v<S, Pair>) {
      g.column.run(column, work, b.group);
      if (group == 0 && g.even()) {
        separate(g, b.group, b.last);
        pack(g.nyquist_blocks(), b.last, out + g.nyquist * kLanes);
      }
      pack(g.height, b.group, out + group * g.height * kLanes);
    } else {
      g.column.run(column, work, out + group * g.height * kBlock);
    }
  }
  if constexpr (std::is_same_v<S, float>) {
    if (g.even()) separate(g, out, out + g.nyquist * kBlock);
    out[0] = static_cast<float>(zero);
  }
  return zero;
}

template <class T, class S>
void inverse(const Geometry& g, const Buffers& b, const S* in, float zero, float offset, T* out) {
  for (int64_t group = 0; group < g.groups; ++group) {
    const S* const stored = in + group * g.height * spectrum::kElements<S>;
    const float* column;
    if constexpr (std::is_same_v<S, Pair>) {
      unpack(g.height, stored, b.group);
      if (group == 0) unpack(g.nyquist_blocks(), in + g.nyquist * kLanes, b.last);
      column = b.group;
    } else {
      column = stored;
    }
    if (group == 0) {
      std::copy(column, column + g.height * kBlock, b.first);
      const float* last = b.last;
      if constexpr (std::is_same_v<S, float>) last = in + g.nyquist * kBlock;
      if (g.even()) combine(g, column, last, b.first);
      b.first[0] -= column[0];
      column = b.first;
    }
    g.column.run(column, b.work, b.plane + group * g.height * kBlock);
  }
  offset += zero * g.scale;
  for (int64_t h = 0; h < g.height; h += kLanes) {
    from_plane(g, b.plane, h, b.row);
    g.even() ? join(g, b.row) : mirror_row(g, b.row);
    g.rows.run(b.row, b.row, b.transformed);
    write_rows(g, b.transformed, offset, h, out);
  }
}

// Calls f(scratch, plane, pointer of the dtype) for all planes of `images`.
template <class F>
void for_planes(const Tensor& images, const Geometry& g, F&& f) {
  tensor::dispatch(images.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if constexpr (!std::is_same_v<T, double>) {
      tasks::parallel(images.size(0) * images.size(1), 1, [&](int64_t begin, int64_t end) {
        scratch::Frame frame;
        const Buffers buffers(frame, g);
        for (int64_t p = begin; p < end; ++p) f(buffers, p, tag);
      });
    } else {
      STD_TORCH_CHECK(false, "the transforms take no float64");
    }
  });
}

// Spectra of S and their zero frequencies.
template <class S>
Spectrum transform(const Tensor& x, const Tensor& values) {
  const Geometry g(x.size(2), x.size(3), false);
  Spectrum spectrum{values, Rows<double>(x.size(0), x.size(1))};
  S* result = static_cast<S*>(spectrum.values.mutable_data_ptr());
  const void* data = x.const_data_ptr();
  for_planes(x, g, [&](const Buffers& buffers, int64_t p, auto* tag) {
    const auto* plane = static_cast<decltype(tag)>(const_cast<void*>(data)) + p * g.height * g.width;
    spectrum.zero[p / x.size(1)][p % x.size(1)] =
        forward(g, buffers, plane, result + p * g.blocks * spectrum::kElements<S>);
  });
  return spectrum;
}

// zero(p): the zero frequency of plane p.
template <class S, class Zero>
Tensor transform_back(const Tensor& spectrum, Zero&& zero, const std::optional<Tensor>& bias, const Tensor& like) {
  const int64_t channels = spectrum.size(1);
  const Geometry g(like.size(2), like.size(3), true);
  const auto offset = bias ? tensor::read<float>(*bias) : std::vector<float>(channels);
  Tensor out = tensor::empty(like, {spectrum.size(0), channels, g.height, g.width});
  const S* in = static_cast<const S*>(spectrum.const_data_ptr());
  void* data = out.mutable_data_ptr();
  for_planes(out, g, [&](const Buffers& buffers, int64_t p, auto* tag) {
    inverse(
        g, buffers, in + p * g.blocks * spectrum::kElements<S>, zero(p), offset[p % channels],
        static_cast<decltype(tag)>(data) + p * g.height * g.width);
  });
  return out;
}

int64_t blocks_of(const Tensor& x) { return spectrum::HalfSpectrum(x.size(2), x.size(3)).blocks; }

}  // namespace

Tensor rfft2(const Tensor& x) {
  const std::vector<int64_t> size{x.size(0), x.size(1), blocks_of(x), 2, kLanes};
  return transform<float>(x, tensor::empty(x, size, false, tensor::ScalarType::Float)).values;
}

Tensor irfft2(const Tensor& spectrum, const std::optional<Tensor>& bias, const Tensor& like) {
  const float* in = static_cast<const float*>(spectrum.const_data_ptr());
  return transform_back<float>(spectrum, [&](int64_t p) { return in[p * spectrum.stride(1)]; }, bias, like);
}

Spectrum rfft2_bf16(const Tensor& x) {
  const std::vector<int64_t> size{x.size(0), x.size(1), blocks_of(x), kLanes, 2};
  return transform<Pair>(x, tensor::empty(x, size, false, tensor::ScalarType::BFloat16));
}

Tensor irfft2_bf16(const Spectrum& spectrum, const std::optional<Tensor>& bias, const Tensor& like) {
  const int64_t channels = spectrum.values.size(1);
  auto zero = [&](int64_t p) { return static_cast<float>(spectrum.zero[p / channels][p % channels]); };
  return transform_back<Pair>(spectrum.values, zero, bias, like);
}

}  // namespace fourier

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("rfft2(Tensor x) -> Tensor");
  m.def("irfft2(Tensor spectrum, Tensor? bias, Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("rfft2", TORCH_BOX(&fourier::rfft2));
  m.impl("irfft2", TORCH_BOX(&fourier::irfft2));
}
