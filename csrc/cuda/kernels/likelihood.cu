// log p of rows and KL of rows, with their gradients and the total that is the ELBO loss: one launch.
//
// Mean-reduced Bernoulli ELBO in float32, forward and backward: 8 bytes read and 4 written per element, since the
// gradient is written by the forward and handed on by the backward where the upstream gradient is 1. Recomputing in the
// backward would read recon and x once more: 20. With reduction "none" and half types the backward recomputes. Rows of
// more than kSegment elements are shared by several groups, whose sums a second, small launch adds up; free bits take
// the batch means of the KL in a launch before.
#include "kernels/latent.cuh"
#include "kernels/likelihood.cuh"

namespace fastelbo::cuda {
namespace {

template <class L, bool kScale, bool kGrads, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, kPlain ? 3 : 2) rows_kernel(RowsParams p, int g, int kl_g) {
  const int64_t segs = segments(p.fit.D), fits = p.fit.K * p.fit.B * segs;
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  double share = 0;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < fits; base += int64_t(gridDim.x) * per_block) {
    const int64_t item = base + group, row = item / segs, k = row / p.fit.B, b = row % p.fit.B;
    T sum = 0;
    if (item < fits) {
      const int64_t begin = item % segs * kSegment, end = begin + kSegment < p.fit.D ? begin + kSegment : p.fit.D;
      sum = log_prob_part<L, kScale, kGrads, kPlain>(p.fit, k, b, begin, end, at<T>(p.fit.grad, k, b), lane, g);
    }
    sum = group_sum(sum, g);
    if (item < fits && lane == 0) {
      if (p.fit.out) p.fit.out[item] = double(sum);
      if (p.log_p) static_cast<T*>(p.log_p)[row] = sum;
      share += p.fit_share * double(sum);
    }
  }
  if (p.kl.B != 0) {
    const double beta = read(p.beta);
    const double kl = kl_rows<T>(p.kl, T(beta), p.kl_out, p.charged, kl_g);
    share += p.kl_share * beta * kl;
  }
  add_to_total<T>(p.total, share);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_segments_kernel(const double* parts, int64_t segs, int64_t rows, T* out) {
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += int64_t(gridDim.x) * kThreads) {
    double sum = 0;
    for (int64_t s = 0; s < segs; ++s) sum += parts[row * segs + s];
    out[row] = T(sum);
  }
}

}  // namespace

void launch_rows(const RowsParams& p, int likelihood, bool scale, bool wide, cudaStream_t stream) {
  const int64_t items = p.fit.K * p.fit.B * segments(p.fit.D);
  const int g = group_size(p.fit.D < kSegment ? p.fit.D : kSegment, items), kl_g = group_size(p.kl.D, p.kl.B);
  const int64_t blocks = std::max(blocks_for(items, kThreads / g), blocks_for(p.kl.B, kThreads / kl_g));
  const auto start = [&]<class L, bool kScale, bool kGrads, bool kPlain, class T>() {
    launch(rows_kernel<L, kScale, kGrads, kPlain, T>, blocks, stream, p, g, kl_g);
  };
  with_likelihood(Likelihoods{}, likelihood, scale, any_grad(p.fit), is_plain(p.fit), wide, start);
}

void launch_add_segments(const double* parts, int64_t segs, int64_t rows, void* out, bool wide, cudaStream_t stream) {
  const int64_t blocks = blocks_for(rows, kThreads);
  wide ? launch(add_segments_kernel<double>, blocks, stream, parts, segs, rows, static_cast<double*>(out))
       : launch(add_segments_kernel<float>, blocks, stream, parts, segs, rows, static_cast<float*>(out));
}

}  // namespace fastelbo::cuda
