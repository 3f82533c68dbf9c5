// Every op, once. Names and shapes: K samples, B batch; recon [K?, B, *event], x and mask [B, *event], mu [B, *latent].
//
// "parameters" are those of the likelihood (a Gaussian's mean and logvar): the first has the shape of recon, each other
// a shape of its own: that of recon, [*event] or 0-d. A prior broadcasts to mu. A number (beta, free_bits, alpha, ...)
// is a 0-d tensor of a float type, on the CPU or on the device; None is its default. "needs" says which inputs want a
// gradient; a gradient that is not wanted comes back undefined (None in Python). In the losses it is a mask of bits, by
// the order of the gradients that are returned, and what autograd asks for: the caller leaves it at 0.
#include <torch/library.h>

TORCH_LIBRARY(fastelbo, m) {
  // latent
  // With sample and datum, int64 [n], row i is sample[i] of datum[i], of the samples that the same seed draws: z
  // [n, *latent], log_ratio and log_q [n], gates [2, n].
  m.def(
      "rsample(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, SymInt? num_samples, Tensor? seed, "
      "Tensor? eps, Tensor? sample, Tensor? datum, SymInt first_sample=0) "
      "-> (Tensor z, Tensor kl, Tensor log_ratio, Tensor log_q, Tensor gates)");
  m.def(
      "_rsample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_ratio, Tensor? grad_log_q, "
      "Tensor? grad_gates, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, SymInt? num_samples, "
      "Tensor? seed, Tensor? eps, Tensor? sample, Tensor? datum, SymInt first_sample, bool[5] needs) "
      "-> (Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar, Tensor eps)");
  // The noise of rsample, float32 [n, size], of the rows int64 [n]: row r has the elements r size to (r + 1) size - 1.
  m.def("_normal_rows(Tensor seed, Tensor rows, SymInt size) -> Tensor");
  m.def("gaussian_kl(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor? free_bits) -> Tensor");
  m.def(
      "_gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "Tensor? free_bits, bool[4] needs) -> (Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar)");

  // likelihood
  m.def("log_prob(Tensor[] parameters, Tensor x, Tensor? mask, str likelihood) -> Tensor");
  m.def(
      "_log_prob_backward(Tensor grad, Tensor[] parameters, Tensor x, Tensor? mask, str likelihood, bool[5] needs) "
      "-> (Tensor first, Tensor second, Tensor third, Tensor fourth, Tensor x)");
  // the same of every element, [K?, B, *event]
  m.def("log_prob_elements(Tensor[] parameters, Tensor x, Tensor? mask, str likelihood) -> Tensor");
  m.def(
      "_log_prob_elements_backward(Tensor grad, Tensor[] parameters, Tensor x, Tensor? mask, str likelihood, "
      "bool[5] needs) -> (Tensor first, Tensor second, Tensor third, Tensor fourth, Tensor x)");

  // objective
  m.def("log_mean_exp(Tensor log_w, int dim=0) -> Tensor");
  m.def("_log_mean_exp_backward(Tensor grad, Tensor log_w, int dim) -> (Tensor log_w)");
  // the gradients are those of the loss, computed while each row is in the cache
  m.def(
      "elbo_loss(Tensor[] parameters, Tensor x, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "Tensor? mask, Tensor? beta, Tensor? free_bits, str likelihood, str reduction, int needs=0) "
      "-> (Tensor loss, Tensor log_likelihood, Tensor kl, Tensor first, Tensor second, Tensor third, Tensor fourth, "
      "Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar)");
  // Multiply t in place by a scalar on its device; skipped if the scalar is 1. For gradients that only the caller has.
  m.def("_scale_(Tensor(a!) t, Tensor factor) -> ()");
  // elbo_weight, alpha, groups and the three coefficients of the gradient: see csrc/math/estimator.h
  m.def(
      "multi_sample_loss(Tensor[] parameters, Tensor x, Tensor log_ratio, Tensor? gates, Tensor? mask, "
      "Tensor? elbo_weight, Tensor? alpha, int groups, float[] coefficients, str likelihood, str reduction, "
      "int needs=0) "
      "-> (Tensor loss, Tensor log_likelihood, Tensor first, Tensor second, Tensor third, Tensor fourth, "
      "Tensor log_ratio, Tensor gates)");
  // of log w [K, B]: the bound [B], its gradient by log w [K, B], the factors of the gates [2, K, B], and where asked
  // for its gradients by elbo_weight and alpha [2, B]
  m.def(
      "_multi_sample_weights(Tensor log_w, Tensor? elbo_weight, Tensor? alpha, int groups, float[] coefficients, bool "
      "slopes) "
      "-> (Tensor bound, Tensor weights, Tensor gates, Tensor slopes)");
  // minus that bound; the gradient of gates are their factors
  m.def(
      "minus_bound(Tensor log_w, Tensor? gates, Tensor? elbo_weight, Tensor? alpha, int groups, float[] coefficients) "
      "-> Tensor");

  // mixture: z [..., M]; mu, logvar [C, M]; log_weights broadcasts to [..., C], and the last size is C; None: -log C
  m.def(
      "mixture_log_prob(Tensor z, Tensor mu, Tensor logvar, Tensor? log_weights, bool per_dimension=False) -> Tensor");
  // log_prob is what the forward returned
  m.def(
      "_mixture_log_prob_backward(Tensor grad, Tensor z, Tensor mu, Tensor logvar, Tensor? log_weights, "
      "bool per_dimension, Tensor log_prob, bool[4] needs) "
      "-> (Tensor z, Tensor mu, Tensor logvar, Tensor log_weights)");

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

  // sparse: X [N, D] in the CSR form, int64 starts [N + 1], and columns, int32 or int64, which rise in every row;
  // on the CPU alone
  //
  // X matrix [N, M] of the matrix [D, M], in its dtype
  m.def("_csr_matmul(Tensor starts, Tensor columns, Tensor values, Tensor matrix) -> Tensor");
  // X' matrix [D, M] of the matrix [N, M]
  m.def("_csr_matmul_t(Tensor starts, Tensor columns, Tensor values, Tensor matrix, SymInt D) -> Tensor");
}
