"""The VAE, its objectives and priors, log p(x) by importance sampling, and diagnostics."""
