// The small network of channel attention, s = sigmoid(w2 relu(w1 mean + b1) + b2) of each image. All in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "accumulate.h"
#include "tensor.h"

namespace attention {

using tensor::Tensor;
using Values = std::vector<double>;

inline double dot(int64_t n, const double* p, const double* q) {
  return accumulate::over<double>(n, [=](auto vector, int64_t i) __attribute__((always_inline)) {
    if constexpr (vector)
      return simd::load(p + i) * simd::load(q + i);
    else
      return p[i] * q[i];
  });
}

// y0 += factor * x0, y1 += factor * x1.
inline void add(
    int64_t n, double factor, const double* __restrict x0, double* __restrict y0, const double* __restrict x1,
    double* __restrict y1) {
  for (int64_t i = 0; i < n; ++i) {
    y0[i] += factor * x0[i];
    y1[i] += factor * x1[i];
  }
}

struct Gradients {
  Values w1, b1, w2, b2;
};

// Parameters, and for every image the values of each stage; whoever has the means puts them in and calls `run`.
struct Network {
  int64_t batch, channels, hidden;
  Values w1, b1, w2, b2, mean, before_relu, scale;

  Network(int64_t batch, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2)
      : batch(batch), channels(w1.size(1)), hidden(w1.size(0)), w1(tensor::read<double>(w1)),
        b1(tensor::read<double>(b1)), w2(tensor::read<double>(w2)), b2(tensor::read<double>(b2)),
        mean(batch * channels), before_relu(batch * hidden), scale(batch * channels) {}

  void run() {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < hidden; ++r)
        before_relu[b * hidden + r] = b1[r] + dot(channels, w1.data() + r * channels, mean.data() + b * channels);
      const Values active = after_relu(b);
      for (int64_t c = 0; c < channels; ++c)
        scale[b * channels + c] = 1 / (1 + std::exp(-b2[c] - dot(hidden, w2.data() + c * hidden, active.data())));
    }
  }

  Gradients no_gradients() const { return {Values(w1.size()), Values(hidden), Values(w2.size()), Values(channels)}; }

  // Adds image b's to `g`; `of_scale` and the result are (channels,), those of its scale and of its means.
  Values backward(int64_t b, const double* of_scale, Gradients& g) const {
    Values of_hidden(hidden), of_mean(channels);
    const Values active = after_relu(b);
    for (int64_t c = 0; c < channels; ++c) {
      const double s = scale[b * channels + c], of_logit = of_scale[c] * s * (1 - s);
      g.b2[c] += of_logit;
      add(hidden, of_logit, active.data(), g.w2.data() + c * hidden, w2.data() + c * hidden, of_hidden.data());
    }
    for (int64_t r = 0; r < hidden; ++r) {
      if (before_relu[b * hidden + r] <= 0) continue;
      g.b1[r] += of_hidden[r];
      add(channels, of_hidden[r], &mean[b * channels], &g.w1[r * channels], &w1[r * channels], of_mean.data());
    }
    return of_mean;
  }

 private:
  Values after_relu(int64_t b) const {
    Values values(before_relu.begin() + b * hidden, before_relu.begin() + (b + 1) * hidden);
    for (double& value : values) value = value < 0 ? 0.0 : value;  // NaN stays NaN
    return values;
  }
};

}  // namespace attention
