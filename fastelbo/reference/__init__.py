"""Plain-PyTorch twins of every op, written from the formulas.

The twin of the op `name` is `reference.name`; that of a private op `_name`, too, is `reference.name`. The twins are

- the truth that the tests compare the ops with, in float64;
- a baseline of the benchmarks;
- what runs under `torch.func` transforms, in forward-mode AD, and on devices without kernels;
- the derivative of the backward ops, where autograd is asked for a graph of the gradient.

Nothing here is fused, and everything here is differentiable any number of times. Sizes: B batch, K samples, M latent
dimensions, D data dimensions (all event dimensions together). Everything is in nats.
"""

from fastelbo.reference.derivatives import *  # noqa: F403
from fastelbo.reference.latent import *  # noqa: F403
from fastelbo.reference.likelihood import *  # noqa: F403
from fastelbo.reference.mixture import *  # noqa: F403
from fastelbo.reference.objective import *  # noqa: F403
from fastelbo.reference.ppca import *  # noqa: F403
from fastelbo.reference.random import *  # noqa: F403
from fastelbo.reference.sparse import *  # noqa: F403
