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
  int64_t row_floats() const { return std::max(length, groups * kLanes) * kBlock; }
};

// Scratch of one thread.
struct Buffers {
  float *row, *transformed, *first, *plane, *work;
  Buffers(scratch::Frame& frame, const Geometry& g)
      : row(frame.zeros<float>(std::max(g.row_floats(), g.rows.work()))),
        transformed(frame.zeros<float>(g.row_floats())), first(frame.take<float>(g.height * kBlock)),
        plane(frame.take<float>(g.nyquist * kBlock)), work(frame.take<float>(g.column.work())) {}
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
void separate(const Geometry& g, float* out) {
  for (int64_t h = 0; h <= g.height / 2; ++h) {
    const int64_t mirror = h ? g.height - h : 0;
    float *z = out + h * kBlock, *z_mirror = out + mirror * kBlock;
    const float re = 0.5f * (z[0] + z_mirror[0]), im = 0.5f * (z[kLanes] - z_mirror[kLanes]);
    const float nyquist_re = 0.5f * (z[kLanes] + z_mirror[kLanes]), nyquist_im = 0.5f * (z_mirror[0] - z[0]);
    auto store = [&](int64_t row, float* at, float sign) {
      float* nyquist = out + (g.nyquist + row / kLanes) * kBlock + row % kLanes;
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
void combine(const Geometry& g, const float* in, float* first) {
  for (int64_t h = 0; h < g.height; ++h) {
    const int64_t mirror = h ? g.height - h : 0;
    const float *a = in + h * kBlock, *a_mirror = in + mirror * kBlock;
    const float* b = in + (g.nyquist + h / kLanes) * kBlock + h % kLanes;
    const float* b_mirror = in + (g.nyquist + mirror / kLanes) * kBlock + mirror % kLanes;
    first[h * kBlock] = 0.5f * (a[0] + a_mirror[0] - b[kLanes] + b_mirror[kLanes]);
    first[h * kBlock + kLanes] = 0.5f * (a[kLanes] - a_mirror[kLanes] + b[0] + b_mirror[0]);
  }
}

template <class T>
void forward(const Geometry& g, const Buffers& b, const T* in, float* out) {
  const float mean = near_mean(g, in);
  double sum = static_cast<double>(mean) * static_cast<double>(g.height * g.width);
  for (int64_t h = 0; h < g.height; h += kLanes) {
    sum += read_rows(g, in, mean, h, b.row);
    g.rows.run(b.row, b.row, b.transformed);
    g.even() ? split(g, b.transformed) : scale_row(g, b.transformed);
    to_plane(g, b.transformed, h, b.plane);
  }
  for (int64_t group = 0; group < g.groups; ++group) {
    float* column = b.plane + group * g.height * kBlock;
    g.column.run(column, g.column.in_place() ? column : b.work, out + group * g.height * kBlock);
  }
  if (g.even()) separate(g, out);
  out[0] = static_cast<float>(sum * g.scale);
}

template <class T>
void inverse(const Geometry& g, const Buffers& b, const float* in, float offset, T* out) {
  std::copy(in, in + g.height * kBlock, b.first);
  if (g.even()) combine(g, in, b.first);
  b.first[0] -= in[0];
  for (int64_t group = 0; group < g.groups; ++group)
    g.column.run(group == 0 ? b.first : in + group * g.height * kBlock, b.work, b.plane + group * g.height * kBlock);
  offset += in[0] * g.scale;
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

}  // namespace

Tensor rfft2(const Tensor& x) {
  const Geometry g(x.size(2), x.size(3), false);
  Tensor out = tensor::empty(x, {x.size(0), x.size(1), g.blocks, 2, kLanes}, false, tensor::ScalarType::Float);
  float* result = static_cast<float*>(out.mutable_data_ptr());
  const void* data = x.const_data_ptr();
  for_planes(x, g, [&](const Buffers& buffers, int64_t p, auto* tag) {
    forward(
        g, buffers, static_cast<decltype(tag)>(const_cast<void*>(data)) + p * g.height * g.width,
        result + p * g.blocks * kBlock);
  });
  return out;
}

Tensor irfft2(const Tensor& spectrum, const std::optional<Tensor>& bias, const Tensor& like) {
  const int64_t channels = spectrum.size(1);
  const Geometry g(like.size(2), like.size(3), true);
  const auto offset = bias ? tensor::read<float>(*bias) : std::vector<float>(channels);
  Tensor out = tensor::empty(like, {spectrum.size(0), channels, g.height, g.width});
  const float* in = static_cast<const float*>(spectrum.const_data_ptr());
  void* data = out.mutable_data_ptr();
  for_planes(out, g, [&](const Buffers& buffers, int64_t p, auto* tag) {
    inverse(
        g, buffers, in + p * g.blocks * kBlock, offset[p % channels],
        static_cast<decltype(tag)>(data) + p * g.height * g.width);
  });
  return out;
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
