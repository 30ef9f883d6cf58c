"""nnj.collect: what is open, what each backward pass adds to it, and where results stand."""

from __future__ import annotations

import difflib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nnj.collecting.accumulate import Contribution
from nnj.collecting.quantity import Quantity
from nnj.collecting.signed import check_signed, contribute_signed
from nnj.errors import NNJError, PluginError
from nnj.graph.linearity import check_linear
from nnj.recording.loss_hook import listeners
from nnj.recording.records import LossCall
from nnj.registry.manager import manager

_open: dict[int, list[collect]] = {}  # for each thread, outermost first
# for each thread and graph task
_staged: dict[int, dict[int, list[dict[int, Contribution] | Exception]]] = {}
_published: dict[tuple[int, str], WeakIdKeyDictionary] = {}  # by thread


class collect:  # noqa: N801
    """Collect quantities during the backward passes inside the `with`.

    Args:
        quantities: names: "ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad", and those of
            installed plugins.
        modules: collect at the parameters of these modules alone; the sweep walks no further back
            than it must.
        memory: bytes that columns may take while they walk; more of them are walked in turns. Under
            glibc the process keeps as many freed bytes for the next turn
            (`nnj.propagation.allocator` says how to have it otherwise).
        tol: leave out columns that carry little: what is lost, over the batch, is at most `tol` of
            the trace of the Hessians in the outputs. ggn_diag and ggn_block are then lower bounds
            (their difference from the exact ones is positive semi-definite), at the cost of
            `columns` walks. A model that is sure of most of its answers needs few.
        signed: take losses that are not convex in the output, and negative factors: H = H_+ - H_-,
            walked one after the other. Only for quantities of the exact Hessian, such as ggn_diag
            and ggn_block, which may then be negative.
        options: keyword arguments of the quantities, such as samples=, generator=, block_limit=.

    Attributes:
        deficit, trace: what was left out under `tol`, as a part of that trace, over all backward
            passes so far; the trace.
        columns: how many exact columns walked in the pass that had most of them.

    Results are attributes under the quantity's name: on each parameter that requires grad (of its
    shape; None if no backward pass reached it), or on modules. They belong to exactly the scalar on
    which `.backward()` was called. Passes add up, as .grad does; per-sample quantities are
    concatenated. They stay after the `with`; entering anew removes them.

    Errors: `NNJError` for an unknown quantity or option; for anything that cannot be exact (after
    the backward pass, whose gradients are intact); on exit, if no extended loss took part in any
    backward pass."""

    def __init__(
        self,
        *quantities: str,
        modules: Iterable[nn.Module] | None = None,
        memory: int = 2**28,
        tol: float = 0.0,
        signed: bool = False,
        **options: Any,
    ):
        if not quantities:
            raise NNJError(
                "nnj.collect needs the name of a quantity, such as nnj.collect('ggn_diag')"
            )
        self.quantities = _make(quantities, options)
        self.modules = None if modules is None else _checked_modules(modules)
        self.memory, self.signed, self.tol = (
            memory,
            signed,
            _checked_tolerance(tol, self.quantities),
        )
        if signed:
            check_signed(self.quantities, self.tol)
        self.results: dict[str, WeakIdKeyDictionary] = {}
        self.samples = 0
        self.passes = 0
        self.refused = False
        self.columns = 0
        self.trace = self._dropped = 0.0

    @property
    def deficit(self) -> float:
        return self._dropped / self.trace if self.trace else 0.0

    def __enter__(self) -> collect:
        self.results = {name: WeakIdKeyDictionary() for name in self.quantities}
        self.samples, self.passes, self.refused, self.columns = 0, 0, False, 0
        self.trace = self._dropped = 0.0
        for name in self.quantities:
            for holder in list(_published.get((threading.get_ident(), name), {})):
                vars(holder).pop(name, None)
            _published[threading.get_ident(), name] = WeakIdKeyDictionary()
        _open.setdefault(threading.get_ident(), []).append(self)
        # hooks then run in this thread, on any device
        self._threads = torch.autograd.set_multithreading_enabled(False)
        self._threads.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        thread = threading.get_ident()
        self._threads.__exit__(None, None, None)
        _open[thread].remove(self)
        if not _open[thread]:
            del _open[thread]
            _staged.pop(thread, None)
        if kind is None:
            if self.passes == 0 and not self.refused:
                names = ", ".join(self.quantities)
                raise NNJError(
                    f"nothing was collected for {names}: no extended loss took part in a backward "
                    "pass inside the `with`. Extend the loss, too (loss_func = "
                    "nnj.extend(loss_func)), and call backward inside"
                )
            self.publish()

    # -- results -----------------------------------------------------------------------------------

    def commit(self, contributions: list[Contribution]) -> None:
        """Take in what one backward pass has contributed."""
        self.passes += 1
        merged = Contribution.merge(
            contributions, {name for name, q in self.quantities.items() if q.per_sample}
        )
        self.trace, self._dropped = self.trace + merged.trace, self._dropped + merged.dropped
        self.columns = max(self.columns, merged.columns)
        for name, quantity in self.quantities.items():
            known = self.results[name]
            if quantity.per_sample:
                self._concatenate(name, known, merged)
                continue
            for holder in merged.holders(quantity.of_modules):
                value = merged.value(name, holder)
                there = known.get(holder)
                known[holder] = (
                    there if value is None else value if there is None else there + value
                )
        self.samples += merged.n
        self.publish()

    def _concatenate(self, name: str, known: WeakIdKeyDictionary, merged: Contribution) -> None:
        before, count = self.samples, merged.n
        reached = {id(h): h for h in [*known, *merged.holders(False)]}
        for holder in reached.values():
            there, value = known.get(holder), merged.value(name, holder)
            if there is None and value is None:
                known[holder] = None
                continue
            shape, like = holder.shape, there if there is not None else value
            assert like is not None
            there = like.new_zeros(before, *shape) if there is None else there
            value = like.new_zeros(count, *shape) if value is None else value
            known[holder] = torch.cat([there, value])

    def publish(self) -> None:
        """Set the attributes."""
        for name, known in self.results.items():
            for holder, value in known.items():
                dtype = (
                    next((p.dtype for p in holder.parameters(recurse=False)), None)
                    if isinstance(holder, nn.Module)
                    else holder.dtype
                )
                vars(holder)[name] = value if value is None or dtype is None else value.to(dtype)
                _published.setdefault((threading.get_ident(), name), WeakIdKeyDictionary())[
                    holder
                ] = True


