"""What our code would do on a GPU, seen without one: ops take Triton, and whoever asks gets their launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swformer_fast import backend

Handler = Callable[[Any, Any, tuple[Any, ...], Mapping[str, Any]], None]
"""Of a kernel, a grid, arguments and keywords."""
READING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operators whose result the host must wait for."""


@contextmanager
def launches(launch: Handler) -> Iterator[None]:
    """Inside, ops choose as on a GPU, and their kernels' launches are handed to `launch` and not made."""
    from triton.runtime.jit import KernelInterface

    def proxy(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: launch(kernel, grid, args, kwargs)

    with mock.patch.object(KernelInterface, "__getitem__", proxy), backend.as_on_gpu():
        yield


class HostWork(AssertionError):
    """A GPU's stream was made to wait for the host, or the host for the stream."""


class _NoNumbers(TorchFunctionMode):
    """torch.tensor and its kin copy numbers to the device; on the meta device no operator shows that."""

    MAKING = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.MAKING:
            raise HostWork(f"{func.__name__} makes a tensor from numbers of the host")
        return func(*args, **(kwargs or {}))


class NoHostWork(TorchDispatchMode):
    """Inside, with models and images on the meta device in a GPU's place, copies from and to the host raise HostWork.

    A number read from a tensor, a tensor made from numbers, or one made on the host: each stops a stream, and none can
    be captured in a CUDA graph. Our ops run their Triton launchers; what these launch does not run but is handed to
    `launch`, and `kernels` names it.
    """

    def __init__(self, launch: Handler = lambda kernel, grid, args, kwargs: None) -> None:
        super().__init__()
        self.launch = launch
        self.kernels: list[str] = []

    def _launched(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.kernels.append(kernel.__name__)
        self.launch(kernel, grid, args, kwargs)

    def __enter__(self) -> NoHostWork:
        self._around = ExitStack()
        self._around.enter_context(launches(self._launched))
        self._around.enter_context(_NoNumbers())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == backend.PACKAGE:
            with self._again():
                return backend.run(backend.OPS[name], (*args, *(kwargs or {}).values()))
        if name in READING:
            raise HostWork(f"aten::{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                raise HostWork(f"aten::{name} takes or makes a tensor on the host, of shape {tuple(tensor.shape)}")
        return result

    @contextmanager
    def _again(self) -> Iterator[None]:
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)
