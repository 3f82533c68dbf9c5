"""A program of a user, for mypy --strict: what the types of results are. It is checked, not run (test_structure.py)."""

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import fastelbo
from fastelbo import LossParts, MarginalEstimate, Posterior
from fastelbo.losses import Recon
from fastelbo.models.vae import VAEOutput

x, mu, logvar, recon = (torch.zeros(4, 3) for _ in range(4))
number = torch.zeros((), requires_grad=True)

# sampling and likelihoods
posterior = fastelbo.rsample(mu, logvar, 5, seed=0)
assert_type(posterior, Posterior)
assert_type(posterior.z, Tensor)
assert_type(posterior.log_q, Tensor)
assert_type(posterior.prior, tuple[()] | tuple[Tensor] | tuple[Tensor, Tensor])
assert_type(posterior.prior_options, dict[str, Tensor])
assert_type(fastelbo.gaussian_kl(mu, logvar), Tensor)
assert_type(fastelbo.log_prob((recon, logvar), x, likelihood="gaussian"), Tensor)
assert_type(fastelbo.bernoulli_log_prob(recon, x), Tensor)
assert_type(fastelbo.gaussian_log_prob(recon, x, 0.5), Tensor)
assert_type(fastelbo.log_mean_exp(recon), Tensor)
assert_type(fastelbo.mixture_log_prob(mu, mu, logvar, per_dimension=True), Tensor)

# distributions
q = fastelbo.distributions.Gaussian(mu, scale=0.5)
assert_type(q, fastelbo.distributions.Gaussian)
assert_type(q.expand((5, 4)), fastelbo.distributions.Gaussian)
assert_type(fastelbo.distributions.NegativeBinomial(recon, 0.5, event_dims=2).log_prob(x), Tensor)
assert_type(fastelbo.distributions.NegativeBinomial(mean=recon, theta=0.5).theta, Tensor)
assert_type(fastelbo.distributions.BetaBinomial(recon, 0.5, 10).variance, Tensor)
assert_type(q.rsample((5,)), Tensor)
assert_type(fastelbo.distributions.gaussian_kl(q, torch.distributions.Normal(mu, 1.0)), Tensor)

# losses: each as a number, and as its parts
assert_type(fastelbo.elbo_loss(recon, x, mu, logvar, beta=0.5), Tensor)
assert_type(fastelbo.elbo_parts(recon, x, mu, logvar, beta=0.5), LossParts)
assert_type(fastelbo.iwae_loss(recon, x, posterior.log_ratio, reduction="sum"), Tensor)
assert_type(fastelbo.iwae_loss((recon, recon, recon), x, posterior.log_ratio, likelihood="zinb"), Tensor)
fastelbo.iwae_loss([recon, recon], x, posterior.log_ratio)  # type: ignore[arg-type]
assert_type(fastelbo.iwae_parts(recon, x, posterior.log_ratio), LossParts)
assert_type(fastelbo.multi_sample_loss(recon, x, posterior, estimator="vr", alpha=0.5), Tensor)
assert_type(fastelbo.multi_sample_parts(recon, x, posterior), LossParts)
assert_type(fastelbo.elbo_parts(recon, x, mu, logvar, beta=number, free_bits=number.detach()).kl, Tensor)
assert_type(fastelbo.multi_sample_parts(recon, x, posterior, estimator="ciwae", beta=number).log_likelihood, Tensor)
fastelbo.elbo_loss(recon, x, mu, logvar, groups=2)  # type: ignore[call-arg]
fastelbo.elbo_loss(recon, x, mu, logvar, beta="1")  # type: ignore[arg-type]

assert_type(fastelbo.elbo_loss(recon, x, mu, logvar, beta=mu[0], kl_mask=mu > 0), Tensor)
assert_type(fastelbo.gaussian_kl(mu, logvar, mask=mu > 0, reduce=False), Tensor)
assert_type(fastelbo.bound_loss(recon, posterior, estimator="dreg", kl_weight=number), Tensor)
assert_type(fastelbo.bound_parts(recon, [posterior, posterior], log_ratio=recon), LossParts)

