// Every op, once. Names and shapes: K samples, B batch; recon [K?, B, *event], x and mask [B, *event], mu [B, *latent].
// "scale" is the likelihood's second parameter (a Gaussian's logvar). "needs" says which inputs want a gradient; the
// backward ops return the wanted ones, in order.
#include <torch/library.h>

TORCH_LIBRARY(fastelbo, m) {
  // latent
  m.def(
      "rsample(Tensor mu, Tensor logvar, SymInt? num_samples, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed, "
      "Tensor? eps, SymInt first_sample=0) -> (Tensor z, Tensor kl, Tensor log_ratio, Tensor gates)");
  m.def(
      "_rsample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_ratio, Tensor? grad_gates, Tensor mu, "
      "Tensor logvar, SymInt? num_samples, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed, Tensor? eps, "
      "SymInt first_sample, bool[5] needs) -> Tensor[]");
  m.def("gaussian_kl(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, float free_bits=0.) -> Tensor");
  m.def(
      "_gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "float free_bits, bool[4] needs) -> Tensor[]");

  // likelihood
  m.def("log_prob(Tensor recon, Tensor x, Tensor? scale, Tensor? mask, str likelihood) -> Tensor");
  m.def(
      "_log_prob_backward(Tensor grad, Tensor recon, Tensor x, Tensor? scale, Tensor? mask, str likelihood, "
      "bool[3] needs) -> Tensor[]");

  // objective
  m.def("log_mean_exp(Tensor log_w, int dim=0) -> Tensor");
  m.def("_log_mean_exp_backward(Tensor grad, Tensor log_w, int dim) -> Tensor");
  m.def(
      "elbo_loss(Tensor recon, Tensor x, Tensor mu, Tensor logvar, Tensor? scale, Tensor? mask, float beta, "
      "Tensor? beta_tensor, float free_bits, str likelihood, str reduction) "
      "-> (Tensor loss, Tensor log_likelihood, Tensor kl)");
  // also the gradients of the loss, computed while each row is in the cache
  m.def(
      "_elbo_loss_forward(Tensor recon, Tensor x, Tensor mu, Tensor logvar, Tensor? scale, Tensor? mask, float beta, "
      "Tensor? beta_tensor, float free_bits, str likelihood, str reduction, bool[4] needs) "
      "-> (Tensor loss, Tensor log_likelihood, Tensor kl, Tensor[] grads)");
  // t times a factor on its device, in place; reads nothing else where that is 1. For gradients that only the caller
  // has.
  m.def("_scale_(Tensor(a!) t, Tensor factor) -> ()");
  // the six numbers of an estimator: see csrc/estimator.h
  m.def(
      "multi_sample_loss(Tensor recon, Tensor x, Tensor log_ratio, Tensor? gates, Tensor? scale, Tensor? mask, "
      "str likelihood, str reduction, float elbo_share=0., float alpha=0., int groups=1, float path=1., "
      "float path_weight=0., float score=1.) -> (Tensor loss, Tensor log_likelihood)");
  m.def(
      "_multi_sample_loss_forward(Tensor recon, Tensor x, Tensor log_ratio, Tensor? gates, Tensor? scale, "
      "Tensor? mask, str likelihood, str reduction, float elbo_share, float alpha, int groups, float path, "
      "float path_weight, float score, bool[4] needs) -> (Tensor loss, Tensor log_likelihood, Tensor[] grads)");

  // ppca: x [N, D], W [D, M], b [D]
  m.def("ppca_log_prob(Tensor x, Tensor W, Tensor b, Tensor log_sigma2) -> Tensor");
  // also what the backward needs, in float64: see composite/ppca.cpp
  m.def(
      "_ppca_log_prob_forward(Tensor x, Tensor W, Tensor b, Tensor log_sigma2) "
      "-> (Tensor log_prob, Tensor coords, Tensor rest, Tensor basis, Tensor triangle, Tensor whiten)");
  m.def(
      "_ppca_log_prob_backward(Tensor grad, Tensor x, Tensor W, Tensor b, Tensor log_sigma2, Tensor coords, "
      "Tensor rest, Tensor basis, Tensor triangle, Tensor whiten, bool[4] needs) -> Tensor[]");
  // W = basis triangle, orthonormal columns and [M, M]; whiten' (triangle triangle' + s2 I) whiten = I; float64
  m.def("_ppca_factor(Tensor W, Tensor log_sigma2) -> (Tensor basis, Tensor triangle, Tensor whiten)");
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
