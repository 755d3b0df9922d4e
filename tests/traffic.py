"""Bytes moved by kernels, counted in Triton's interpreter: every active lane of every load and store.

Counted per launch and per pointer argument of the kernel. An active lane whose address lies in none of the arguments'
tensors raises, so that counting is a bounds check too. Where two arguments overlap, the first one is charged.
"""

import contextlib
import inspect
from collections import Counter
from dataclasses import dataclass, field

import numpy
import torch

ATOMICS = ("create_atomic_cas", "create_atomic_rmw", "create_atomic_load", "create_atomic_store", "create_atomic_poll")


@dataclass
class Launch:
    """One kernel launch: bytes loaded and stored by the name of the pointer argument."""

    kernel: str
    extents: dict[str, tuple[int, int]]  # argument -> (first address, address after the last)
    storages: dict[str, int]  # argument -> address of its tensor's storage
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)

    def charge(self, counter: Counter, addresses: numpy.ndarray, mask: numpy.ndarray, size: int) -> None:
        active = addresses[numpy.broadcast_to(mask, addresses.shape)]
        if not active.size:
            return
        lowest, highest = int(active.min()), int(active.max())
        for name, (start, stop) in self.extents.items():
            if stop <= lowest or highest < start:  # touched by none
                continue
            if start <= lowest and highest < stop:  # by all
                counter[name] += active.size * size
                return
            inside = (active >= start) & (active < stop)
            if count := int(inside.sum()):
                counter[name] += count * size
                active = active[~inside]
        if active.size:
            raise IndexError(f"{self.kernel}: {active.size} addresses outside every argument, the first {active[0]:#x}")


SUMS = ("_sum_partials_kernel", "_sum_many_partials_kernel")  # of few, and of many


@dataclass
class Traffic:
    """All launches in the order they were made."""

    launches: list[Launch] = field(default_factory=list)
    atomics: int = 0

    def of(self, *kernels: str) -> tuple[dict[str, int], dict[str, int]]:
        """(loads, stores) of all launches of the kernels, by argument; arguments that were not touched are left out."""
        loads, stores = Counter(), Counter()
        for launch in self.launches:
            if launch.kernel in kernels:
                loads += launch.loads
                stores += launch.stores
        return dict(loads), dict(stores)

    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]

    def loaded(self, tensor: torch.Tensor) -> int:
        """Bytes that all launches together loaded from the tensor's storage."""
        address = tensor.untyped_storage().data_ptr()
        return sum(
            count for launch in self.launches for name, count in launch.loads.items()
            if launch.storages[name] == address
        )  # fmt: skip


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _launch(function, arguments, keywords) -> Launch:
    signature = inspect.signature(function)
    known = {name: value for name, value in keywords.items() if name in signature.parameters}
    bound = signature.bind(*arguments, **known).arguments
    tensors = {name: getattr(value, "base", value) for name, value in bound.items()}  # a descriptor has a base
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return Launch(
        function.__name__,
        {name: _extent(tensor) for name, tensor in tensors.items()},
        {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()},
    )


@contextlib.contextmanager
def count_traffic():
    """Yields a `Traffic` that fills as kernels run in the interpreter within the block."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic = Traffic()
    execute, load, store = GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    atomics = {name: getattr(builder, name) for name in ATOMICS if hasattr(builder, name)}

    def counted_execute(executor, *arguments, **keywords):
        traffic.launches.append(_launch(executor.fn, arguments, keywords))
        return execute(executor, *arguments, **keywords)

    def width(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(pointers, mask, *rest, **keywords):
        launch = traffic.launches[-1]
        launch.charge(launch.loads, pointers.data, mask.data, width(pointers))
        return load(pointers, mask, *rest, **keywords)

    def counted_store(pointers, value, mask, *rest, **keywords):
        launch = traffic.launches[-1]
        launch.charge(launch.stores, pointers.data, mask.data, width(pointers))
        return store(pointers, value, mask, *rest, **keywords)

    def counted_atomic(atomic):
        def call(*arguments, **keywords):
            traffic.atomics += 1
            return atomic(*arguments, **keywords)

        return call

    GridExecutor.__call__ = counted_execute
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    for name, atomic in atomics.items():
        setattr(builder, name, counted_atomic(atomic))
    try:
        yield traffic
    finally:
        GridExecutor.__call__ = execute
        for name in ("create_masked_load", "create_masked_store", *atomics):
            delattr(builder, name)
