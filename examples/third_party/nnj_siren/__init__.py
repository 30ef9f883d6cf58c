"""A package that teaches nnj a layer, a loss and a quantity. Its plugins are named in
pyproject.toml; nothing is done here.
"""

from nnj_siren.first import FirstSine
from nnj_siren.layers import Sine
from nnj_siren.losses import LogCosh

__all__ = ["FirstSine", "LogCosh", "Sine"]
