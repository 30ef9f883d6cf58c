"""What is open in each thread, and the backward passes that are running: a loss whose gradient
arrives adds to all that is open, once its pass has ended.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self, override

from nnj.checks import Refusals
from nnj.collecting.accumulate import Accumulator
from nnj.collecting.contribution import Contribution
from nnj.collecting.request import Request
from nnj.collecting.sharded_passes import ShardedPass
from nnj.collecting.shares import OverShards
from nnj.collecting.signed import contribute_signed
from nnj.errors import NNJError
from nnj.graph.linearity import check_linear
from nnj.graph.refusals import (
    IN_COMPILED,
    refuse_compiled_step,
    refuse_tensor,
    under_compile,
)
from nnj.recording.loss_hook import listeners
from nnj.recording.records import LossCall

# How often an error goes to the end of the engine's queue before it is raised: the first to raise
# ends the queue. DDP queues from a hook what queues what writes p.grad, which makes two.
LAPS = 8


class Collection:
    """Takes in, while it is open, what the backward passes of its thread add.

    It may be opened again and goes on from where it was. May override `pass_ended`.

    Attributes:
        request: what is asked for.
        accumulator: what has been collected so far.
        over_shards: how passes of sharded models come together.
    """

    def __init__(self, request: Request):
        self.request, self.accumulator = request, Accumulator(request.quantities)
        self.over_shards = OverShards()
        self._thread: _Thread | None = None  # in which it is open
        self._refused = False
        self._passes_before = 0

    def check_closed(self) -> None:
        """Errors: `NNJError` if it is open: its results would be taken in twice."""
        if self._thread is not None:
            raise NNJError(
                f"this collect of {', '.join(self.request.quantities)} is open already. Make one "
                "nnj.collect(...) for each `with`"
            )

    def __enter__(self) -> Self:
        self.check_closed()
        self._refused, self._passes_before = False, self.accumulator.passes
        thread = _of_this_thread()
        try:
            self._thread = thread
            thread.begin(self)
        except BaseException:  # an interrupt by the keyboard
            self._close()
            raise
        return self

    def _close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        if kind is None and self.is_empty and not self._refused:
            raise self.nothing()

    @property
    def is_empty(self) -> bool:
        """Whether no pass was taken in since it was opened."""
        return self.accumulator.passes == self._passes_before

    def nothing(self) -> NNJError:
        """The error of one that is empty."""
        return NNJError(
            f"nothing was collected for {', '.join(self.request.quantities)}: no extended loss "
            "took part in a backward pass inside the `with`. Extend the loss, too (loss_func = "
            "nnj.extend(loss_func)), and call backward inside. A loss that the model computes "
            "itself (transformers, given labels=) is none: take its logits, "
            "model(**inputs).logits, and an extended loss of your own. Stages of "
            "torch.distributed.pipelining have none, and are not taken. A loss or a step under "
            "torch.compile calls no hook: take the loss that was given to torch.compile, and "
            "call it and backward outside of what is compiled"
        )

    def add_pass(self, contributions: list[Contribution]) -> None:
        """Take in what one backward pass has added."""
        self.accumulator.add_pass(contributions)
        self.pass_ended()

    def refuse_pass(self, error: Exception, calls: Sequence[LossCall]) -> bool:
        """A backward pass has been refused. Whether it keeps the error, which else is on its way to
        the user.
        """
        self._refused = True
        return False

    def pass_ended(self) -> None:
        """Called when a pass has been taken in."""


class _Pass:
    """A backward pass that is running: what its losses have added so far to the collections that
    were open when it began, or why one of them could not.
    """

    def __init__(self, collections: Sequence[Collection]):
        self.collections = list(collections)
        self.calls: list[LossCall] = []
        self.sharded = ShardedPass({c.request: c.over_shards for c in collections})
        self.found: list[dict[Request, Contribution]] = []
        self.error: Exception | None = None
        self.refusals = Refusals()

    def add(self, call: LossCall, scale: Tensor) -> None:
        """Propagate the columns of one loss now, while every saved tensor is there. An error waits
        for the end of the pass, so that gradients are what they would be.
        """
        if self.error is None:
            self.calls.append(call)
        requests = [collection.request for collection in self.collections]
        node = torch._C._current_autograd_node()
        try:
            with self.sharded.whole(call), torch.no_grad(), self.refusals.later():
                if self.error is not None:
                    return  # but ranks without an error had to have this one for their units
                refuse_compiled_step(call.name)
                refuse_tensor(scale.is_nested, scale.device)
                with torch.autocast(scale.device.type, enabled=False):
                    check_linear(call, node)
                    shares = self.sharded.shares
                    self.found.append(contribute_signed(call, scale, node, requests, shares))
        except NNJError as error:
            self.error = self.error or error
        except Exception as error:
            if self.error is not None:
                return
            why = f"the sweep failed with {type(error).__name__}: {error}"
            if under_compile(error, node, {end for end, _ in call.edges}):
                why = f"{call.name}: {IN_COMPILED} ({why})"
            self.error = NNJError(why)
            self.error.__cause__ = error

    def end(self) -> None:
        """Hand over to the collections. An error waits, so that what others do at the end of the
        pass is done.
        """
        self.error = self.error or self.refusals.first()
        if self.error is None or self.sharded.sharding is not None:
            try:
                for collection in self.collections:
                    self._hand_over(collection)
            except Exception as error:
                self.error = error
        if self.error is not None:
            kept = [c.refuse_pass(self.error, self.calls) for c in self.collections]
            if all(kept):
                self.error = None
            else:
                _at_end(self._raise, LAPS)

    def _hand_over(self, collection: Collection) -> None:
        request = collection.request
        used = not self.error and collection.over_shards.counts
        found = [found[request] for found in self.found] if used else []
        if self.sharded.sharding is None:
            collection.add_pass(found)
        else:
            how, accumulator = collection.over_shards, collection.accumulator
            self.sharded.share_out(accumulator, request, found, self.error, how)
            collection.pass_ended()

    def _raise(self) -> None:
        """Errors: that of the first loss that had one."""
        # the error holds the frames that it passes, and they this pass: no circle of them is left
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error


def _at_end(call: Callable[[], None], laps: int) -> None:
    """Call something at the end of the pass that runs, when what others have queued is done, and
    what that has queued, `laps` times.
    """
    again: Callable[[], None] = call if laps == 0 else functools.partial(_at_end, call, laps - 1)
    torch.autograd.Variable._execution_engine.queue_callback(again)


class _Thread:
    """What is open in one thread, outermost first, and its passes by the number of autograd's
    task.
    """

    def __init__(self) -> None:
        self.open: list[Collection] = []
        self.aside: list[Collection] = []  # that are open, and take nothing in for a while
        self.passes: dict[int, _Pass] = {}
        self.adding = False
        self._multithreaded: bool | None = None  # autograd's setting before the first was opened

    def begin(self, collection: Collection) -> None:
        """Open a collection."""
        if self._multithreaded is None:
            self._multithreaded = torch._C._is_multithreading_enabled()
            # hooks then run in this thread, on any device
            torch.autograd.set_multithreading_enabled(False)
        self.open.append(collection)

    def arrived(self, call: LossCall, scale: Tensor) -> None:
        """The gradient of a loss has arrived; not that of a verification, which goes through other
        losses where one is a part of another.
        """
        if self.adding:
            return
        task = torch._C._current_graph_task_id()
        if task not in self.passes:
            self.passes[task] = _Pass(self.open)
            _at_end(functools.partial(self._end, task), 0)
        self.adding = True
        try:
            self.passes[task].add(call, scale)
        finally:
            self.adding = False

    def _end(self, task: int) -> None:
        ended = self.passes.pop(task, None)
        if ended is not None and ended.sharded.sharding is not None:
            _at_end(ended.end, LAPS)  # when FSDP has reduced the gradients, and sharded all again
        elif ended is not None:
            ended.end()

    @contextmanager
    def only(self, collection: Collection) -> Iterator[None]:
        """Open one collection, and for a while no other."""
        before = self.aside
        self.aside, self.open = [*before, *self.open], []
        try:
            with collection:
                yield
        finally:
            self.open, self.aside = self.aside[len(before) :], before

    def close(self, collection: Collection) -> None:
        """Close a collection, whether it is the last one that was opened or not."""
        if collection in self.open:
            self.open.remove(collection)
        if not self.open and not self.aside:
            self.passes.clear()  # of backward passes that raised
            if self._multithreaded is not None:
                torch.autograd.set_multithreading_enabled(self._multithreaded)
                self._multithreaded = None


_threads: dict[int, _Thread] = {}


def _of_this_thread() -> _Thread:
    return _threads.setdefault(threading.get_ident(), _Thread())


def open_collections() -> list[Collection]:
    """Those of this thread, outermost first."""
    return list(_of_this_thread().open)


def is_collecting() -> bool:
    """Whether a collection is open in this thread."""
    return bool(_of_this_thread().open)


class Capture(Collection):
    """Keeps what one backward pass adds, for nobody else: what else is open takes nothing in.

    Attributes:
        contributions: those of the losses of the pass.
    """

    def __init__(self, request: Request):
        super().__init__(request)
        self.contributions: list[Contribution] = []

    @override
    def add_pass(self, contributions: list[Contribution]) -> None:
        self.contributions += contributions
        self.accumulator.passes += 1

    @contextmanager
    def alone(self) -> Iterator[Self]:
        """Open, while all that is open in this thread is not."""
        with _of_this_thread().only(self):
            yield self


def _arrived(call: LossCall, scale: Tensor) -> None:
    thread = _threads.get(call.thread)  # hooks know in which thread the loss was called
    if thread is not None and thread.open:
        thread.arrived(call, scale)


listeners.append(_arrived)
