"""A device that exists only in name: its tensors keep their values on the CPU, and meeting the CPU's own is an error.

It finds tensors that were not moved to the model's device on a machine that has no other device. Values are real, so
that graphs, masks and whatever else depends on them are those of a real run.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # the only one besides the CPU whose backward runs where there is no such device

_aten = torch.ops.aten
# What may cross on a GPU: copies; indices, into a tensor of the device; single numbers, but not joined with others.
_COPIES = {_aten._to_copy, _aten.copy_}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_JOINING = {_aten.cat, _aten.stack}
# For which the CPU waits until a GPU has computed, to know a value or the size of the result.
_WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.repeat_interleave, _aten.equal}
_WAITING |= {_aten.bincount, _aten._unique2, _aten.unique_consecutive, _aten.unique_dim}


class _Elsewhere(Tensor):
    """A tensor on `DEVICE`."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.values = values
        return made

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return _Elsewhere(self.values.new_tensor(_numbers(data), **options))

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Runs every operation, and notes in `waits` the files that let the CPU wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func.overloadpacket, args, kwargs or {}):
            frames = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            own = (__file__, str(Path(torch.__file__).parent))
            self.waits.append(next((name for name in frames if not name.startswith(own)), ""))
        return _run(func, args, kwargs or {})


def _waits(operation: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    tensors = [isinstance(value, _Elsewhere) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if operation is _aten._to_copy and kwargs.get("device") is not None:
        crosses = tensors[0] != (kwargs["device"].type == DEVICE.type)
        return crosses and (tensors[0] or not kwargs.get("non_blocking"))
    if operation is _aten.copy_:
        return tensors[0] != tensors[1] and not (len(args) > 2 and args[2])
    if operation in _INDEXING and tensors[0]:  # masks are turned into numbers, and the CPU's are copied
        indices = [value for value in args[1] if value is not None]
        return any(value.dtype == torch.bool or not isinstance(value, _Elsewhere) for value in indices)
    return operation in _WAITING and any(tensors) and kwargs.get("output_size") is None


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, and put its results where the real one would."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    elsewhere = [tensor for tensor in tensors if isinstance(tensor, _Elsewhere)]
    first = bool(tensors) and isinstance(tensors[0], _Elsewhere)
    operation = func.overloadpacket
    if not (operation in _COPIES or (operation in _INDEXING and first)):
        here = [tensor for tensor in tensors if not isinstance(tensor, _Elsewhere)]
        if elsewhere and any(tensor.dim() or operation in _JOINING for tensor in here):
            found = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in tensors)
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")
    goes_elsewhere = first if operation in _COPIES else bool(elsewhere)
    if kwargs.get("device") is not None:
        goes_elsewhere = kwargs["device"].type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(tensor.values): tensor for tensor in elsewhere}  # of an operation in place

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else _Elsewhere(value)

    args, kwargs = tree_map(lambda value: value.values if isinstance(value, _Elsewhere) else value, (args, kwargs))
    result = func(*args, **kwargs)
    return tree_map(wrapped, result) if goes_elsewhere else result


def _numbers(data: Any) -> Any:
    """Nested lists of numbers, of the same with tensors of one element in them."""
    return tree_map(lambda value: value.tolist() if isinstance(value, Tensor) else value, data)


@contextmanager
def other_device() -> Iterator[list[str]]:
    """While entered, tensors can be moved to `DEVICE`, and an operation on tensors of both devices raises.

    Yields:
        A list that grows by the name of the file for each operation after which the CPU would wait for a GPU.
    """
    autocast, made = torch.autocast.__init__, torch.tensor

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:  # torch's own would keep no values
        return made(_numbers(data), **kwargs).to("cpu" if device is None else device)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", init))
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        yield stack.enter_context(_Mode()).waits
