"""The public functions: sampling, likelihoods, and the losses made of them."""

from fastelbo.losses.bounds import bound_loss as bound_loss
from fastelbo.losses.functional import *  # noqa: F403
