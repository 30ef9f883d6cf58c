"""Collectives that each rank comes to in an order of its own: all take part in what any asks for,
until all have come to the end.
"""

from __future__ import annotations

from collections.abc import Callable

from nnj.distributed.ranks import Ranks

# From so many bytes on what waits to be shared is shared: a message that is worth its time.
BUCKET = 4 << 20

_NOTHING, _ENDED = -1, -2


class Rounds:
    """Rounds of all ranks. In each, every rank says what it needs and how many bytes it has to
    share, and all do what any of them needs. A rank that has ended serves the others, so that ranks
    with other numbers of steps, or in another order, never wait for one another in vain.

    Args:
        ranks: all of them.
        act: does one thing with all ranks, by its number; told whether this rank needs it.
        size: the bytes that wait here to be shared.
        share: shares, with all ranks, what waits on all of them.
    """

    def __init__(
        self,
        ranks: Ranks,
        act: Callable[[int, bool], None],
        size: Callable[[], int],
        share: Callable[[], None],
    ):
        self._ranks, self._act, self._size, self._share = ranks, act, size, share

    def need(self, what: int) -> None:
        """Do one thing with all ranks, which share nothing meanwhile: this one is in the middle of
        a step.
        """
        self._round(what, 0)

    def offer(self) -> None:
        """Share what waits, if it is enough and others have come as far."""
        size = self._size()
        if size >= BUCKET:
            self._round(_NOTHING, size)

    def end(self) -> None:
        """Take part in what others need until they have ended, too."""
        while not self._round(_ENDED, self._size()):
            pass

    def _round(self, what: int, size: int) -> bool:
        """Whether all have ended."""
        said = self._ranks.numbers([what, size])
        for needed in sorted({needed for needed, _ in said if needed >= 0}):
            self._act(needed, needed == what)
        sizes = [waits for _, waits in said]
        if min(sizes) > 0 and max(sizes) >= BUCKET:
            self._share()
        return all(needed == _ENDED for needed, _ in said)
