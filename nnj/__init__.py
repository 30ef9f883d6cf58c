"""nnj: Jacobian products and Gauss-Newton curvature for any PyTorch model."""

from nnj._version import __version__  # first: it says whether torch is too old for all the rest

# isort: split
from nnj import matrices, utils
from nnj.collecting.collect import collect
from nnj.collecting.compile import compile
from nnj.collecting.fit import fit
from nnj.collecting.fit_result import Fit
from nnj.collecting.quantity import Quantity, Whole
from nnj.errors import NNJError, PluginError
from nnj.jacobians.factor import Factor, joint_gram
from nnj.jacobians.jacobian import Dense, Diagonal, Identity, Jacobian, LinearMap
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.patches import Patches
from nnj.jacobians.row_sparse import RowSparse
from nnj.jacobians.square_sum import SquareSum
from nnj.jacobians.views import View, ViewFactor, ViewJacobian
from nnj.jacobians.weight_jacobian import PatchMatmul, ScaleShift, TableRows
from nnj.loss_hessian.autodiff import autodiff_hessian
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.structured import BlockHessian, DiagonalHessian, SoftmaxHessian
from nnj.operators.ggn import GGN, HessianOperator
from nnj.original import (
    Conv2d,
    Flatten,
    L2Norm,
    Linear,
    MaxPool2d,
    ReLU,
    Reshape,
    Sequential,
    Sigmoid,
    Sinusoidal,
    SkipConnection,
    Softplus,
    Tanh,
    TruncExp,
    Upsample,
)
from nnj.posterior.from_fit import laplace
from nnj.posterior.laplace import Laplace, Prediction
from nnj.products.jacobian_products import jacobian, jmjTp, jmp, jTmjp, jTmjp_pair, jvp, mjp, vjp
from nnj.products.methods import AbstractJacobian
from nnj.products.ntk import ntk
from nnj.propagation.linearized import Linearized, linearize
from nnj.recording.extend import extend, retract
from nnj.registry.hookspecs import RegisterLayer, RegisterLoss, RegisterQuantity, hookimpl
from nnj.registry.loss_rules import FunctionLoss, hessian_of_loss, reference_of_loss
from nnj.registry.manager import PluginManager

__all__ = [  # noqa: RUF022 (in four groups)
    # What users use.
    "GGN",
    "Fit",
    "HessianOperator",
    "Laplace",
    "Linearized",
    "Prediction",
    "collect",
    "compile",
    "extend",
    "fit",
    "jTmjp",
    "jTmjp_pair",
    "jacobian",
    "jmjTp",
    "jmp",
    "jvp",
    "laplace",
    "linearize",
    "matrices",
    "mjp",
    "ntk",
    "retract",
    "utils",
    "vjp",
    # What authors of plugins use.
    "AbstractJacobian",
    "BlockHessian",
    "Dense",
    "Diagonal",
    "DiagonalHessian",
    "Factor",
    "FunctionLoss",
    "Identity",
    "Jacobian",
    "LinearMap",
    "LossHessian",
    "OuterProduct",
    "PatchMatmul",
    "Patches",
    "PluginManager",
    "Quantity",
    "RegisterLayer",
    "RegisterLoss",
    "RegisterQuantity",
    "RowSparse",
    "ScaleShift",
    "SoftmaxHessian",
    "SquareSum",
    "TableRows",
    "View",
    "ViewFactor",
    "ViewJacobian",
    "Whole",
    "__version__",
    "autodiff_hessian",
    "hessian_of_loss",
    "hookimpl",
    "joint_gram",
    "reference_of_loss",
    # The layers of the original nnj.
    "Conv2d",
    "Flatten",
    "L2Norm",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "Reshape",
    "Sequential",
    "Sigmoid",
    "Sinusoidal",
    "SkipConnection",
    "Softplus",
    "Tanh",
    "TruncExp",
    "Upsample",
    # Errors.
    "NNJError",
    "PluginError",
]
