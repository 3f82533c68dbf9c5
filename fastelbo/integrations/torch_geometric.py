"""PyTorch Geometric's VGAE with its losses computed by fastelbo. One import changes:

    from fastelbo.integrations.torch_geometric import VGAE  # was: from torch_geometric.nn import VGAE

Encoders, decoders, random draws and state dicts stay. Written for torch_geometric 2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric import nn
from torch_geometric.nn.models.autoencoder import MAX_LOGSTD
from torch_geometric.utils import negative_sampling

import fastelbo

__all__ = ["VGAE"]


class VGAE(nn.VGAE):  # type: ignore[misc]
    """torch_geometric.nn.VGAE whose losses are computed by fastelbo, from logits.

    The same values and gradients, but for torch_geometric's log(p + 1e-15) and log(1 - p + 1e-15). In float32, 1 - p
    loses its digits as the logit of a missing edge grows, and from 17 on it is 0: that loss is 34.5, with no gradient.
    Here it is the logit, with a gradient of 1.

    Reference: Kipf & Welling 2016, eq. 3.
    """

    def recon_loss(self, z: Tensor, pos_edge_index: Tensor, neg_edge_index: Tensor | None = None) -> Tensor:
        """As torch_geometric's, with its negative samples."""
        if neg_edge_index is None:
            neg_edge_index = negative_sampling(pos_edge_index, z.size(0))
        loss = z.new_zeros(())
        for edges, exists in ((pos_edge_index, True), (neg_edge_index, False)):
            logits = self.decoder(z, edges, sigmoid=False)
            x = torch.full((1, len(logits)), exists, device=logits.device)
            loss = loss - fastelbo.log_prob(logits[None], x)[0] / len(logits)
        return loss

    def kl_loss(self, mu: Tensor | None = None, logstd: Tensor | None = None) -> Tensor:
        """As torch_geometric's."""
        mu = self.__mu__ if mu is None else mu
        logstd = self.__logstd__ if logstd is None else logstd.clamp(max=MAX_LOGSTD)
        return fastelbo.gaussian_kl(mu, 2 * logstd).mean()
