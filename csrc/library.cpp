// Every op, once. Names and shapes: K samples, B batch; recon [K?, B, *event], x and mask [B, *event], mu [B, *latent].
//
// "second" and "third" are the likelihood's other parameters (a Gaussian's logvar), each in a shape of its own: that of
// recon, [*event] or 0-d. "needs" says which inputs want a gradient; a gradient that is not wanted comes back undefined
// (None in Python).
#include <torch/library.h>

TORCH_LIBRARY(fastelbo, m) {
  // latent
  m.def(
      "rsample(Tensor mu, Tensor logvar, SymInt? num_samples, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed, "
      "Tensor? eps, SymInt first_sample=0) -> (Tensor z, Tensor kl, Tensor log_ratio, Tensor gates)");
  m.def(
      "_rsample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_ratio, Tensor? grad_gates, Tensor mu, "
      "Tensor logvar, SymInt? num_samples, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed, Tensor? eps, "
      "SymInt first_sample, bool[5] needs) "
      "-> (Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar, Tensor eps)");
  // Row i is sample[i] of datum[i], of the samples that rsample draws with the same seed: both int64 [n].
  // z [n, *latent], log_ratio [n], gates [2, n]
  m.def(
      "_rsample_kept(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor sample, Tensor datum, "
      "Tensor seed) -> (Tensor z, Tensor log_ratio, Tensor gates)");
  m.def(
      "_rsample_kept_backward(Tensor? grad_z, Tensor? grad_log_ratio, Tensor? grad_gates, Tensor mu, Tensor logvar, "
      "Tensor? prior_mu, Tensor? prior_logvar, Tensor sample, Tensor datum, Tensor seed, bool[4] needs) "
      "-> (Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar)");
  // The noise of rsample, float32 [n, size], of the rows int64 [n]: row r has the elements r size to (r + 1) size - 1.
  m.def("_normal_rows(Tensor seed, Tensor rows, SymInt size) -> Tensor");
  m.def("gaussian_kl(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, float free_bits=0.) -> Tensor");
  m.def(
      "_gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "float free_bits, bool[4] needs) -> (Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar)");

  // likelihood
  m.def("log_prob(Tensor recon, Tensor x, Tensor? second, Tensor? third, Tensor? mask, str likelihood) -> Tensor");
  m.def(
      "_log_prob_backward(Tensor grad, Tensor recon, Tensor x, Tensor? second, Tensor? third, Tensor? mask, "
      "str likelihood, bool[4] needs) -> (Tensor recon, Tensor x, Tensor second, Tensor third)");

  // objective
  m.def("log_mean_exp(Tensor log_w, int dim=0) -> Tensor");
  m.def("_log_mean_exp_backward(Tensor grad, Tensor log_w, int dim) -> (Tensor log_w)");
  m.def(
      "elbo_loss(Tensor recon, Tensor x, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "Tensor? second, Tensor? third, Tensor? mask, float beta, Tensor? beta_tensor, float free_bits, str likelihood, "
      "str reduction) -> (Tensor loss, Tensor log_likelihood, Tensor kl)");
  // also the gradients of the loss, computed while each row is in the cache
  m.def(
      "_elbo_loss_forward(Tensor recon, Tensor x, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "Tensor? second, Tensor? third, Tensor? mask, float beta, Tensor? beta_tensor, float free_bits, str likelihood, "
      "str reduction, bool[7] needs) "
      "-> (Tensor loss, Tensor log_likelihood, Tensor kl, Tensor grad_recon, Tensor grad_mu, Tensor grad_logvar, "
      "Tensor grad_prior_mu, Tensor grad_prior_logvar, Tensor grad_second, Tensor grad_third)");
  // Multiply t in place by a scalar on its device; skipped if the scalar is 1. For gradients that only the caller has.
  m.def("_scale_(Tensor(a!) t, Tensor factor) -> ()");
  // the six numbers of an estimator: see csrc/math/estimator.h
  m.def(
      "multi_sample_loss(Tensor recon, Tensor x, Tensor log_ratio, Tensor? gates, Tensor? second, Tensor? third, "
      "Tensor? mask, str likelihood, float[] estimator, str reduction) -> (Tensor loss, Tensor log_likelihood)");
  m.def(
      "_multi_sample_loss_forward(Tensor recon, Tensor x, Tensor log_ratio, Tensor? gates, Tensor? second, "
      "Tensor? third, Tensor? mask, str likelihood, float[] estimator, str reduction, bool[5] needs) "
      "-> (Tensor loss, Tensor log_likelihood, Tensor grad_recon, Tensor grad_log_ratio, Tensor grad_gates, "
      "Tensor grad_second, Tensor grad_third)");
  // of log w [K, B]: the bound [B], its gradient by log w [K, B], and the factors of the gates [2, K, B]
  m.def("_multi_sample_weights(Tensor log_w, float[] estimator) -> (Tensor bound, Tensor weights, Tensor gates)");

  // ppca: x [N, D], W [D, M], b [D]
  m.def("ppca_log_prob(Tensor x, Tensor W, Tensor b, Tensor log_sigma2) -> Tensor");
  // also what the backward needs, in float64: see composite/ppca.cpp
  m.def(
      "_ppca_log_prob_forward(Tensor x, Tensor W, Tensor b, Tensor log_sigma2) "
      "-> (Tensor log_prob, Tensor coords, Tensor rest, Tensor basis, Tensor triangle, Tensor whiten)");
  m.def(
      "_ppca_log_prob_backward(Tensor grad, Tensor x, Tensor W, Tensor b, Tensor log_sigma2, Tensor coords, "
      "Tensor rest, Tensor basis, Tensor triangle, Tensor whiten, bool[4] needs) "
      "-> (Tensor x, Tensor W, Tensor b, Tensor log_sigma2)");
  // W = basis triangle, orthonormal columns and [M, M]; whiten' (triangle triangle' + s2 I) whiten = I; float64
  m.def("_ppca_factor(Tensor W, Tensor log_sigma2) -> (Tensor basis, Tensor triangle, Tensor whiten)");
  // symmetric positive definite matrices [N, M, M], float64: inverses, log determinants [N]; NaN of one that is not
  m.def("_ppca_invert(Tensor matrices) -> (Tensor inverses, Tensor log_det)");
  // (x - b) basis [N, M] and |x - b|^2 [N], float64; the basis may be any matrix
  m.def("_ppca_project(Tensor x, Tensor basis, Tensor b) -> (Tensor coords, Tensor square)");
  // |x - b - basis coords|^2 [N], float64, of what _ppca_project gave for orthonormal columns; as exact as the compute
  // type of b asks for
  m.def("_ppca_rest(Tensor x, Tensor basis, Tensor b, Tensor coords, Tensor square) -> Tensor");
  // with e = weight (x - b - basis coords) [N, D], those that are needed: e, sum_n e mean' [D, M], sum_n e [D]
  m.def(
      "_ppca_residual(Tensor x, Tensor basis, Tensor b, Tensor coords, Tensor mean, Tensor weight, bool[3] needs) "
      "-> (Tensor residual, Tensor cross, Tensor sum)");
}
