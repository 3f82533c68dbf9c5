// Shapes of the objectives, for meta tensors and tracing.
#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

Tensor log_mean_exp_meta(const Tensor& log_w, int64_t dim) {
  return shapes::reduced_like(log_w, checks::log_mean_exp(log_w, dim));
}

Tensor log_mean_exp_backward_meta(const Tensor& grad, const Tensor& log_w, int64_t dim) {
  checks::log_mean_exp_backward(grad, log_w, dim);
  return at::empty_like(log_w, at::MemoryFormat::Contiguous);
}

ElboForward elbo_loss_forward_meta(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                   const OptionalTensor& scale, const OptionalTensor& mask, double,
                                   const OptionalTensor& beta_tensor, double free_bits, std::string_view likelihood,
                                   std::string_view reduction, std::array<bool, 4> needs) {
  checks::elbo_loss(recon, x, mu, logvar, scale, mask, beta_tensor, free_bits, likelihood);
  const OptionalTensor r = recon, m = mu, lv = logvar;
  return {shapes::loss_like(recon, x, checks::reduction(reduction)), shapes::rows_like(recon, x),
          shapes::batch_like(recon, x), shapes::grads_like({&r, &m, &lv, &scale}, needs.data())};
}

MultiSampleForward multi_sample_loss_forward_meta(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                  const OptionalTensor& gates, const OptionalTensor& scale,
                                                  const OptionalTensor& mask, std::string_view likelihood,
                                                  std::string_view reduction, double elbo_share, double alpha,
                                                  int64_t groups, double path, double path_weight, double score,
                                                  std::array<bool, 4> needs) {
  checks::multi_sample_loss(recon, x, log_ratio, gates, scale, mask, likelihood,
                            {elbo_share, alpha, groups, path, path_weight, score});
  const OptionalTensor r = recon, lr = log_ratio;
  return {shapes::loss_like(recon, x, checks::reduction(reduction)), shapes::rows_like(recon, x),
          shapes::grads_like({&r, &lr, &gates, &scale}, needs.data())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("log_mean_exp", log_mean_exp_meta);
  m.impl("_log_mean_exp_backward", log_mean_exp_backward_meta);
  m.impl("_elbo_loss_forward", elbo_loss_forward_meta);
  m.impl("_multi_sample_loss_forward", multi_sample_loss_forward_meta);
}

}  // namespace fastelbo