# kept samples
kept = fastelbo.keep_samples(recon, 2, u=0.5)
assert_type(kept, fastelbo.Kept)
assert_type(fastelbo.rsample(mu, logvar, kept=kept, seed=0), Posterior)
assert_type(fastelbo.kept_loss(recon, posterior, kept, recon, estimator="iwae"), Tensor)
fastelbo.keep_samples(recon, keep="two")  # type: ignore[arg-type]

# losses as modules
assert_type(fastelbo.ELBOLoss(beta=2.0)(recon, x, mu, logvar), Tensor)
assert_type(fastelbo.IWAELoss()(recon, x, posterior.log_ratio), Tensor)
assert_type(fastelbo.ELBOLoss(beta=number).forward(recon, x, mu, logvar, prior_mu=mu), Tensor)
assert_type(fastelbo.IWAELoss("gaussian").forward((recon, recon), x, posterior.log_ratio, mask=x > 0), Tensor)
fastelbo.ELBOLoss().forward(recon, x, mu, logvar, beta=0.5)  # type: ignore[call-arg]
fastelbo.IWAELoss(reduction=1)  # type: ignore[arg-type]

# models
vae = fastelbo.VAE(nn.Linear(3, 4), nn.Linear(2, 3))
output = vae(x, 5, seed=torch.zeros(1, dtype=torch.int64), generator=None)
assert_type(output, VAEOutput)
assert_type(output.recon, Recon)
assert_type(output.posterior, Posterior)
assert_type(vae.loss(x), Tensor)
assert_type(vae.loss(x, "iwae", num_samples=5, keep=2), Tensor)
assert_type(vae.parts(x, fastelbo.Objective("ciwae", num_samples=5, beta=0.5), beta=x[0, 0]), LossParts)
assert_type(fastelbo.Objective("elbo").loss(output.recon, x, output.posterior), Tensor)
assert_type(fastelbo.Objective("vr", alpha=0.5).parts(recon, x, posterior, alpha=0.3), LossParts)
assert_type(vae.parts(x, "vr", num_samples=5, alpha=number, keep=2), LossParts)
assert_type(fastelbo.Objective("iwae", num_samples=5).draws, int | None)
assert_type(fastelbo.Objective("miwae", num_samples=6, groups=3), fastelbo.Objective)
module = fastelbo.VAELoss(vae, "dreg", num_samples=5)
assert_type(module.vae, fastelbo.VAE)
assert_type(module.objective, fastelbo.Objective)
assert_type(module.forward(x, keep=2, seed=0), Tensor)
assert_type(posterior.under(posterior.log_q), Posterior)
assert_type(vae.log_marginal(x, 100), MarginalEstimate)
assert_type(vae.sample(3, mean=True, generator=torch.Generator()), Tensor)
assert_type(fastelbo.diagnostics(posterior).kl, Tensor)
vae.loss(x, generator=3)  # type: ignore[arg-type]
with_prior = fastelbo.VAE(nn.Linear(3, 4), nn.Linear(2, 3), prior=(mu, logvar), latent_shape=(2,))
assert_type(with_prior.loss(x, condition=(x, mu), mask=x > 0, keep=2, objective="iwae", num_samples=9), Tensor)
assert_type(with_prior.log_marginal(x, 9, proposal="prior"), MarginalEstimate)
assert_type(with_prior.reconstruct(x, mask=x > 0), Tensor)
weights = fastelbo.importance_weights(vae, x, 10, mask=x > 0)
assert_type(weights.normalized, Tensor)
assert_type(fastelbo.load("runs/train"), fastelbo.VAE | fastelbo.PPCA)
meter = fastelbo.DiagnosticsMeter()
assert_type(meter.merge(fastelbo.DiagnosticsMeter()), fastelbo.DiagnosticsMeter)
assert_type(meter.result(), fastelbo.Diagnostics)

