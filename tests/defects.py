"""Defects that tests must find: plausible mistakes, each of which a user would notice. scripts/mutants.py plants them.

An entry moves with its code: `old` occurs exactly once in its file, which tests/packaging/test_defects.py checks.
"""

from typing import NamedTuple


class Defect(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # files of tests/ that are run first, being likely to find it


DEFECTS = [
    # Latent: sampling and the KL.
    Defect(
        "gated gradient of eps without the path's factor",
        "csrc/math/latent.h",
        "by_path * std + up.minus_log_q * up.path * eps, slope,",
        "by_path * std + up.minus_log_q * eps, slope,",
        ("ops/test_twins.py",),
    ),
    Defect(
        "the backward of rsample draws from sample 0 on",
        "csrc/prepare/latent.h",
        "set_draws(p, op.views, in);\n  p.grad",
        "set_draws(p, op.views, in);\n  p.first_sample = 0;\n  p.grad",
        ("ops/test_values.py", "ops/test_derivatives.py"),
    ),
    # Likelihoods.
    Defect(
        "sigmoid of the wrong sign in the gradient by zero_logits",
        "csrc/likelihoods/zinb.h",
        "w[kThird] = pi >= 0 ? tail - 1 : -tail;",
        "w[kThird] = pi >= 0 ? -tail : tail - 1;",
        ("ops/test_counts.py", "ops/test_likelihood.py"),
    ),
    Defect(
        "nb without its term of a vanishing theta",
        "csrc/likelihoods/nb.h",
        "in.x * lost + below(w[kR], kFaintTheta<T>) + below",
        "in.x * lost + below",
        ("ops/test_counts.py",),
    ),
    Defect(
        "scvi's 1e-8 added to the mean alone",
        "csrc/likelihoods/nb_mean.h",
        "return at_most(in.p.second + in.added, kThetaLimit<T>);",
        "return at_most(in.p.second, kThetaLimit<T>);",
        ("ops/test_counts.py",),
    ),
    Defect(
        "the responsibility of the second component in the gradient by the first mean",
        "csrc/likelihoods/nb_mixture.h",
        "first == 0 ? T(0) : first * a.d.first",
        "first == 0 ? T(0) : second * a.d.first",
        ("ops/test_counts.py",),
    ),
    Defect(
        "all trials failed, by the formula of those that all succeeded",
        "csrc/likelihoods/beta_binomial.h",
        "(t.x == 0 ? w[kSecond] : of_x)",
        "(t.x == 0 ? w[kFirst] : of_x)",
        ("ops/test_counts.py",),
    ),
    Defect(
        "a shared parameter's gradient is summed in the first tile",
        "csrc/cpu/kernels/likelihood.h",
        "T* __restrict to = event_[i] + column;",
        "T* __restrict to = event_[i] + column % n;",
        ("ops/test_likelihood.py",),
    ),
    Defect(
        "mask's weights not applied to gradients on CUDA",
        "csrc/cuda/kernels/likelihood.cuh",
        "const T w = factor * weight[j];",
        "const T w = factor;",
        ("ops/test_likelihood.py",),
    ),
    # Objectives.
    Defect(
        "miwae divides by K in each group",
        "csrc/math/weights.h",
        "double value = total.value(size) / t;",
        "double value = total.value(K) / t;",
        ("ops/test_multi_sample.py",),
    ),
    Defect(
        "gradient of a tensor beta without free bits",
        "csrc/composite/objective.cpp",
        "const bool again = in.free_bits.has_value() || !kl.defined()",
        "const bool again = !kl.defined()",
        ("ops/test_elbo.py",),
    ),
    Defect(
        "float16 gradients are scaled after they were rounded",
        "csrc/autograd/objective.cpp",
        "return !wants_grad(t) || t.scalar_type() != at::kHalf; }",
        "return !wants_grad(t) || t.scalar_type() != at::kBFloat16; }",
        ("ops/test_edges.py",),
    ),
    Defect(
        "sum over the samples in place of the mean, in the gradient written by the forward",
        "csrc/prepare/objective.h",
        "-datum_weight(op.reduction, op.rows.params.B) / double(op.rows.params.K);",
        "-datum_weight(op.reduction, op.rows.params.B);",
        ("ops/test_elbo.py",),
    ),
    # Mixtures.
    Defect(
        "the gradient of a mixture's logvar without that of its normalization",
        "csrc/cpu/kernels/mixture.h",
        "sums[apart + j] += double(by_logvar[j * kApart]) - total;",
        "sums[apart + j] += double(by_logvar[j * kApart]);",
        ("ops/test_mixture.py",),
    ),
    Defect(
        "a mixture's sum keeps the scale of an earlier maximum",
        "csrc/cpu/kernels/mixture.h",
        "sum[i] = sum[i] * double(exps[i]) + double(part[i]);",
        "sum[i] = sum[i] + double(part[i]);",
        ("ops/test_mixture.py",),
    ),
    Defect(
        "rows of the same weights are not made neighbours",
        "csrc/prepare/mixture.h",
        "(differ ? order_ : shared).push_back(d);",
        "shared.push_back(d);",
        ("ops/test_mixture.py",),
    ),
    # Probabilistic PCA.
    Defect(
        "gradient of log_sigma2 without its D - M directions",
        "csrc/composite/ppca.cpp",
        "s2 * whiten.square().sum(1).sum() + (W.sym_size(0) - W.sym_size(1));",
        "s2 * whiten.square().sum(1).sum();",
        ("ppca/test_ppca.py",),
    ),
    Defect(
        "columns that are nearly alike are not made orthogonal twice",
        "csrc/cpu/kernels/ppca.h",
        "} while (norm < 0.5 * before && norm > 4 * 0x1p-53 * whole);",
        "} while (norm > before);",
        ("ppca/test_ppca.py",),
    ),
    # The public functions.
    Defect(
        "ELBOLoss drops its mask",
        "fastelbo/losses/elbo.py",
        '"prior_logvar": prior_logvar, "mask": mask, "reduction"',
        '"prior_logvar": prior_logvar, "reduction"',
        ("ops/test_elbo.py",),
    ),
    Defect(
        "elbo_loss with a beta per dimension forgets the prior",
        "fastelbo/losses/elbo.py",
        "latents = mu, logvar, prior_mu, prior_logvar",
        "latents = mu, logvar, None, None",
        ("ops/test_bounds.py",),
    ),
    Defect(
        "the KL of bound_loss's parts is that of the first layer",
        "fastelbo/losses/bounds.py",
        "ordered_sum(torch.stack([mean_kl(p) for p in posteriors]), 0)",
        "mean_kl(posteriors[0])",
        ("ops/test_bounds.py",),
    ),
    Defect(
        "rws takes a single sample",
        "fastelbo/estimators.py",
        "Row(lambda: Estimator(path=0.0, score=-1.0), fewest=2)",
        "Row(lambda: Estimator(path=0.0, score=-1.0))",
        ("ops/test_multi_sample.py",),
    ),
    Defect(
        "True is a number of samples",
        "fastelbo/_internal/arguments.py",
        "if isinstance(value, bool) or not isinstance(value, Integral):",
        "if not isinstance(value, Integral):",
        ("ops/test_arguments.py",),
    ),
    Defect(
        "the twins' arguments are not checked",
        "fastelbo/_internal/ops.py",
        "        if not torch.compiler.is_compiling():\n            check(op, args)\n        return twin(*args)",
        "        return twin(*args)",
        ("ops/test_errors.py", "ops/test_reference_mode.py", "ops/test_derivatives.py"),
    ),
    Defect(
        "the twin of the KL takes exp(-prior_logvar) in half precision",
        "fastelbo/reference/latent.py",
        "mu = divided(mu, 0.5 * prior_logvar.to(dtype))",
        "mu = divided(mu, 0.5 * prior_logvar)",
        ("ops/test_twins.py",),
    ),
    Defect(
        "draws of a negative binomial take exp(log_mean) in half precision",
        "fastelbo/likelihoods.py",
        "torch.poisson(gamma * torch.exp(log_mean.to(gamma.dtype)), generator=generator)",
        "torch.poisson(gamma * torch.exp(log_mean), generator=generator)",
        ("ops/test_counts.py",),
    ),
    Defect(
        "an expanded distribution checks no values",
        "fastelbo/distributions/base.py",
        "        new._validate_args = self._validate_args\n",
        "",
        ("ops/test_distributions.py",),
    ),
    Defect(
        "a distribution takes data of log p = -inf unseen",
        "fastelbo/distributions/base.py",
        "not math.isfinite(log_p.detach().sum().item())",
        "math.isnan(log_p.detach().sum().item())",
        ("ops/test_distributions.py",),
    ),
    Defect(
        "the variance of zero-inflated counts takes E[x] as the mean of the negative binomial",
        "fastelbo/distributions/__init__.py",
        "self.mean * (1 + ratio + mean * torch.sigmoid(self.zero_logits))",
        "self.mean * (1 + ratio + self.mean * torch.sigmoid(self.zero_logits))",
        ("ops/test_distributions.py",),
    ),
    Defect(
        "the last samples of a long sum are lost",
        "fastelbo/_internal/ordered.py",
        "torch.nn.functional.pad(sums, (0, -sums.shape[1] % ROW)).view(-1, ROW)",
        "sums[:, : sums.shape[1] // ROW * ROW].reshape(-1, ROW)",
        ("ops/test_ordered.py",),
    ),
    Defect(
        "the gradient of what is expanded is summed over one dimension",
        "fastelbo/_internal/ordered.py",
        "ordered_sum(grad, *repeated).view(ctx.shape)",
        "ordered_sum(grad, *repeated[:1]).flatten()[: ctx.shape.numel()].view(ctx.shape)",
        ("ops/test_ordered.py",),
    ),
    # Models.
    Defect(
        "which samples are kept does not follow the generator",
        "fastelbo/models/kept_samples.py",
        "chosen = kept.keep_samples(log_w, keep, weights=weights.a, generator=generator)",
        "chosen = kept.keep_samples(log_w, keep, weights=weights.a, generator=None)",
        ("models/test_kept.py",),
    ),
    Defect(
        "reconstruct shows the encoder what the mask leaves out",
        "fastelbo/models/vae.py",
        "self.decode(self.encode(x, condition, mask=mask)[0], condition)",
        "self.decode(self.encode(x, condition)[0], condition)",
        ("models/test_conditional.py",),
    ),
    Defect(
        "ciwae's weight of the ELBO is 1 by default",
        "fastelbo/models/objective.py",
        '"ciwae": 0.5',
        '"ciwae": 1.0',
        ("models/test_objective.py", "models/test_vae.py"),
    ),
    Defect(
        "the KL of kept samples is that of all samples, in place of the one in closed form",
        "fastelbo/models/kept_samples.py",
        "if priors.is_density(model.prior) else posterior.kl",
        "if model.prior is None or priors.is_density(model.prior) else posterior.kl",
        ("models/test_kept.py",),
    ),
    Defect(
        "the KL under another density is that of the standard normal",
        "fastelbo/losses/sampling.py",
        "self._replace(kl=-log_ratio, log_ratio=log_ratio, prior=(log_prior,))",
        "self._replace(log_ratio=log_ratio, prior=(log_prior,))",
        ("models/test_priors.py",),
    ),
    Defect(
        "log_marginal by the prior reads what the mask leaves out",
        "fastelbo/models/marginal.py",
        "            return z, log_prob(whole, x, likelihood=model.likelihood, mask=mask)",
        "            return z, log_prob(whole, x, likelihood=model.likelihood)",
        ("models/test_conditional.py", "models/test_marginal.py"),
    ),
    Defect(
        "merged diagnostics lose the other's effective sample size",
        "fastelbo/models/diagnostics.py",
        "self._ess = other._ess if self._weighed == 0 else self._ess + other._ess",
        "self._ess = other._ess if self._weighed == 0 else self._ess",
        ("models/test_marginal.py", "models/test_distributed.py"),
    ),
    # Probabilistic PCA.
    Defect(
        "observed may broadcast to x",
        "fastelbo/ppca/density.py",
        "if observed.dtype != torch.bool or observed.shape != x.shape:",
        "if observed.dtype != torch.bool:",
        ("ppca/test_ppca.py", "ops/test_errors.py"),
    ),
    Defect(
        "fit_transform ignores sample_weight",
        "fastelbo/ppca/model.py",
        "self.fit(X, method, **options).transform(X)",
        'self.fit(X, method, **options | {"sample_weight": None}).transform(X)',
        ("ppca/test_ppca_fit.py",),
    ),
    Defect(
        "moments of z without the rows' weights",
        "fastelbo/ppca/missing.py",
        "of_z += (observed.any(1) * w) @ second",
        "of_z += observed.any(1).double() @ second",
        ("ppca/test_ppca_fit.py",),
    ),
    Defect(
        "missing cells count in the distance",
        "fastelbo/ppca/missing.py",
        "e = torch.where(observed, r - product(mean, W.mT), 0.0)",
        "e = r - product(mean, W.mT)",
        ("ppca/test_ppca.py",),
    ),
    Defect(
        "the deviations of imputed cells leave out the noise",
        "fastelbo/ppca/intervals.py",
        "torch.sqrt(1 + spread)",
        "torch.sqrt(spread)",
        ("ppca/test_intervals.py",),
    ),
    Defect(
        "partial_fit changes the moments of a fit before it",
        "fastelbo/sklearn.py",
        "moments = deepcopy(before) or Moments(",
        "moments = before or Moments(",
        ("ppca/test_sklearn.py",),
    ),
    Defect(
        "a masked element hands on the NaN that reaches it",
        "csrc/prepare/likelihood.h",
        "at::where(mask->eq(0), at::zeros({}, grad.options()), grad * *mask)",
        "grad * *mask",
        ("ops/test_elements.py",),
    ),
    Defect(
        "log p of an element lacks its softplus",
        "csrc/cpu/kernels/likelihood.h",
        "kSoftplus ? value[i] - log1p_unit(q[i]) : value[i]",
        "value[i]",
        ("ops/test_elements.py",),
    ),
    # The command.
    Defect(
        "each epoch starts the schedule of the step size anew",
        "fastelbo/commands/train.py",
        "start = len(self.history) * len(batches)",
        "start = 0",
        ("command/test_cli.py",),
    ),
    Defect(
        "evaluate ignores its seed",
        "fastelbo/models/evaluation.py",
        "generator = torch.Generator().manual_seed(seed)",
        "generator = torch.Generator().manual_seed(0)",
        ("command/test_cli.py",),
    ),
    Defect(
        "changed held-out data are not noticed",
        "fastelbo/data/summary.py",
        "(first.content + second.content)",
        "(first.content + first.content)",
        ("command/test_cli.py",),
    ),
    Defect(
        "a standard deviation that the decoder returned stays that of standardized data",
        "fastelbo/models/scaling.py",
        '"logvar": 2.0',
        '"logvar": 1.0',
        ("models/test_scaling.py",),
    ),
    Defect(
        "zeros that a sparse matrix does not store are not seen",
        "fastelbo/data/summary.py",
        "self.low, self.high = min(self.low, 0.0), max(self.high, 0.0)",
        "pass",
        ("data/test_dataset.py",),
    ),
    Defect(
        "a window of blocks hands out its rows as they lie in the file",
        "fastelbo/data/dataset.py",
        "shuffled[places.popleft()] = found",
        "shuffled[:] = found",
        ("data/test_dataset.py",),
    ),
    Defect(
        "a loaded model is in training mode",
        "fastelbo/models/loading.py",
        "return model.eval()",
        "return model",
        ("models/test_conditional.py",),
    ),
    # Adapters.
    Defect(
        "means over batches are not weighted by their sizes",
        "fastelbo/integrations/lightning.py",
        'defaults = {"batch_size": parts.kl.shape[-1], "sync_dist": stage != "train"}',
        'defaults = {"sync_dist": stage != "train"}',
        ("integrations/test_lightning.py",),
    ),
    Defect(
        "scvi's theta is the decoder's output, whatever the dispersion",
        "fastelbo/integrations/scvi/models.py",
        'if self.dispersion == "gene-cell":',
        "if True:",
        ("integrations/test_scvi.py",),
    ),
]
