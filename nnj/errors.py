"""The errors of nnj. Each message has a subject, a fact and a remedy: what fails, why, and what to
do.
"""

from __future__ import annotations


class NNJError(RuntimeError):
    """nnj refuses: a number it could return would be wrong, or it has nothing to work on."""


class PluginError(NNJError):
    """A plugin is broken: it cannot be imported, claims what another one has, or breaks the
    contract of a rule.
    """


class Indefinite(NNJError):
    """The Hessian of a loss is not positive semi-definite."""


def complex_parameter(subject: str) -> NNJError:
    """The error for a complex parameter in which derivatives are asked for: most models are not
    holomorphic in it.
    """
    return NNJError(
        f"{subject} is complex, but Jacobians and curvature are those in real parameters. Hold its "
        "real and imaginary parts in a real parameter (torch.view_as_complex makes one of it), or "
        "freeze it"
    )


class Coupled(NNJError):
    """Samples influence one another."""

    @classmethod
    def at(cls, who: str) -> Coupled:
        """The error for rows that were seen to mix at `who`."""
        return cls(
            f"samples influence one another (seen at {who}): the GGN is then not a sum over samples"
        )
