// Every argument check, shared by the devices and by meta tensors: what was expected, and what came.
//
// TORCH_CHECK_VALUE raises ValueError, TORCH_CHECK_TYPE raises TypeError. Sizes are SymInts, so that one check serves
// eager calls and traced ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

#include "likelihoods/info.h"
#include "params.h"

namespace fastelbo::checks {

using OptionalTensor = std::optional<at::Tensor>;

// "float32", as Python says it
inline std::string dtype_name(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kByte: return "uint8";
    case at::kBool: return "bool";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    default: return c10::toString(t);
  }
}

// "(128, 784)", as Python says it
inline std::string shape_text(c10::SymIntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::ostringstream one;
    one << sizes[i];
    text += (i ? ", " : "") + one.str();
  }
  return text + (sizes.size() == 1 ? ",)" : ")");
}
inline std::string shape_text(const at::Tensor& t) { return shape_text(t.sym_sizes()); }

inline bool same_shape(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

inline bool is_float(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

// float32 for half types, as the sums and the returned losses
inline at::ScalarType compute_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void floating(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(is_float(t.scalar_type()), name, " must be float32, float64, bfloat16 or float16; got ",
                   dtype_name(t.scalar_type()));
}

inline void same_device(const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on ", like.device(), " like ", like_name, "; got ",
                    t.device());
}

// Float types may be mixed, but not with float64: nothing is silently rounded.
inline void same_precision(const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) {
  floating(name, t);
  TORCH_CHECK_TYPE(compute_type(t) == compute_type(like), name, " is ", dtype_name(t.scalar_type()), " but ", like_name,
                   " is ", dtype_name(like.scalar_type()), ": float64 does not mix with the other types; convert one");
}

inline void shaped(const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(same_shape(t.sym_sizes(), like.sym_sizes()), name, " must have the shape ", shape_text(like),
                    " of ", like_name, "; got ", shape_text(t));
}

// x beside a tensor of parameters. mixed: x may be of any float type, whatever that of the parameters.
inline void data(const at::Tensor& x, const char* like_name, const at::Tensor& like, Domain domain = Domain::reals,
                 bool mixed = false) {
  same_device("x", x, like_name, like);
  const auto xt = x.scalar_type();
  const bool counts = domain == Domain::counts;
  if (xt == at::kByte || (counts ? xt == at::kShort || xt == at::kInt || xt == at::kLong : xt == at::kBool)) return;
  TORCH_CHECK_TYPE(is_float(xt), "x must be ", data_of(domain), "; got ", dtype_name(xt));
  if (!mixed) same_precision("x", x, like_name, like);
}

inline const LikelihoodInfo& likelihood_named(std::string_view name) {
  std::string names;
  for (int i = 0; i < likelihood_count(); ++i) {
    if (name == likelihood_info(i).name) return likelihood_info(i);
    names += std::string(i ? ", " : "") + '"' + likelihood_info(i).name + '"';
  }
  TORCH_CHECK_VALUE(false, "likelihood must be one of ", names, "; got \"", name, "\"");
}

enum class Reduction { none, mean, sum };

inline Reduction reduction(std::string_view name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  TORCH_CHECK_VALUE(name == "none", "reduction must be one of \"mean\", \"sum\", \"none\"; got \"", name, "\"");
  return Reduction::none;
}

// The parameters of a likelihood, and what goes with them.
inline const LikelihoodInfo& log_prob(at::TensorList parameters, const at::Tensor& x, const OptionalTensor& mask,
                                      std::string_view likelihood) {
  static constexpr const char* kNames[] = {"recon", "the second tensor of recon", "the third tensor of recon",
                                           "the fourth tensor of recon"};
  static constexpr const char* kCounts[] = {"no tensor",     "one tensor",   "a pair",
                                            "three tensors", "four tensors", "more than four"};
  const LikelihoodInfo& info = likelihood_named(likelihood);
  const int count = int(std::min<size_t>(parameters.size(), kMaxParameters + 1));
  if (count < info.fewest || count > info.most) {
    std::string names;
    for (int i = 0; i < info.most; ++i) names += std::string(i ? ", " : "") + info.parameters[i];
    TORCH_CHECK_VALUE(false, "recon must be ", info.most == 1 ? "one tensor" : "(" + names + ")",
                      info.fewest < info.most ? ", where the last may be left out," : "", " for likelihood \"",
                      likelihood, "\"; got ", kCounts[count]);
  }
  const at::Tensor& recon = parameters[0];
  floating("recon", recon);
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must be [B, *event]; got a 0-d tensor");
  const auto xs = x.sym_sizes(), rs = recon.sym_sizes();
  const bool sampled = rs.size() == xs.size() + 1;
  if (!(sampled ? same_shape(rs.slice(1), xs) : same_shape(rs, xs))) {
    TORCH_CHECK_VALUE(false, "recon must be [B, *event] or [K, B, *event] with B=", xs[0],
                      " and event=", shape_text(xs.slice(1)), " from x; got ", shape_text(recon));
  }
  TORCH_CHECK_VALUE(!sampled || rs[0] != 0, "recon must hold at least one sample; got K=0 in ", shape_text(recon));
  data(x, "recon", recon, info.domain);
  for (int i = 1; i < count; ++i) {
    const at::Tensor& t = parameters[i];
    const auto ts = t.sym_sizes();
    const bool is_data = i >= info.most - info.data;
    TORCH_CHECK_VALUE(ts.empty() || same_shape(ts, rs) || same_shape(ts, xs.slice(1)), kNames[i],
                      " must have the shape ", shape_text(rs), " of recon's first tensor, ", shape_text(xs.slice(1)),
                      " of one datum, or be 0-d; got ", shape_text(t));
    same_device(kNames[i], t, "the first", recon);
    if (is_data) {
      TORCH_CHECK_VALUE(!t.requires_grad(), kNames[i],
                        " is data, and must not require a gradient; got requires_grad=True");
      if (at::isIntegralType(t.scalar_type(), /*includeBool=*/false)) continue;
    }
    same_precision(kNames[i], t, "the first", recon);
  }
  if (mask.has_value()) {
    shaped("mask", *mask, "x", x);
    same_device("mask", *mask, "recon", recon);
    const auto mt = mask->scalar_type();
    TORCH_CHECK_TYPE(is_float(mt) || mt == at::kBool || mt == at::kByte,
                     "mask must be bool, uint8 or a float type; got ", dtype_name(mt));
    TORCH_CHECK_VALUE(!mask->requires_grad(), "mask must not require a gradient; got requires_grad=True");
  }
  return info;
}

// An upstream gradient: of the compute type, as the output of this shape that it belongs to.
inline void upstream(const char* name, const at::Tensor& grad, c10::SymIntArrayRef shape, const at::Tensor& like) {
  TORCH_CHECK_VALUE(same_shape(grad.sym_sizes(), shape), name, " must have the shape ", shape_text(shape), "; got ",
                    shape_text(grad));
  TORCH_CHECK_TYPE(grad.scalar_type() == compute_type(like), name, " must be ", dtype_name(compute_type(like)),
                   "; got ", dtype_name(grad.scalar_type()));
  same_device(name, grad, "the inputs", like);
}

// A number beside tensors like this one: on their device, or on the CPU.
inline void number(const char* name, const OptionalTensor& t, const at::Tensor& like) {
  if (!t.has_value()) return;
  floating(name, *t);
  TORCH_CHECK_VALUE(t->dim() == 0, name, " must be a float or a 0-d tensor; got the shape ", shape_text(*t));
  if (!t->is_cpu()) same_device(name, *t, "the inputs", like);
}

inline void free_bits(const OptionalTensor& t, const at::Tensor& mu) {
  number("free_bits", t, mu);
  TORCH_CHECK_VALUE(!t.has_value() || !t->requires_grad(),
                    "free_bits must not require a gradient; got requires_grad=True");
}

// Whether sizes broadcast to a shape.
inline bool broadcasts(c10::SymIntArrayRef sizes, c10::SymIntArrayRef shape) {
  if (sizes.size() > shape.size()) return false;
  const size_t missing = shape.size() - sizes.size();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && sizes[i] != shape[missing + i]) return false;
  }
  return true;
}

