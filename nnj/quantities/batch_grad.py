"""The gradient of each sample's part of the loss."""
from torch import Tensor

from nnj.factors import Factor
from nnj.quantities.base import Quantity


class BatchGrad(Quantity):
    """`p.batch_grad`, of shape (N, *p.shape): each sample's share of `p.grad`, scaled as the scalar that was differentiated.

    Summed over axis 0 it is what extended losses add to `p.grad`; with a mean reduction each share holds the factor 1 / N.
    Samples of several backward passes in one `collect` are concatenated in order.
    """

    source = "gradient"
    degree = 1
    per_sample = True

    def parameter(self, factor: Factor, in_all: int) -> Tensor:
        return factor.dense()[0]
