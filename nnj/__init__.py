"""nnj: Jacobian products and Gauss-Newton curvature for any PyTorch model."""
from nnj.errors import NNJError, PluginError, UnsupportedLayer
from nnj.factors import Factor
from nnj.hookspecs import hookimpl
from nnj.operators import Affine, Dense, Diagonal, Identity, Jacobian, LinearMap, Scale, Select
from nnj.plugins import PluginManager

__version__ = "1.0.0"
__all__ = [
    "Affine", "Dense", "Diagonal", "Factor", "Identity", "Jacobian", "LinearMap", "NNJError", "PluginError",
    "PluginManager", "Scale", "Select", "UnsupportedLayer", "hookimpl",
]
