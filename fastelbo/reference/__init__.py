"""Plain-PyTorch twins of every op, written from the formulas.

The twin of the op `name` is `reference.name`; that of a private op `_name`, too, is `reference.name`. The twins are

- the truth that the tests compare the ops with, in float64;
- a baseline of the benchmarks;
- what runs under `torch.func` transforms, in forward-mode AD, and on devices without kernels;
- the derivative of the backward ops, where autograd is asked for a graph of the gradient.

Nothing here is fused, and everything here is differentiable any number of times. Sizes: B batch, K samples, M latent
dimensions, D data dimensions (all event dimensions together). Everything is in nats.
"""

from fastelbo.reference.derivatives import vjp as vjp
from fastelbo.reference.latent import exp_remainder as exp_remainder
from fastelbo.reference.latent import gaussian_kl as gaussian_kl
from fastelbo.reference.latent import gaussian_kl_backward as gaussian_kl_backward
from fastelbo.reference.latent import kl_terms as kl_terms
from fastelbo.reference.latent import rsample as rsample
from fastelbo.reference.latent import rsample_backward as rsample_backward
from fastelbo.reference.likelihood import COUNTS as COUNTS
from fastelbo.reference.likelihood import compute_dtype as compute_dtype
from fastelbo.reference.likelihood import log_prob as log_prob
from fastelbo.reference.likelihood import log_prob_backward as log_prob_backward
from fastelbo.reference.likelihood import read_data as read_data
from fastelbo.reference.objective import bound as bound
from fastelbo.reference.objective import elbo_loss as elbo_loss
from fastelbo.reference.objective import log_mean_exp as log_mean_exp
from fastelbo.reference.objective import log_mean_exp_backward as log_mean_exp_backward
from fastelbo.reference.objective import minus_bound as minus_bound
from fastelbo.reference.objective import multi_sample_loss as multi_sample_loss
from fastelbo.reference.objective import multi_sample_weights as multi_sample_weights
from fastelbo.reference.objective import reduce as reduce
from fastelbo.reference.objective import scale_ as scale_
from fastelbo.reference.ppca import ppca_factor as ppca_factor
from fastelbo.reference.ppca import ppca_grams as ppca_grams
from fastelbo.reference.ppca import ppca_invert as ppca_invert
from fastelbo.reference.ppca import ppca_log_prob as ppca_log_prob
from fastelbo.reference.ppca import ppca_log_prob_backward as ppca_log_prob_backward
from fastelbo.reference.ppca import ppca_log_prob_forward as ppca_log_prob_forward
from fastelbo.reference.ppca import ppca_posterior as ppca_posterior
from fastelbo.reference.ppca import ppca_project as ppca_project
from fastelbo.reference.ppca import ppca_qr as ppca_qr
from fastelbo.reference.ppca import ppca_residual as ppca_residual
from fastelbo.reference.ppca import ppca_rest as ppca_rest
from fastelbo.reference.ppca import ppca_solution as ppca_solution
from fastelbo.reference.random import KERNEL_DEVICES as KERNEL_DEVICES
from fastelbo.reference.random import draws_by_kernel as draws_by_kernel
from fastelbo.reference.random import exports_to_onnx as exports_to_onnx
from fastelbo.reference.random import noise as noise
from fastelbo.reference.random import noise_dtype as noise_dtype
from fastelbo.reference.random import normal as normal
from fastelbo.reference.random import normal_rows as normal_rows
from fastelbo.reference.random import philox as philox