inline void latent(const at::Tensor& mu, const at::Tensor& logvar, const OptionalTensor& prior_mu,
                   const OptionalTensor& prior_logvar) {
  floating("mu", mu);
  TORCH_CHECK_VALUE(mu.dim() >= 1, "mu must be [B, *latent]; got a 0-d tensor");
  const auto like_mu = [&](const char* name, const at::Tensor& t) {
    same_precision(name, t, "mu", mu);
    same_device(name, t, "mu", mu);
  };
  shaped("logvar", logvar, "mu", mu);
  like_mu("logvar", logvar);
  const auto prior = [&](const char* name, const OptionalTensor& t) {
    if (!t.has_value()) return;
    TORCH_CHECK_VALUE(broadcasts(t->sym_sizes(), mu.sym_sizes()), name, " must broadcast to the shape ", shape_text(mu),
                      " of mu; got ", shape_text(*t));
    like_mu(name, *t);
  };
  prior("prior_mu", prior_mu), prior("prior_logvar", prior_logvar);
}

inline void seed(const at::Tensor& t, const at::Tensor& mu) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, "seed must be an int64 tensor; got ", dtype_name(t.scalar_type()));
  TORCH_CHECK_VALUE(t.sym_numel() == 1, "seed must hold one element; got the shape ", shape_text(t));
  same_device("seed", t, "mu", mu);
}

