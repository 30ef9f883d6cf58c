"""The errors of nnj. Each message says what (subject), what is the matter (fact) and what to do (remedy)."""


class NNJError(RuntimeError):
    """nnj refuses: a number it could return would be wrong, or it has nothing to work on."""


class PluginError(NNJError):
    """A plugin is broken: it cannot be imported, claims what another one has, or breaks the contract of a rule."""


class UnsupportedLayer(NNJError, NotImplementedError):
    """No installed plugin knows this layer."""


class Indefinite(NNJError):
    """The Hessian of a loss is not positive semi-definite."""


def complex_parameter(subject: str) -> NNJError:
    """Of a parameter in which derivatives are asked for: what models do with it is mostly not holomorphic."""
    return NNJError(f"{subject} is complex, but Jacobians and curvature are those in real parameters. Hold its real and "
                    f"imaginary parts in a real parameter (torch.view_as_complex makes one of it), or freeze it")