# a misspelt option is found
fastelbo.rsample(mu, logvar, num_sample=5)  # type: ignore[call-arg]
fastelbo.gaussian_kl(mu, logvar, free_bit=0.1)  # type: ignore[call-arg]
fastelbo.log_prob(recon, x, likelyhood="gaussian")  # type: ignore[call-arg]
fastelbo.log_mean_exp(recon, axis=0)  # type: ignore[call-arg]
fastelbo.elbo_loss(recon, x, mu, logvar, klmask=mu)  # type: ignore[call-arg]
fastelbo.elbo_parts(recon, x, mu, logvar, return_parts=True)  # type: ignore[call-arg]
fastelbo.iwae_loss(recon, x, posterior.log_ratio, reduce="sum")  # type: ignore[call-arg]
fastelbo.multi_sample_loss(recon, x, posterior, estimater="dreg")  # type: ignore[call-arg]
fastelbo.bound_loss(recon, posterior, kl_wight=0.5)  # type: ignore[call-arg]
fastelbo.keep_samples(recon, 2, estimater="iwae")  # type: ignore[call-arg]
fastelbo.importance_weights(vae, x, 10, masks=x)  # type: ignore[call-arg]
fastelbo.VAE(nn.Linear(3, 4), nn.Linear(2, 3), priors=None)  # type: ignore[call-arg]
vae.loss(x, num_sample=5)  # type: ignore[call-arg]
vae.parts(x, num_sample=5)  # type: ignore[call-arg]
fastelbo.Objective("iwae", num_sample=5)  # type: ignore[call-arg]
fastelbo.Objective("ciwae", 5)  # type: ignore[call-arg]
fastelbo.Objective("ciwae", beta=number)  # type: ignore[arg-type]
fastelbo.VAELoss(vae, num_samples="5")  # type: ignore[arg-type]
vae(x, objective="iwae")  # type: ignore[call-arg]
vae.log_marginal(x, 100, chunksize=10)  # type: ignore[call-arg]
vae.sample(3, means=True)  # type: ignore[call-arg]
fastelbo.PPCA(2, feature=3)  # type: ignore[call-arg]
fastelbo.PPCA(2).fit(x, tolerance=1e-3)  # type: ignore[call-arg]
fastelbo.ELBOLoss(betas=2.0)  # type: ignore[call-arg]
fastelbo.distributions.Gaussian(mu, scales=0.5)  # type: ignore[call-arg]
misspelt = posterior.zs  # type: ignore[attr-defined]

# arrays in, arrays out
array: npt.NDArray[np.float32] = np.zeros((4, 3), np.float32)
ppca = fastelbo.PPCA(2)
assert_type(ppca.fit(array), fastelbo.PPCA)
ppca.fit([x, x], "em", max_iter=3)
ppca.fit([(x, mu)], group=None)
assert_type(ppca.log_prob(x), Tensor)
assert_type(ppca.log_prob(array), npt.NDArray[Any])
assert_type(ppca.posterior(x), tuple[Tensor, Tensor])
assert_type(ppca.posterior(array)[0], npt.NDArray[Any])
assert_type(ppca.elbo(x, mu, logvar), Tensor)
assert_type(ppca.fit_transform(array), npt.NDArray[Any])
assert_type(ppca.impute(array), npt.NDArray[Any])
assert_type(ppca.impute(x, return_std=True), tuple[Tensor, Tensor])
assert_type(ppca.predict(array, [0, 2])[1], npt.NDArray[Any])
assert_type(ppca.score(array), float)
assert_type(ppca.score(array, return_std=True), tuple[float, float])
assert_type(fastelbo.PPCA("bic").fit(x).n_components, int)
assert_type(fastelbo.ppca_log_prob(x, torch.zeros(3, 1), torch.zeros(3), torch.zeros(())), Tensor)
ppca.log_prob("x")  # type: ignore[type-var]

# the build
assert_type(fastelbo.build_info()["likelihoods"], list[str])
