"""Checks for plugin authors and users: a rule, a loss and a whole model against dense derivatives
in float64.
"""

from nnj.testing.check_layer import check_layer, layer_jacobians
from nnj.testing.check_loss import check_loss
from nnj.testing.check_model import ModelReport, check_model

__all__ = ["ModelReport", "check_layer", "check_loss", "check_model", "layer_jacobians"]
