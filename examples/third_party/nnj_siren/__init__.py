"""The sine activation of SIREN, the Charbonnier loss and the trace of the GGN, for nnj."""
from .charbonnier import Charbonnier
from .sine import Sine

__all__ = ["Charbonnier", "Sine"]
