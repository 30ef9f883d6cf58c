"""The diagonal of the empirical Fisher information: sum over samples of the squared gradient."""

from torch import Tensor

import nnj


class FisherDiag(nnj.Quantity):
    """`p.fisher_diag`, of the shape of p: sum over n of g_n^2, g_n being sample n's share of
    `p.grad`.
    """

    source = "gradient"  # one column: the gradient of the loss in the output
    degree = 2  # a loss that is twice as large has one that is four times as large
    quadratic = True  # gradients of two losses of the same samples add up before they are squared

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        # never the (N, *p.shape) gradients themselves, where a layer's structure helps
        return factor.square_sum()


@nnj.hookimpl
def nnj_register_quantities(register):
    register("fisher_diag", FisherDiag)
