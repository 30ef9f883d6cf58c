"""nnj: Jacobian products and Gauss-Newton curvature for any PyTorch model."""
from nnj import utils
from nnj.abstract import AbstractJacobian
from nnj.arranged import Arranged
from nnj.collection import collect
from nnj.curvature import BlockCurvature, Curvature, DiagonalCurvature, SoftmaxCurvature
from nnj.errors import NNJError, PluginError, UnsupportedLayer
from nnj.factors import Factor
from nnj.fitted import Fit
from nnj.fitting import fit
from nnj.hessian import twice
from nnj.hooks import extend, retract
from nnj.hookspecs import hookimpl
from nnj.loss_hook import FunctionLoss
from nnj.operators import Dense, Diagonal, Identity, Jacobian, LinearMap
from nnj.plugins import PluginManager
from nnj.products import jacobian, jmjTp, jmp, jTmjp, jTmjp_pair, jvp, mjp, vjp
from nnj.quantities.base import Quantity
from nnj.weights import Affine, Scale, Select

__version__ = "1.0.0"
__all__ = [
    "AbstractJacobian", "Affine", "Arranged", "BlockCurvature", "Curvature", "Dense", "Diagonal", "DiagonalCurvature", "Factor",
    "Fit", "FunctionLoss", "Identity", "Jacobian", "LinearMap", "NNJError", "PluginError", "PluginManager", "Quantity", "Scale",
    "Select", "SoftmaxCurvature", "UnsupportedLayer", "collect", "extend", "fit", "hookimpl", "jTmjp", "jTmjp_pair", "jacobian",
    "jmjTp", "jmp", "jvp", "mjp", "retract", "twice", "utils", "vjp",
]
