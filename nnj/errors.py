"""The errors of nnj. Each message says what (subject), what is the matter (fact) and what to do (remedy)."""


class NNJError(RuntimeError):
    """nnj refuses: a number it could return would be wrong, or it has nothing to work on."""


class PluginError(NNJError):
    """A plugin is broken: it cannot be imported, claims what another one has, or breaks the contract of a rule."""


class UnsupportedLayer(NNJError, NotImplementedError):
    """No installed plugin knows this layer."""


class Indefinite(NNJError):
    """The Hessian of a loss is not positive semi-definite."""
