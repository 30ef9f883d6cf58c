"""The modules of the extended models and their parameters, as they are in one backward pass: walked
once, by all that ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn


class Scope:
    """What may take part in a backward pass.

    Args:
        roots: the extended models that are alive.

    Attributes:
        modules: of each model, itself and all modules below it, in the order of `modules()`; of
            a model before those that are parts of it.
        own: of each module, its own parameters that require grad, each once.
        paths: the name of each module in its model, for errors.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        self.roots = roots
        self.modules = {root: modules_of(root) for root in roots}
        if len(roots) > 1:
            inner = {m for root, found in self.modules.items() for m in found if m is not root}
            parts = {root: self.modules.pop(root) for root in roots if root in inner}
            self.modules |= parts
        self.own = {m: own_params(m) for modules in self.modules.values() for m in modules}
        self.paths = Paths(roots)

    def of(self, tops: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Parameter]]:
        """The modules of some, which need not be extended models, with their own parameters."""
        own = self.own
        return {
            m: own[m] if m in own else own_params(m)
            for top in tops
            for m in self.modules.get(top) or modules_of(top)
        }


class Paths(Mapping[nn.Module, str]):
    """The name of each module in its model, found out when the first one is asked for: mostly, no
    error asks for any.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        self._roots = roots
        self._found: dict[nn.Module, str] | None = None

    def _all(self) -> dict[nn.Module, str]:
        if self._found is None:
            self._found = {m: name for root in self._roots for name, m in root.named_modules()}
        return self._found

    def __getitem__(self, module: nn.Module) -> str:
        return self._all()[module]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def modules_of(top: nn.Module) -> list[nn.Module]:
    """`list(top.modules())`, whose generators in each other take much longer."""
    found: dict[nn.Module, None] = {}
    stack: list[nn.Module | None] = [top]
    while stack:
        m = stack.pop()
        if m is None or m in found:
            continue
        found[m] = None
        if m._modules:
            stack += reversed(m._modules.values())
    return list(found)


def own_params(m: nn.Module) -> list[nn.Parameter]:
    """Those that require grad, each once, in order; torch's own iterators take much longer."""
    own = m._parameters
    if not own:
        return []
    found = [p for p in own.values() if p is not None and p.requires_grad]
    once = len(set(map(id, found))) == len(found)  # torch hashes a tensor in Python
    return found if once else list(dict.fromkeys(found))


def owned_by_several(modules: Iterable[nn.Module]) -> set[Tensor]:
    """The parameters that several modules own."""
    owner: dict[int, nn.Module] = {}  # by id, while the modules hold the parameters
    several: set[Tensor] = set()
    for m in modules:
        for p in m._parameters.values() if m._parameters else ():
            if p is not None and owner.setdefault(id(p), m) is not m:
                several.add(p)
    return several
