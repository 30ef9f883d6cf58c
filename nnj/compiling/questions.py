"""What Python asks a tensor while a function is traced: the answer is baked into the graph, so the
graph asks again in every replay and says whether it is still the same.

    bool(t), int(t), nonzero, a mask as an index, ...   answered, and compared in each replay
    float(t), tolist, numpy                             refused: they are others each time
    a draw from a user's generator                      an input, drawn anew for each replay
    a draw from nnj's own generator                     a constant

All comparisons together are one flag on the device (`changed`), read once after the graph has run:
a check that raises in the eager pass is such a question, too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_innermost_proxy_mode,
    track_tensor_tree,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nnj.checks import is_said, most
from nnj.compiling.program import Untraceable
from nnj.generators import is_own

_aten = torch.ops.aten
_HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Draw(NamedTuple):
    """Random numbers of a user's generator: an input of the graph."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor  # those of the run that was traced

    def again(self) -> Tensor:
        """The next ones."""
        return self.function(*self.args, **self.kwargs)


class Questions(TorchDispatchMode):
    """Answers what is asked of tensors that depend on the inputs, and notes it.

    Args:
        inputs: the tensors on which the function depends.

    Attributes:
        changed: for each question whether its answer is another one, 0-d tensors in the graph.
        draws: those of users' generators, in order; each has a placeholder in the graph.
        random: whether torch's own generators were asked.
        refused: what cannot be traced, first reason; None while all is well.
    """

    def __init__(self, inputs: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.changed: list[Tensor] = []
        self.draws: list[Draw] = []
        self.random = False
        self.refused: str | None = None
        self._dependent: dict[int, StorageWeakRef] = {}  # storages that depend on the inputs
        for t in inputs:
            self._note(t)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return self._number(args[0])
        if isinstance(kwargs.get("generator"), torch.Generator):
            return self._draw(func, args, kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        depends = any(self.depends(t) for t in given)
        if torch.Tag.data_dependent_output in func.tags:
            return self._truth(func, args, kwargs) if depends else _really(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = depends = True
        if torch.Tag.dynamic_output_shape in func.tags:
            found = self._shaped(func, args, kwargs, given)
        else:
            found = func(*args, **kwargs)
        if depends:
            written = given if func._schema.is_mutable else []
            for t in [*tree_leaves(found), *written]:
                if isinstance(t, Tensor):
                    self._note(t)
        return found

    # -- what depends on the inputs ----------------------------------------------------------------

    def _note(self, t: Tensor) -> None:
        if t.layout == torch.strided:
            ref = StorageWeakRef(t.untyped_storage())
            self._dependent[ref.cdata] = ref

    def depends(self, t: Tensor) -> bool:
        """Whether a tensor may be another one in the next replay."""
        if t.layout != torch.strided:
            return True
        return StorageWeakRef(t.untyped_storage()).cdata in self._dependent

    # -- answers -----------------------------------------------------------------------------------

    def _number(self, t: Tensor) -> Any:
        """bool(t), int(t), t.item()."""
        answer = really(t.item)
        if is_said() or not self.depends(t):
            return answer
        if t.is_floating_point() or t.is_complex():
            raise self.refuse("asks a tensor for a number that is another one each time")
        largest = most()
        if largest is not None:
            steps = max(1, largest // 8)
            answer = min(largest, -(-answer // steps) * steps)
            self._ask(t > answer)
        else:
            self._ask(_differs(t, answer))
        return answer

    def _ask(self, changed: Tensor) -> None:
        self.changed.append(changed.reshape(()))

    def _truth(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch.equal and allclose, the only functions that answer by one bool."""
        if func is _aten.equal.default:
            one, other = args
            if one.shape != other.shape:
                return False
            answer = bool(_really(func, args, kwargs))
            now = (one == other).all()
        elif func is _aten.allclose.default:
            answer = bool(_really(func, args, kwargs))
            now = torch.isclose(*args, **kwargs).all()
        else:
            raise self.refuse(f"asks tensors by {func}")
        self._ask(_differs(now, answer))
        return answer

    def _shaped(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        """What has a shape that depends on numbers: these must be the same in each replay."""
        if func is _aten.index.Tensor:
            source, indices = args
            return func(source, [i for t in indices for i in self._by_number(t)])
        if func is _aten.masked_select.default:
            source, mask = torch.broadcast_tensors(args[0], args[1])
            return _aten.index.Tensor(source, self._by_number(mask))
        for t in given:
            if self.depends(t):
                if t.is_floating_point() or t.is_complex():
                    raise self.refuse(f"makes a tensor whose shape depends on numbers ({func})")
                self._keep(t)
        return tree_map_only(Tensor, torch.clone, _really(func, args, kwargs))

    def _by_number(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as an index, by the numbers of its places."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        if self.depends(index):
            self._keep(index)
        return list(really(lambda: index.nonzero(as_tuple=True)))

    def _keep(self, t: Tensor) -> None:
        """All of a tensor must be what it is now."""
        now = really(t.clone)
        self._ask((t.logical_xor(now) if t.dtype == torch.bool else t != now).any())

    def listed(self, t: Tensor) -> None:
        """A tensor is read as numbers of Python. Errors: `Untraceable` for real ones."""
        if self.depends(t):
            if t.is_floating_point() or t.is_complex():
                raise self.refuse("reads a tensor as numbers of Python")
            self._keep(t)

    def refuse(self, what: str) -> Untraceable:
        """The error for what cannot be traced, with the place in the code that did it."""
        reason = f"{_place()} {what}"
        self.refused = self.refused or reason
        return Untraceable(reason)

    # -- random numbers ----------------------------------------------------------------------------

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        own = is_own(kwargs["generator"])
        if any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs))):
            if not own or any(map(self.depends, filter(_is_tensor, tree_leaves(args)))):
                raise self.refuse(f"draws random numbers into a tensor ({func})")
        found: Tensor = _really(func, args, kwargs)
        if own:
            return found.clone()  # which the graph makes anew, should somebody write into it
        mode = get_innermost_proxy_mode()
        assert mode is not None
        proxy = mode.tracer.create_proxy("placeholder", f"draw_{len(self.draws)}", (), {})
        track_tensor_tree(found, proxy, constant=None, tracer=mode.tracer)
        self.draws.append(Draw(func, args, dict(kwargs), found))
        self._note(found)
        return found


class Readings(TorchFunctionMode):
    """What no operator tells: a tensor that becomes numbers of Python, and hooks on tensors."""

    def __init__(self, questions: Questions):
        super().__init__()
        self.questions = questions

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and args and isinstance(args[0], Tensor):
            self.questions.listed(args[0])
            return really(lambda: func(*args, **(kwargs or {})))
        if name in _HOOKS and args and isinstance(args[0], Tensor) and _is_of_users():
            raise self.questions.refuse(f"puts a hook on a tensor ({name})")
        return func(*args, **(kwargs or {}))


_READS = ("tolist", "numpy", "__array__", "__dlpack__", "__format__", "__repr__")
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


def _differs(t: Tensor, answer: Any) -> Tensor:
    """Whether a tensor is another number; inductor compares no truths with numbers."""
    if t.dtype != torch.bool:
        return t.ne(answer)
    return t.logical_not() if answer else t


def _is_tensor(t: Any) -> bool:
    return isinstance(t, Tensor)


def really(run: Callable[[], Any]) -> Any:
    """What something gives, without a trace of it in the graph."""
    with disable_proxy_modes_tracing():
        return run()


def _really(func: Any, args: Any, kwargs: Any) -> Any:
    return really(lambda: func(*args, **kwargs))


def _caller() -> Any:
    """The frame of Python, outside of torch and of this package, that is running."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_HIDDEN):
        frame = frame.f_back
    return frame


def _is_of_users() -> bool:
    frame = _caller()
    return frame is None or not str(frame.f_globals.get("__name__", "")).startswith("nnj.")


def _place() -> str:
    """Where in the code Python stands, by module and line."""
    frame = _caller()
    if frame is None:
        return "the function"
    name = frame.f_globals.get("__name__", "?")
    return f"{name}, line {frame.f_lineno} ({frame.f_code.co_name}),"