// [K?, B, *latent], or [n, *latent] of chosen samples.
inline c10::SymDimVector samples_shape(const at::Tensor& mu, const std::optional<c10::SymInt>& num_samples,
                                       const OptionalTensor& sample) {
  c10::SymDimVector shape;
  if (num_samples) shape.push_back(*num_samples);
  for (const auto& s : mu.sym_sizes()) shape.push_back(s);
  if (sample.has_value()) shape[0] = sample->sym_size(0);
  return shape;
}

inline void noise(const at::Tensor& mu, const std::optional<c10::SymInt>& num_samples, const OptionalTensor& seed,
                  const OptionalTensor& eps, const OptionalTensor& sample, const OptionalTensor& datum,
                  const c10::SymInt& first_sample) {
  TORCH_CHECK_VALUE(!num_samples || *num_samples >= 1, "num_samples must be at least 1; got ", *num_samples);
  TORCH_CHECK_VALUE(first_sample >= 0, "first_sample must be at least 0; got ", first_sample);
  TORCH_CHECK_VALUE(seed.has_value() != eps.has_value(), "rsample takes either seed or eps; got ",
                    seed.has_value() ? "both" : "neither");
  TORCH_CHECK_VALUE(
      sample.has_value() == datum.has_value() && !(sample.has_value() && (num_samples || eps.has_value())),
      "sample and datum go together, with a seed and without num_samples");
  if (seed.has_value()) checks::seed(*seed, mu);
  if (sample.has_value()) {
    for (const auto& [name, t] : {std::pair<const char*, const at::Tensor&>{"sample", *sample}, {"datum", *datum}}) {
      TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, name, " must be int64; got ", dtype_name(t.scalar_type()));
      TORCH_CHECK_VALUE(t.dim() == 1, name, " must be [n]; got ", shape_text(t));
      same_device(name, t, "mu", mu);
    }
    shaped("datum", *datum, "sample", *sample);
  }
  if (!eps.has_value()) return;
  const c10::SymDimVector shape = samples_shape(mu, num_samples, sample);
  TORCH_CHECK_VALUE(same_shape(eps->sym_sizes(), shape), "eps must have the shape ", shape_text(shape),
                    " (num_samples and mu); got ", shape_text(*eps));
  same_precision("eps", *eps, "mu", mu);
  same_device("eps", *eps, "mu", mu);
}

