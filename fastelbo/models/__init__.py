"""The VAE and what is told of it: marginal likelihood, diagnostics."""
