// log p of rows and KL of rows, with their gradients and the total that is the ELBO loss: one launch.
//
// Mean-reduced Bernoulli ELBO in float32, forward and backward: 8 bytes read and 4 written per element, since the
// gradient is written by the forward and handed on by the backward where the upstream gradient is 1. Recomputing in the
// backward would read recon and x once more: 20. With reduction "none" and half types the backward recomputes. Rows of
// more than kSegment elements are shared by several groups, whose sums a second, small launch adds up; free bits take
// the batch means of the KL in a launch before.
#include "cuda/kernels/latent.cuh"
#include "cuda/kernels/likelihood.cuh"

namespace fastelbo::cuda {
namespace {

template <class L, int kCount, bool kGrads, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, (kBlocks<L, kCount, kPlain>)) rows_kernel(RowsParams p, int g, int kl_g) {
  const int64_t segs = segments(p.fit.D), fits = p.fit.K * p.fit.B * segs;
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  double part = 0;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < fits; base += int64_t(gridDim.x) * per_block) {
    const int64_t item = base + group, row = item / segs, k = row / p.fit.B, b = row % p.fit.B;
    T sum = 0;
    if (item < fits) {
      const int64_t begin = item % segs * kSegment, end = begin + kSegment < p.fit.D ? begin + kSegment : p.fit.D;
      sum =
          log_prob_part<L, kCount, kGrads, kPlain>(p.fit, k, b, begin, end, row_number<T>(p.fit.factor, k, b), lane, g);
    }
    sum = group_sum(sum, g);
    if (item < fits && lane == 0) {
      if (p.fit.log_p) p.fit.log_p[item] = double(sum);
      if (p.log_p) static_cast<T*>(p.log_p)[row] = sum;
      part += p.fit_weight * double(sum);
    }
  }
  if (p.kl.q.B != 0) {
    const double beta = read(p.beta);
    const double kl = kl_rows<T>(p.kl, T(beta), p.kl_out, p.floored_kl, kl_g);
    part += times(p.kl_weight * beta, kl);
  }
  add_to_total<T>(p.total, part);
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

// A block takes a chunk of rows and a segment of columns, a thread every kThreads-th of these: the sums over the rows
// of the gradients that they share.
template <class L, int kCount, class T>
__global__ void __launch_bounds__(kThreads, 2) shared_grads_kernel(LogProbParams p) {
  const int64_t segs = segments(p.D), items = p.chunks() * segs;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t chunk = item / segs, begin = item % segs * kSegment;
    const int64_t end = begin + kSegment < p.D ? begin + kSegment : p.D;
    const int64_t first = chunk * p.chunk, last = first + p.chunk < p.rows() ? first + p.chunk : p.rows();
    double scalar[kMaxParameters] = {};
    for (int64_t d = begin + threadIdx.x; d < end; d += kThreads) {
      T sums[kMaxParameters] = {};
      for (int64_t row = first; row < last; ++row) {
        const int64_t k = row / p.B, b = row % p.B;
        const auto in = [&](const View& v) { return load_at<T>(v, row_of(v, k, b) + offset_of(v, d)); };
        const T weight = p.mask ? in(p.mask) : T(1);
        if (weight == 0) continue;
        const Terms<T> t = with_indices<kCount>(
            [&]<int... i>() { return evaluate<L>(Element<T>{{in(p.parameter[i])...}, in(p.x), T(p.added)}); });
        const T w = weight * row_number<T>(p.factor, k, b);
        with_indices<kCount>([&]<int... i>() { ((sums[i] += w * t.d.template get<i>()), ...); });
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const SharedGrad& g = p.shared_grad[i];
        if (g.sums && !g.scalar) static_cast<T*>(g.sums)[chunk * g.size + d] = sums[i];
        scalar[i] += double(sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const SharedGrad& g = p.shared_grad[i];
      if (!g.sums || !g.scalar) continue;  // the same in all threads
      const double sum = group_sum(scalar[i], kThreads);
      if (threadIdx.x == 0) static_cast<T*>(g.sums)[item] = T(sum);
    }
  }
}

}  // namespace

void launch_rows(const RowsParams& p, int likelihood, bool is_double, cudaStream_t stream) {
  const int64_t items = p.fit.rows() * segments(p.fit.D);
  const int g = group_size(p.fit.D < kSegment ? p.fit.D : kSegment, items), kl_g = group_size(p.kl.q.D, p.kl.q.B);
  const int64_t blocks = std::max(blocks_for(items, kThreads / g), blocks_for(p.kl.q.B, kThreads / kl_g));
  with_rows(p.fit, likelihood, is_double, [&]<class L, int kCount, bool kGrads, bool kPlain, class T>() {
    launch(rows_kernel<L, kCount, kGrads, kPlain, T>, blocks, stream, p, g, kl_g);
  });
}

void launch_shared_grads(const LogProbParams& p, int likelihood, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.chunks() * segments(p.D), 1);
  with_likelihood(Likelihoods{}, likelihood, p.count, [&]<class L, int kCount>() {
    using Double = std::conditional_t<kMainAlone, float, double>;
    is_double ? launch(shared_grads_kernel<L, kCount, Double>, blocks, stream, p)
              : launch(shared_grads_kernel<L, kCount, float>, blocks, stream, p);
  });
}

void launch_add_segments(const double* parts, int64_t segs, int64_t rows, void* out, bool is_double,
                         cudaStream_t stream) {
  const int64_t blocks = blocks_for(rows, kThreads);
  is_double ? launch(add_segments_kernel<double>, blocks, stream, parts, segs, rows, static_cast<double*>(out))
            : launch(add_segments_kernel<float>, blocks, stream, parts, segs, rows, static_cast<float*>(out));
}

}  // namespace fastelbo::cuda