// The upstream gradients of samples of that shape, of which `lead` dimensions are not latent.
inline void rsample_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                             const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_log_q,
                             const OptionalTensor& grad_gates, const at::Tensor& mu, c10::SymIntArrayRef shape,
                             size_t lead) {
  if (grad_z.has_value()) {
    TORCH_CHECK_VALUE(same_shape(grad_z->sym_sizes(), shape), "grad_z must have the shape ", shape_text(shape),
                      "; got ", shape_text(*grad_z));
    same_precision("grad_z", *grad_z, "mu", mu);
    same_device("grad_z", *grad_z, "mu", mu);
  }
  if (grad_kl.has_value()) upstream("grad_kl", *grad_kl, {mu.sym_size(0)}, mu);
  const auto rows = [&](const char* name, const OptionalTensor& grad) {
    if (grad.has_value()) upstream(name, *grad, shape.slice(0, lead), mu);
  };
  rows("grad_log_ratio", grad_log_ratio), rows("grad_log_q", grad_log_q);
  if (!grad_gates.has_value()) return;
  c10::SymDimVector gates{c10::SymInt(2)};
  gates.append(shape.begin(), shape.begin() + lead);
  upstream("grad_gates", *grad_gates, gates, mu);
}

inline void elbo_loss(const at::Tensor& recon, const at::Tensor& x, const at::Tensor& mu, const OptionalTensor& beta) {
  TORCH_CHECK_VALUE(mu.sym_size(0) == x.sym_size(0), "mu must be [B, *latent] with B=", x.sym_size(0), " from x; got ",
                    shape_text(mu));
  same_precision("mu", mu, "recon", recon);
  same_device("mu", mu, "recon", recon);
  number("beta", beta, recon);
}

// The numbers of an estimator, for K samples of the type and device of `like`.
inline void estimator(const OptionalTensor& elbo_weight, const OptionalTensor& alpha, int64_t groups,
                      at::ArrayRef<double> coefficients, const c10::SymInt& K, const at::Tensor& like) {
  number("elbo_weight", elbo_weight, like), number("alpha", alpha, like);
  TORCH_CHECK_VALUE(coefficients.size() == 3, "coefficients must be three numbers; got ", coefficients.size());
  TORCH_CHECK_VALUE(groups >= 1 && K % groups == 0, "groups must divide the number of samples K=", K, "; got ", groups);
}

// log w or log ratios [K, B] like `like`, and gates for them.
inline void gates(const OptionalTensor& gates, const at::Tensor& like) {
  if (!gates.has_value()) return;
  const c10::SymInt K = like.sym_size(0), B = like.sym_size(1);
  TORCH_CHECK_VALUE(same_shape(gates->sym_sizes(), {c10::SymInt(2), K, B}), "gates must be [2, K, B] with K=", K,
                    " and B=", B, "; got ", shape_text(*gates));
  same_precision("gates", *gates, "the samples", like);
  same_device("gates", *gates, "the samples", like);
}

inline void multi_sample_loss(const at::Tensor& recon, const at::Tensor& x, const at::Tensor& log_ratio) {
  TORCH_CHECK_VALUE(recon.dim() == x.dim() + 1, "recon must be [K, B, *event] with B=", x.sym_size(0),
                    " and event=", shape_text(x.sym_sizes().slice(1)), " from x; got ", shape_text(recon));
  TORCH_CHECK_VALUE(same_shape(log_ratio.sym_sizes(), recon.sym_sizes().slice(0, 2)),
                    "log_ratio must be [K, B] = ", shape_text(recon.sym_sizes().slice(0, 2)), " like recon; got ",
                    shape_text(log_ratio));
  same_precision("log_ratio", log_ratio, "recon", recon);
  same_device("log_ratio", log_ratio, "recon", recon);
}

