"""The functions of other packages, each called as its users call it."""

import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Independent,
    LowRankMultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    kl_divergence,
)

from benchmarks.steps import Step

Functions = dict[str, Callable[..., Any]]
MISSING = [name for name in ("pythae", "pyro") if importlib.util.find_spec(name) is None]


def _posterior(mu: Tensor, logvar: Tensor) -> tuple[Independent, Independent]:
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), 1), Independent(prior, 1)


def _elbo(fit: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (kl_divergence(*_posterior(mu, logvar)) - fit).mean()


def distributions_elbo_bernoulli(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    x = x if x.is_floating_point() else x.to(recon.dtype) / 255
    fit = Independent(Bernoulli(logits=recon, validate_args=False), 1).log_prob(x)  # x is not 0 or 1 alone
    return _elbo(fit, mu, logvar)


def distributions_elbo_probs(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return _elbo(Independent(Bernoulli(probs=recon, validate_args=False), 1).log_prob(x), mu, logvar)


def distributions_elbo_gaussian(mean: Tensor, scale: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return _elbo(Independent(Normal(mean, torch.exp(0.5 * scale)), 1).log_prob(x), mu, logvar)


def distributions_rsample(
    mu: Tensor, logvar: Tensor, num_samples: int, eps: Tensor | None = None
) -> tuple[Tensor, ...]:
    q, prior = _posterior(mu, logvar)
    z = q.rsample((num_samples,)) if eps is None else mu + torch.exp(0.5 * logvar) * eps
    return z, kl_divergence(q, prior), prior.log_prob(z) - q.log_prob(z)


def distributions_iwae(recon: Tensor, x: Tensor, log_ratio: Tensor) -> Tensor:
    log_p = Independent(Bernoulli(logits=recon, validate_args=False), 1).log_prob(x)
    return (math.log(len(recon)) - torch.logsumexp(log_p + log_ratio, 0)).mean()


def distributions_ppca(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    return LowRankMultivariateNormal(b, W, torch.exp(log_sigma2).expand(len(b))).log_prob(x)


def sklearn_ppca(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    """PCA.score_samples of a PCA with these components; no gradient."""
    lengths, s2 = W.square().sum(0), math.exp(log_sigma2.item())
    pca = PCA(W.shape[1])
    pca.n_components_, pca.n_features_in_, pca.whiten = W.shape[1], W.shape[0], False
    pca.components_, pca.mean_ = (W / torch.sqrt(lengths)).mT.numpy(), b.numpy()
    pca.explained_variance_, pca.noise_variance_ = (lengths + s2).numpy(), s2
    return torch.from_numpy(pca.score_samples(x.numpy()))


def distributions_elbo_nb(log_mean: Tensor, log_theta: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    fit = NegativeBinomial(log_theta.exp(), logits=log_mean - log_theta)
    return _elbo(Independent(fit, 1).log_prob(x), mu, logvar)


def distributions_elbo_poisson(log_rate: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return _elbo(Independent(Poisson(log_rate.exp()), 1).log_prob(x), mu, logvar)


DISTRIBUTIONS: Functions = {
    "elbo_bernoulli": distributions_elbo_bernoulli,
    "elbo_uint8": distributions_elbo_bernoulli,
    "elbo_probs": distributions_elbo_probs,
    "elbo_gaussian": distributions_elbo_gaussian,
    "elbo_poisson": distributions_elbo_poisson,
    "elbo_nb": distributions_elbo_nb,
    "rsample": distributions_rsample,
    "iwae": distributions_iwae,
    "ppca": distributions_ppca,
}
SKLEARN: Functions = {"ppca_score": sklearn_ppca}


def _not_installed(*_: Any, **__: Any) -> None:
    """Stands for every function of a package that is not installed, so that the tables and the CSV file say so."""
    raise ModuleNotFoundError("pip install -r benchmarks/requirements.txt")


PYTHAE: Functions = dict.fromkeys(("elbo_probs", "iwae_probs"), _not_installed)
PYRO: Functions = {"step": _not_installed}

if "pythae" not in MISSING:
    from pythae.models.iwae.iwae_model import IWAE
    from pythae.models.vae.vae_model import VAE

    def pythae_elbo(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        model: Any = SimpleNamespace(model_config=SimpleNamespace(reconstruction_loss="bce"))
        loss: Tensor = VAE.loss_function(model, recon, x, mu, logvar, None)[0]
        return loss

    def pythae_iwae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        """Its tensors are [B, K, ...]: ours are transposed, without a copy."""
        config = SimpleNamespace(reconstruction_loss="bce")
        model: Any = SimpleNamespace(model_config=config, n_samples=len(z))
        latents = (mu.unsqueeze(1), logvar.unsqueeze(1), z.transpose(0, 1))
        loss: Tensor = IWAE.loss_function(model, recon.transpose(0, 1), x, *latents)[0]
        return loss

    PYTHAE = {"elbo_probs": pythae_elbo, "iwae_probs": pythae_iwae}

if "pyro" not in MISSING:
    import pyro
    from pyro.distributions import Bernoulli as PyroBernoulli
    from pyro.distributions import Normal as PyroNormal
    from pyro.infer import RenyiELBO, TraceMeanField_ELBO

    class GivenNormal(PyroNormal):  # type: ignore[misc]
        """Normal, with the noise given where values are to be compared."""

        eps: Tensor | None = None

        def rsample(self, sample_shape: Any = ()) -> Tensor:
            if self.eps is None:
                return super().rsample(sample_shape)
            return self.loc + self.scale * self.eps

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            new = super().expand(batch_shape, _instance)
            new.eps = self.eps
            return new

    def _model_and_guide(module: Step, eps: Tensor | None) -> tuple[Callable[..., None], Callable[..., None]]:
        def model(x: Tensor) -> None:
            pyro.module("step", module)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", PyroNormal(x.new_zeros(len(x), *module.vae.latent_shape), 1.0).to_event(1))
                logits = module.decode(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
                event = x.dim() - 1
                pyro.sample("x", PyroBernoulli(logits=logits, validate_args=False).to_event(event), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                mu, logvar = module.encode(x)
                q = GivenNormal(mu, torch.exp(0.5 * logvar))
                q.eps = eps
                pyro.sample("z", q.to_event(1))

        return model, guide

    def pyro_step(x: Tensor, module: Step, eps: Tensor | None = None) -> Tensor:
        """Its losses are sums over the batch."""
        model, guide = _model_and_guide(module, eps)
        if module.samples is None:
            return TraceMeanField_ELBO().differentiable_loss(model, guide, x) / len(x)
        objective = RenyiELBO(alpha=0, num_particles=module.samples, vectorize_particles=True, max_plate_nesting=1)
        loss = objective.loss_and_grads(model, guide, x) / len(x)  # with the backward
        if eps is not None:  # while values are compared; Adam, which is timed, does not see the scale
            torch._foreach_div_([p.grad for p in module.parameters() if p.grad is not None], len(x))
        return torch.tensor(loss)

    PYRO = {"step": pyro_step}
