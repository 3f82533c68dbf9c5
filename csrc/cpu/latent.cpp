// The latent ops on the CPU.
#include "cpu/latent.h"

#include <torch/library.h>

#include "prepare/latent.h"

namespace fastelbo {
namespace cpu {
namespace {

// [D] batch means of every dimension's KL, for free bits.
void kl_dim_means(const KlParams& p, bool is_double, Scratch& means) {
  const Latents& q = p.q;
  means.assign(q.D, 0.0);
  const KlDimsParams dims{q, means.data()};
  run(kernels().kl_dims[is_double], dims, (q.D + kLatentTile - 1) / kLatentTile, q.B * std::min(q.D, kLatentTile));
  for (double& m : means) m /= double(q.B);
}

}  // namespace

void run_kl(KlParams& p, bool is_double, double* kl, double* floored_kl) {
  const Latents& q = p.q;
  p.kl = kl;
  Scratch means;
  if (!p.free_bits.is_zero()) {
    kl_dim_means(p, is_double, means);
    p.dim_means = means.data(), p.floored_kl = floored_kl;
  }
  if (q.D == 0) {
    if (p.kl) std::fill_n(p.kl, q.B, 0.0);
    if (p.floored_kl) std::fill_n(p.floored_kl, q.B, 0.0);
  }
  run(kernels().kl[is_double], p, row_blocks(q.B, q.D), rows_per_block(q.D) * q.D * 4);
}

namespace {

void gaussian_kl(prepare::GaussianKl& op) {
  Scratch kl(op.params.q.B);
  const bool floored = !op.params.free_bits.is_zero();
  run_kl(op.params, op.is_double, floored ? nullptr : kl.data(), floored ? kl.data() : nullptr);
  write(kl.data(), op.kl);
}

void gaussian_kl_backward(prepare::GaussianKlBackward& op) { run_kl(op.params, op.is_double, nullptr, nullptr); }

// What comes from outside is checked where it can be read without a wait.
void check_chosen(const at::Tensor& sample, const at::Tensor& datum, const Latents& q) {
  const auto *k = sample.const_data_ptr<int64_t>(), *b = datum.const_data_ptr<int64_t>();
  const int64_t samples = std::numeric_limits<int64_t>::max() / std::max<int64_t>(1, q.B * q.D);
  for (int64_t i = 0; i < sample.numel(); ++i) {
    TORCH_CHECK_INDEX(b[i] >= 0 && b[i] < q.B, "datum must be in [0, B) with B=", q.B, " from mu; got ", b[i]);
    TORCH_CHECK_INDEX(k[i] >= 0 && k[i] < samples, "sample must be in [0, ", samples, "); got ", k[i]);
  }
}

void rsample(prepare::RSample& op) {
  SampleParams& p = op.params;
  const Latents& q = p.q;
  const int64_t rows = op.log_ratio.numel();
  Scratch densities(2 * rows, 0.0), kl(q.B);
  p.log_ratio = densities.data(), p.log_q = densities.data() + rows;
  if (p.sample) {
    check_chosen(op.sample, op.datum, q);
    run(kernels().sample[op.is_double], p, p.n, q.D * 4);
  } else {
    run(kernels().sample[op.is_double], p, row_blocks(q.B, q.D) * sample_blocks(p.K),
        rows_per_block(q.D) * q.D * std::min(p.K, kSampleBlock) * 2);
  }
  KlParams kl_params;
  kl_params.q = q;
  run_kl(kl_params, op.is_double, kl.data(), nullptr);
  write(p.log_ratio, op.log_ratio);
  write(p.log_q, op.log_q);
  write(kl.data(), op.kl);
}

void rsample_backward(prepare::RSampleBackward& op) {
  const SampleBackwardParams& p = op.params;
  if (p.sample) {
    check_chosen(op.sample, op.datum, p.q);
    const int64_t rows = op.sample.numel() / std::max<int64_t>(1, p.q.B) + 1;  // of a datum, on average
    run(kernels().sample_backward[op.is_double], p, p.q.B, rows * p.q.D * 4);
  } else {
    run(kernels().sample_backward[op.is_double], p, row_blocks(p.q.B, p.q.D), rows_per_block(p.q.D) * p.q.D * p.K * 2);
  }
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_FRAGMENT(fastelbo, m) {
  on_cpu_and_meta<ops::rsample, prepare::rsample, cpu::rsample>(m, "rsample");
  on_cpu_and_meta<ops::rsample_backward, prepare::rsample_backward, cpu::rsample_backward>(m, "_rsample_backward");
  on_cpu_and_meta<ops::gaussian_kl, prepare::gaussian_kl, cpu::gaussian_kl>(m, "gaussian_kl");
  on_cpu_and_meta<ops::gaussian_kl_backward, prepare::gaussian_kl_backward, cpu::gaussian_kl_backward>(
      m, "_gaussian_kl_backward");
}

}  // namespace fastelbo