// The dimension averaged by log_mean_exp, counted from the front.
inline int64_t log_mean_exp(const at::Tensor& log_w, int64_t dim) {
  floating("log_w", log_w);
  TORCH_CHECK_VALUE(log_w.dim() >= 1, "log_w must have at least one dimension; got a 0-d tensor");
  TORCH_CHECK_INDEX(dim >= -log_w.dim() && dim < log_w.dim(), "dim must be in [", -log_w.dim(), ", ", log_w.dim() - 1,
                    "] for log_w of shape ", shape_text(log_w), "; got ", dim);
  const int64_t d = dim < 0 ? dim + log_w.dim() : dim;
  TORCH_CHECK_VALUE(log_w.sym_size(d) != 0, "log_w must hold at least one weight along dim ", dim, "; got the shape ",
                    shape_text(log_w));
  return d;
}

inline int64_t log_mean_exp_backward(const at::Tensor& grad, const at::Tensor& log_w, int64_t dim) {
  const int64_t d = log_mean_exp(log_w, dim);
  c10::SymDimVector shape(log_w.sym_sizes().begin(), log_w.sym_sizes().end());
  shape.erase(shape.begin() + d);
  upstream("grad", grad, shape, log_w);
  return d;
}

// Points z [..., M] of a mixture of C components.
inline void mixture(const at::Tensor& z, const at::Tensor& mu, const at::Tensor& logvar,
                    const OptionalTensor& log_weights) {
  floating("z", z);
  TORCH_CHECK_VALUE(z.dim() >= 1, "z must be [..., M]; got a 0-d tensor");
  const c10::SymInt M = z.sym_size(-1);
  TORCH_CHECK_VALUE(mu.dim() == 2 && mu.sym_size(1) == M, "mu must be [C, M] with M=", M, " from z; got ",
                    shape_text(mu));
  TORCH_CHECK_VALUE(mu.sym_size(0) != 0, "mu must hold at least one component; got the shape ", shape_text(mu));
  shaped("logvar", logvar, "mu", mu);
  const auto like_z = [&](const char* name, const at::Tensor& t) {
    same_precision(name, t, "z", z);
    same_device(name, t, "z", z);
  };
  like_z("mu", mu), like_z("logvar", logvar);
  if (!log_weights.has_value()) return;
  const at::Tensor& w = *log_weights;
  c10::SymDimVector shape(z.sym_sizes().begin(), z.sym_sizes().end());
  shape.back() = mu.sym_size(0);
  TORCH_CHECK_VALUE(w.dim() >= 1 && w.sym_size(-1) == shape.back() && broadcasts(w.sym_sizes(), shape),
                    "log_weights must broadcast to the shape ", shape_text(shape),
                    " of a number for each of C=", shape.back(), " components and each z; got ", shape_text(w));
  like_z("log_weights", w);
}

// The shape of its log density: that of z, without its last dimension if that is summed over.
inline c10::SymIntArrayRef mixture_shape(const at::Tensor& z, bool per_dimension) {
  return z.sym_sizes().slice(0, z.dim() - (per_dimension ? 0 : 1));
}

inline void ppca_shapes(const at::Tensor& x, const at::Tensor& W, const at::Tensor& b) {
  TORCH_CHECK_VALUE(W.dim() == 2 && W.sym_size(1) >= 1, "W must be [D, M] with M of at least 1; got ", shape_text(W));
  const c10::SymInt D = W.sym_size(0);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.sym_size(1) == D, "x must be [N, D] with D=", D, " from W; got ", shape_text(x));
  TORCH_CHECK_VALUE(b.dim() == 1 && b.sym_size(0) == D, "b must be [D] with D=", D, " from W; got ", shape_text(b));
  same_device("b", b, "W", W);
}