def _checked_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    found: list[nn.Module] = [modules] if isinstance(modules, nn.Module) else list(modules)
    for module in found:
        if not isinstance(module, nn.Module):
            raise NNJError(f"modules= takes torch.nn.Modules, not {type(module).__name__}")
    return found


def _checked_tolerance(tol: float, quantities: dict[str, Quantity]) -> float:
    if not 0 <= tol < 1:
        raise NNJError(f"tol={tol!r}: what may be lost of the trace is a number from 0 to below 1")
    if tol and all(q.source != "exact" for q in quantities.values()):
        raise NNJError(f"tol= leaves out exact columns, which {', '.join(quantities)} do not use")
    return float(tol)


@functools.cache
def _options(rule: Callable[..., Any]) -> list[str]:
    """The keyword arguments of a quantity."""
    return [p for p in inspect.signature(rule).parameters if p not in ("args", "kwargs")]


def _make(names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Quantity]:
    """Quantities by name, each with the options that it declares."""
    made: dict[str, Quantity] = {}
    declared: dict[str, str] = {}
    for name in names:
        entry = manager().quantity(name) if isinstance(name, str) else None
        if entry is None:
            known = sorted(e.key for e in manager().entries("quantity"))
            raise NNJError(
                f"unknown quantity {name!r}{_close(str(name), known)}. Known: {', '.join(known)}"
            )
        accepted = _options(entry.rule)
        declared.update({option: name for option in accepted})
        made[name] = entry.rule(**{k: v for k, v in options.items() if k in accepted})
        if not isinstance(made[name], Quantity):
            raise PluginError(
                f"plugin {entry.source} gives {type(made[name]).__name__} for the quantity "
                f"{name!r}, expected a nnj.Quantity"
            )
    for option in options:
        if option not in declared:
            known = sorted({*declared, "modules", "memory", "tol", "signed"})
            raise NNJError(
                f"unknown option {option!r} for {', '.join(names)}{_close(option, known)}. Known: "
                f"{', '.join(known)}"
            )
    return made


def _close(word: str, known: list[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _arrived(call: LossCall, scale: Tensor) -> None:
    """A loss's gradient has arrived: walk now, while every saved tensor is there, and hand over
    when the pass is done.
    """
    collections = _open.get(call.thread)
    if not collections:
        return
    task = torch._C._current_graph_task_id()
    staged = _staged.setdefault(call.thread, {})
    if task not in staged:
        staged[task] = []
        finish = _finisher(call.thread, task, list(collections))
        torch.autograd.Variable._execution_engine.queue_callback(finish)
    try:
        with torch.no_grad(), torch.autocast(scale.device.type, enabled=False):
            node = torch._C._current_autograd_node()
            check_linear(call, node)
            staged[task].append(contribute_signed(call, scale, node, collections))
    except NNJError as error:
        staged[task].append(error)
    except Exception as error:
        wrapped = NNJError(f"the sweep failed with {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        staged[task].append(wrapped)


def _finisher(thread: int, task: int, collections: list[collect]) -> Callable[[], None]:
    def finish() -> None:
        parts = _staged.get(thread, {}).pop(task, [])
        errors = [part for part in parts if isinstance(part, Exception)]
        if errors:
            for c in collections:
                c.refused = True
            raise errors[0]
        for c in collections:
            c.commit([part[id(c)] for part in parts if isinstance(part, dict)])

    return finish


listeners.append(_arrived)
