// The arithmetic of both operators, for numbers and for vectors of them, on the CPU and on GPUs.
#pragma once

#ifdef __CUDACC__
#define SDO_INLINE __host__ __device__ __forceinline__
#else
#define SDO_INLINE inline __attribute__((always_inline))
#endif

namespace sdo {

template <class V, class A>
SDO_INLINE V guide(V uncond, V cond, A guidance) {
  return uncond + guidance * (cond - uncond);
}

// next = a x + b eps + c clamp(pred_x x + pred_eps eps, -clip, clip), the last term only where kClipped.
template <class A>
struct Update {
  A a, b, c, pred_x, pred_eps, clip;

  template <bool kClipped, class V>
  SDO_INLINE V next(V x, V eps) const {
    V sum = a * x + b * eps;
    if constexpr (kClipped) {
      const V high = clip - V{}, low = V{} - clip;
      V pred = pred_x * x + pred_eps * eps;
      pred = pred < low ? low : pred;  // these comparisons, in this order, keep NaN
      pred = pred > high ? high : pred;
      sum += c * pred;
    }
    return sum;
  }

  // The cotangents of x and eps; as for torch.clamp, the bounds themselves pass gradients and NaN does not.
  template <bool kClipped, class V>
  SDO_INLINE void backward(V grad, V x, V eps, V& grad_x, V& grad_eps) const {
    grad_x = a * grad;
    grad_eps = b * grad;
    if constexpr (kClipped) {
      const V high = clip - V{}, low = V{} - clip;
      const V pred = pred_x * x + pred_eps * eps;
      V kept = pred >= low ? grad : V{};
      kept = pred <= high ? kept : V{};
      grad_x += c * pred_x * kept;
      grad_eps += c * pred_eps * kept;
    }
  }
};

}  // namespace sdo