inline void ppca_factor(const at::Tensor& W, const at::Tensor& log_sigma2) {
  floating("W", W);
  TORCH_CHECK_VALUE(W.dim() == 2 && W.sym_size(1) >= 1, "W must be [D, M] with M of at least 1; got ", shape_text(W));
  TORCH_CHECK_VALUE(log_sigma2.dim() == 0, "log_sigma2 must be a 0-d tensor; got the shape ", shape_text(log_sigma2));
  same_precision("log_sigma2", log_sigma2, "W", W);
  same_device("log_sigma2", log_sigma2, "W", W);
}

inline void ppca_invert(const at::Tensor& matrices) {
  TORCH_CHECK_TYPE(matrices.scalar_type() == at::kDouble, "matrices must be float64; got ",
                   dtype_name(matrices.scalar_type()));
  TORCH_CHECK_VALUE(matrices.dim() == 3 && matrices.sym_size(1) == matrices.sym_size(2),
                    "matrices must be [N, M, M]; got ", shape_text(matrices));
}

inline void ppca(const at::Tensor& x, const at::Tensor& W, const at::Tensor& b, const at::Tensor& log_sigma2) {
  floating("W", W);
  ppca_shapes(x, W, b);
  data(x, "W", W);
  same_precision("b", b, "W", W);
  ppca_factor(W, log_sigma2);
}

inline void float64(const char* name, const at::Tensor& t, c10::SymIntArrayRef shape, const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, name, " must be float64; got ", dtype_name(t.scalar_type()));
  TORCH_CHECK_VALUE(same_shape(t.sym_sizes(), shape), name, " must be ", shape, "; got ", shape_text(t));
  same_device(name, t, "b", like);
}

// The private ops: data of any precision, the basis and what is of its coordinates in float64.
inline void ppca_project(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& b) {
  floating("b", b);
  ppca_shapes(x, basis, b);
  data(x, "b", b, Domain::reals, /*mixed=*/true);
  float64("basis", basis, basis.sym_sizes(), b);
}

inline void ppca_rest(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& b, const at::Tensor& coords,
                      const at::Tensor& square) {
  ppca_project(x, basis, b);
  float64("coords", coords, {x.sym_size(0), basis.sym_size(1)}, b);
  float64("square", square, {x.sym_size(0)}, b);
}

inline void ppca_residual(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& b, const at::Tensor& coords,
                          const at::Tensor& mean, const at::Tensor& weight) {
  ppca_rest(x, basis, b, coords, weight);
  float64("mean", mean, coords.sym_sizes(), b);
}

inline void csr(const at::Tensor& starts, const at::Tensor& columns, const at::Tensor& values,
                const at::Tensor& matrix) {
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kLong, "starts must be int64; got ", dtype_name(starts.scalar_type()));
  TORCH_CHECK_VALUE(starts.dim() == 1 && starts.sym_size(0) >= 1, "starts must be [N + 1]; got ", shape_text(starts));
  TORCH_CHECK_TYPE(columns.scalar_type() == at::kInt || columns.scalar_type() == at::kLong,
                   "columns must be int32 or int64; got ", dtype_name(columns.scalar_type()));
  TORCH_CHECK_VALUE(columns.dim() == 1 && same_shape(columns.sym_sizes(), values.sym_sizes()),
                    "columns and values must be [n], both; got ", shape_text(columns), " and ", shape_text(values));
  data(values, "matrix", matrix, Domain::reals, /*mixed=*/true);
  TORCH_CHECK_TYPE(matrix.scalar_type() == at::kFloat || matrix.scalar_type() == at::kDouble,
                   "matrix must be float32 or float64; got ", dtype_name(matrix.scalar_type()));
  TORCH_CHECK_VALUE(matrix.dim() == 2, "matrix must have 2 dimensions; got ", shape_text(matrix));
}

}  // namespace fastelbo::checks
