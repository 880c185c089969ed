// The spatial and the wavelet branch behind their 1x1 convolution, without its map: the image goes by strips of rows,
// of which the convolution's results and the branches' rings stay in the cache.
#include "depthwise_gelu.h"
#include "gather.h"
#include "gemm.h"
#include "ops.h"
#include "pairs.h"
#include "scratch.h"
#include "tasks.h"
#include "wavelet_mix.h"

namespace {

using stencil::Task;
using tensor::Tensor;

constexpr int64_t kTile = 240;                     // pixels of a matrix product
constexpr int64_t kStripBytes = int64_t{1} << 19;  // of the convolution's results
constexpr int64_t kFewestRows = 32;                // of blocks in a task, which computes a few of its neighbours' too

// M: what the products take.
template <class T, class M, int ks, int kw>
class LocalBranches {
 public:
  using A = simd::Acc<T>;
  using Problem = stencil::Problem<T, A>;
  using Spatial = spatial::Forward<T, false, ks, A>;
  using Wavelet = wavelet::Forward<T, false, kw, A>;

  LocalBranches(
      const Tensor& x, const std::vector<A>& weight, std::vector<A> bias, spatial::Parameters<A> spatial,
      wavelet::Parameters<A> wavelet, const Tensor& spatial_out, const Tensor& wavelet_out)
      : batch_(x.size(0)), inputs_(x.size(1)), channels_(spatial_out.size(1)), height_(x.size(2)), width_(x.size(3)),
        x_(static_cast<const T*>(x.const_data_ptr())),
        matrix_(2 * channels_, inputs_, [&](int64_t e, int64_t c) { return weight[e * inputs_ + c]; }),
        bias_(std::move(bias)), spatial_parameters_(std::move(spatial)), wavelet_parameters_(std::move(wavelet)),
        spatial_(problem(spatial_out)), wavelet_(problem(wavelet_out)),
        ranges_(tasks::parts(batch_, block_rows(), kFewestRows)) {}

  // Sums of both branches over the pixels, (2, B, C).
  std::vector<double> run() const {
    scratch::Frame frame;
    const tasks::Partial<> partial(frame, batch_ * ranges_, 2 * channels_);
    tasks::parallel(batch_ * ranges_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run_task(task, partial.start(task));
    });
    std::vector<double> sums(2 * batch_ * channels_);
    partial.each([&](int64_t task, const double* of_task) {
      for (int64_t c = 0; c < 2 * channels_; ++c)
        sums[(c / channels_ * batch_ + task / ranges_) * channels_ + c % channels_] += of_task[c];
    });
    return sums;
  }

 private:
  Problem problem(const Tensor& out) const {
    Problem g{batch_, channels_, height_, width_, nullptr, {}};
    g.out = static_cast<T*>(out.mutable_data_ptr());
    g.out_strides = tensor::strides_of(out);
    return g;
  }
  int64_t block_rows() const { return wavelet::block_rows(height_); }

  // Rows [row, row + count) of the 1x1 convolution: channel c at maps + c * pitch.
  void convolve(int64_t image, int64_t row, int64_t count, A* maps, int64_t pitch, M* gathered) const {
    const int64_t pixels = height_ * width_, end = count * width_;
    for (int64_t first = 0; first < end; first += kTile) {
      const int64_t n = std::min(kTile, end - first);
      const T* in = x_ + image * inputs_ * pixels + row * width_ + first;
      gather::tile(inputs_, n, [&](int64_t c) { return in + c * pixels; }, gathered, kTile);
      matrix_.times(n, gathered, kTile, [&](int64_t e, int64_t column, auto v) __attribute__((always_inline)) {
        simd::store(maps + e * pitch + first + column, v + bias_[e]);
      });
    }
  }

