"""Standardized data for the networks of a VAE whose data and figures stay in their own units."""

import torch
from torch import Tensor, nn

from fastelbo import likelihoods
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo.losses import Recon, expand, join_recon, split_recon

EXPONENT = {"logvar": 2.0, "log_scale": 1.0}  # of the scale, in a parameter that is a logarithm


class Scaling(nn.Module):
    """Shift and scale between data x and what the networks of a VAE see, (x - shift) / scale.

    What the decoder returns is turned back: the mean to scale * mean + shift, a logvar to logvar + 2 log scale, a
    log_scale to log_scale + log scale. log p(x) is thus that of x itself, the log determinant with it, and samples are
    in its units.

    Args:
        shift, scale: floating, 0-d or of a shape that broadcasts to [*event]; scale is positive.

    Raises:
        ValueError: a scale that is not positive and finite, or a shift that is not finite.
    """

    shift: Tensor
    scale: Tensor

    @checked
    def __init__(self, shift: arguments.Floats, scale: arguments.Floats) -> None:
        super().__init__()
        if not (shift.isfinite().all() and (scale > 0).all() and scale.isfinite().all()):
            found = f"shift from {shift.min()} to {shift.max()} and scale from {scale.min()} to {scale.max()}"
            raise ValueError(f"shift must be finite, and scale positive and finite; got {found}")
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    @checked
    def forward(self, x: arguments.Floats) -> Tensor:
        """(x - shift) / scale. ValueError: x of another event than these have."""
        expand("scale", self.scale, x.shape, "x")
        return (x - self.shift) / self.scale

    @checked
    def inverse(self, recon: arguments.Recon, likelihood: arguments.Likelihood) -> Recon:
        """The parameters of a likelihood of the reals for x, of those of `forward`; raises as that."""
        names, parameters = likelihoods.get(likelihood).parameters, split_recon(recon)
        # a half type, of autocast, has no room for a mean that is far from 0
        expand("scale", self.scale, parameters[0].shape, "recon")
        mean, *others = (t.to(torch.promote_types(t.dtype, self.scale.dtype)) for t in parameters)
        log_scale = self.scale.log()
        given = {
            name: t + EXPONENT[name] * log_scale if name in EXPONENT else t
            for name, t in zip(names[1:], others, strict=False)
        }
        if not given:  # the unit scale that a likelihood has without its second parameter
            given = {names[1]: EXPONENT[names[1]] * log_scale}
        return join_recon(mean * self.scale + self.shift, *given.values())
