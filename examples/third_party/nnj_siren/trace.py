"""tr(J^T H J): how much curvature each parameter holds, one number instead of a diagonal."""
from torch import Tensor

import nnj


class GGNTrace(nnj.Quantity):
    """`p.ggn_trace`, of shape (): the trace of the GGN of p, scaled as the scalar that was differentiated.

    Dong et al. (2020) choose the bits of each layer's weights by such traces.
    """

    source = "exact"  # columns S with S S^T = H, the Hessian of the loss in the output
    degree = 1        # twice the loss has twice the trace

    def parameter(self, factor: nnj.Factor, in_all: int) -> Tensor:
        """The factor is B = S^T J at p, (columns, N, *p.shape), as lazily as the layer's structure allows."""
        return factor.square_sum().sum()


@nnj.hookimpl
def nnj_register_quantities(register):
    register("ggn_trace", GGNTrace)