  void run_task(int64_t index, double* totals) const {
    const int64_t image = index / ranges_, range = index % ranges_;
    const auto [begin, end] = tasks::part(range, ranges_, block_rows());
    const int64_t halo = std::max(2 * (kw / 2), (ks / 2 + 1) / 2 * 2);
    const int64_t first = std::max<int64_t>(0, 2 * begin - halo), last = std::min(height_, 2 * end + halo);
    const int64_t row_bytes = 2 * channels_ * width_ * static_cast<int64_t>(sizeof(A));
    const int64_t rows = std::clamp<int64_t>(kStripBytes / row_bytes / 2 * 2, 2, last - first + 1);
    const int64_t pitch = gemm::round_up(rows * width_, 16) + gemm::kVectors * simd::kLanes<A>;

    scratch::Frame frame;
    A* maps = frame.take<A>(2 * channels_ * pitch);
    M* gathered = frame.take<M>(matrix_.depth * kTile);
    A* mixed = frame.zeros<A>(Wavelet::run_size(width_));
    std::vector<Spatial> spatial;
    std::vector<Wavelet> wavelet;
    auto task = [&](int64_t c, int64_t from, int64_t to) { return Task{image, c, c, 1, from, to}; };
    for (int64_t c = 0; c < channels_; ++c) {
      spatial.emplace_back(
          frame.zeros<A>(Spatial::size(width_)), spatial_, task(c, 2 * begin, std::min(height_, 2 * end)));
      wavelet.emplace_back(frame.zeros<A>(Wavelet::size(width_)), wavelet_, task(c, begin, end));
    }

    Problem of_spatial = spatial_, of_wavelet = wavelet_;
    of_spatial.x_strides = of_wavelet.x_strides = {0, pitch, width_, 1};
    int64_t spatial_next = 2 * begin, wavelet_next = begin;
    for (int64_t row = first; row < last; row += rows) {
      const int64_t ready = std::min(last, row + rows);  // rows
      convolve(image, row, ready - row, maps, pitch, gathered);
      of_spatial.x = maps - row * width_;
      of_wavelet.x = maps + channels_ * pitch - row * width_;
      const bool all = ready == height_;
      const int64_t blocks = all ? block_rows() : ready / 2;
      const int64_t spatial_end = std::clamp(all ? height_ : ready - ks / 2, spatial_next, std::min(height_, 2 * end));
      const int64_t wavelet_end = std::clamp(all ? blocks : blocks - kw / 2, wavelet_next, end);
      for (int64_t c = 0; c < channels_; ++c) {
        spatial[c].template run<true>(
            of_spatial, spatial_parameters_, task(c, 0, 0), spatial_next, spatial_end, ready, totals + c);
        wavelet[c].template run<true>(
            of_wavelet, wavelet_parameters_, task(c, 0, 0), wavelet_next, wavelet_end, blocks, mixed,
            totals + channels_ + c);
      }
      spatial_next = spatial_end;
      wavelet_next = wavelet_end;
    }
  }

  int64_t batch_, inputs_, channels_, height_, width_;
  const T* x_;
  gemm::Matrix<M> matrix_;
  std::vector<A> bias_;
  spatial::Parameters<A> spatial_parameters_;
  wavelet::Parameters<A> wavelet_parameters_;
  Problem spatial_, wavelet_;
  int64_t ranges_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> swformer::local_branches(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& spatial_weight,
    const Tensor& spatial_bias, const Tensor& wavelet_weight, const Tensor& wavelet_bias, const Tensor& dec_lo,
    const Tensor& dec_hi, const Tensor& rec_lo, const Tensor& rec_hi) {
  const Tensor dense = tensor::as_contiguous(x);
  const int64_t batch = x.size(0), channels = spatial_weight.size(0);
  const std::vector<int64_t> size{batch, channels, x.size(2), x.size(3)};
  Tensor spatial = tensor::empty(x, size), wavelet = tensor::empty(x, size);
  std::vector<double> sums;
  auto run = [&](auto* tag, auto ks, auto kw) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = simd::Acc<T>;
    pairs::choose<T>(x.size(1), [&](auto element) {
      const LocalBranches<T, decltype(element), ks, kw> branches(
          dense, tensor::read<A>(in_weight), tensor::read<A>(in_bias),
          {tensor::read<A>(spatial_weight), tensor::read<A>(spatial_bias)},
          {tensor::read<A>(wavelet_weight), tensor::read<A>(wavelet_bias), {dec_lo, dec_hi}, {rec_lo, rec_hi}}, spatial,
          wavelet);
      sums = branches.run();
    });
  };
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using Kernels = std::conditional_t<
        sizeof(*tag) == 2, std::integer_sequence<int, 3>, std::integer_sequence<int, 3, 5, 7>>;  // others are rare
    stencil::specialise_kernel(
        spatial_weight.size(3),
        [&](auto ks) {
          stencil::specialise_kernel(wavelet_weight.size(3), [&](auto kw) { run(tag, ks, kw); }, Kernels());
        },
        Kernels());
  });
  const double* values = sums.data();
  const auto dtype = tensor::dtype_of_sums(x.scalar_type());
  auto result = [&](const double* of) { return tensor::write(x, {batch, channels}, dtype, of); };
  return {spatial, wavelet, result(values), result(values + batch * channels)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def(
      "local_branches(Tensor x, Tensor in_weight, Tensor in_bias, Tensor spatial_weight, Tensor spatial_bias, Tensor "
      "wavelet_weight,"
      " Tensor wavelet_bias, Tensor dec_lo, Tensor dec_hi, Tensor rec_lo, Tensor rec_hi) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) { m.impl("local_branches", TORCH_BOX(&swformer::local_branches)); }
