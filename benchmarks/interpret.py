"""What interpreted kernels do: the bytes that they load and store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Traffic:
    """Bytes that interpreted kernels moved, masked lanes left out: every access, and each address once."""

    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes of all kernels that are interpreted inside."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic = Traffic()
    touched: dict[tuple[str, int], list[Any]] = {}
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> int:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        touched.setdefault((kind, itemsize), []).append(addresses)
        return addresses.size * itemsize

    def distinct(kind: str) -> int:
        return sum(size * np.unique(np.concatenate(lists)).size for (k, size), lists in touched.items() if k == kind)

    def counting_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        traffic.loaded += note("load", pointers, mask)
        return load(self, pointers, mask, *args)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.stored += note("store", pointers, mask)
        return store(self, pointers, value, mask, *args)

    Builder.create_masked_load, Builder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
        traffic.distinct_loaded, traffic.distinct_stored = distinct("load"), distinct("store")
