"""Bytes that tensors hold, by the part of a step that made them, counted on tensors without content."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@contextmanager
def without_content() -> Iterator[None]:
    """Tensors made inside have shape, dtype and device alone. Modules that are moved or cast get new parameters: torch swaps
    them in place, which it cannot with these."""

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> nn.Module:
        for owner in module.modules():
            for held in (owner._parameters, owner._buffers):
                held.update({name: changed(x, fn) for name, x in held.items() if x is not None})
        return module

    def changed(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Any:
        with torch.no_grad():
            new = fn(x)
        if new is x:
            return x
        if id(x) not in known:  # tied weights stay tied
            known[id(x)] = x, nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
        return known[id(x)][1]

    known: dict[int, tuple[Tensor, Tensor]] = {}
    own, nn.Module._apply = nn.Module._apply, apply  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copy.deepcopy
            yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


ELSEWHERE = "elsewhere"
"""A part that takes no memory of the device."""
BY_MASK = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


@final
class Meter(TorchDispatchMode):
    """Inside a FakeTensorMode: which storages are alive, and what they were made for when most was held.

    Where a branch or a shape depends on content, which these tensors do not have, every truth is taken for true and every
    number for 1: gradients are finite, masks have no gap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        """Bytes by part when their sum was largest."""
        self.flops = 0
        """Of matrix products and attention so far."""
        self._part = ""
        self.held: Counter[str] = Counter()
        """Bytes by part now."""
        self._storages: dict[int, tuple[str, int]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside belongs to this part."""
        before = self._part
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> None:
        """What is made from here on belongs to this part."""
        self._part = name

    def move(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """These tensors belong to this part from here on."""
        for key in {x.untyped_storage()._cdata for x in tensors if x is not None} & self._storages.keys():
            before, size = self._storages[key]
            self.held[before] -= size
            size *= part != ELSEWHERE
            self.held[part] += size
            self._storages[key] = part, size

    def forget_peak(self) -> None:
        """Look for the largest sum from here on."""
        self.peak = +self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        if func is aten.nonzero.default:
            return torch.stack(_everywhere(args[0]), -1)
        if func in BY_MASK:
            indices = [y for x in args[1] for y in (_everywhere(x) if _is_mask(x) else (x,))]
            args = (args[0], indices, *args[2:])
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        size = storage.nbytes() if self._part != ELSEWHERE else 0
        self._storages[storage._cdata] = self._part, size
        self.held[self._part] += size
        weakref.finalize(storage, self._drop, storage._cdata)
        if self.held.total() > self.peak.total():
            self.peak = +self.held

    def _drop(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.held[part] -= size


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _everywhere(mask: Tensor) -> tuple[Tensor, ...]:
    """The indices of a mask that is true everywhere."""
    return (mask.new_zeros(mask.numel(), dtype=torch.long),) * mask.dim()
