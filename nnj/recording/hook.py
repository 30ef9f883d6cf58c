"""What all hooks on modules are, those of models and those of losses."""

from __future__ import annotations

from nnj.errors import NNJError


class _ScriptedError(NNJError, AttributeError):
    """An error of ours that `hasattr` and `getattr` with a default take for an attribute that is
    not there.
    """


class Hook:
    """A hook of ours: no function that torch.jit.script could compile, as it tries to."""

    @property
    def __name__(self) -> str:  # which nothing but torch.jit.script asks for
        raise _ScriptedError(
            "torch.jit.script compiles the hooks of a module, and those of nnj are none for it. "
            "Take them away first (nnj.retract of the model, or of the loss), script, and extend "
            "it again"
        )
