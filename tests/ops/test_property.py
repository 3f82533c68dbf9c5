"""Values that nobody thought of: hypothesis chooses them, the twin judges. Shapes and layouts: test_random_walk.py."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check

import fastelbo

settings.register_profile("fastelbo", deadline=None, max_examples=60, derandomize=True, print_blob=True)
settings.load_profile("fastelbo")

finite = st.floats(-1e4, 1e4, width=32)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0, 1, width=32))
def test_bernoulli_of_any_logits(logits, x):
    recon = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    data = torch.full((len(logits),), x)
    check(fastelbo.bernoulli_log_prob, recon, data)
    assert (fastelbo.bernoulli_log_prob(recon, data) <= 0).all()


@given(st.lists(st.tuples(finite, st.floats(-60, 60, width=32)), min_size=1, max_size=40))
def test_kl_is_never_negative(pairs):
    mu, logvar = torch.tensor(pairs, dtype=torch.float32).T.requires_grad_()
    assert (fastelbo.gaussian_kl(mu, logvar) >= 0).all()
    check(fastelbo.gaussian_kl, mu.detach().requires_grad_(), logvar.detach().requires_grad_())


weights = st.one_of(finite, st.just(float("-inf")))


@given(st.integers(1, 40).flatmap(lambda n: st.lists(weights, min_size=n, max_size=n)), finite)
def test_log_mean_exp_lies_between_mean_and_maximum(weights, shift):
    log_w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    value = fastelbo.log_mean_exp(log_w)
    check(fastelbo.log_mean_exp, log_w)
    assert value <= log_w.max() + 1e-9
    assert value >= log_w.mean() - 1e-9 * log_w.abs().max().clamp(max=1e4)
    torch.testing.assert_close(fastelbo.log_mean_exp(log_w + shift), value + shift, rtol=1e-12, atol=1e-10)
