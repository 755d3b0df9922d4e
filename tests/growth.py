"""What a process holds that may grow in a long run: tensors, objects, memory, open files, the package's own caches."""

import gc
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch

CONTAINERS = (dict, list, set)
PACKAGE = "fastpeft"


class Held(NamedTuple):
    """tensors, their bytes (each memory once), objects that the collector tracks, open files; exact."""

    tensors: int
    bytes: int
    objects: int
    files: int


def held() -> Held:
    """What is alive after a collection, of what has come since the last `gc.freeze()`. What is known of calls alike,
    which more shapes make more until its cache is full, is forgotten before."""
    if programs := sys.modules.get("fastpeft.ops._programs"):
        programs.forget()
    gc.collect()
    objects = gc.get_objects()
    tensors = [each for each in objects if issubclass(type(each), torch.Tensor)]
    sizes = {each.data_ptr(): each.nbytes for each in tensors if not each.is_meta}
    return Held(len(tensors), sum(sizes.values()), len(objects), psutil.Process().num_fds())


def resident() -> int:
    """Bytes of this process in memory."""
    return psutil.Process().memory_info().rss


def slope(samples: list[int]) -> float:
    """By which a number grows from one sample to the next: of the line with the least squares."""
    middle, mean = (len(samples) - 1) / 2, sum(samples) / len(samples)
    above = sum((place - middle) * (value - mean) for place, value in enumerate(samples))
    return above / sum((place - middle) ** 2 for place in range(len(samples)))


def caches(package: str = PACKAGE) -> dict[str, int]:
    """The size of everything in the package's modules and classes that could remember calls: functions with a cache,
    and containers at the top of a module or a class. A cache with a bound counts as full."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            found |= _sizes(name, vars(module), name)
    return found


def _sizes(path: str, namespace, module: str) -> dict[str, int]:
    found = {}
    for key, value in list(namespace.items()):
        if isinstance(value, types.ModuleType):
            continue
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if callable(getattr(value, "cache_info", None)):
            info = value.cache_info()
            found[f"{path}.{key}"] = info.currsize if info.maxsize is None else info.maxsize
        elif isinstance(value, CONTAINERS) or type(value).__module__ == "weakref":
            if not key.startswith("__") and hasattr(value, "__len__"):
                found[f"{path}.{key}"] = len(value)
        elif isinstance(value, type) and value.__module__ == module and not isinstance(value, types.GenericAlias):
            found |= _sizes(f"{path}.{key}", vars(value), module)
    return found


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The caches that are larger now, or new and not empty."""
    return {key: (before.get(key, 0), size) for key, size in after.items() if size > before.get(key, 0)}


def left_to_the_collector(function: Callable[[], Any]) -> list:
    """What of tensors, modules and the package's own objects is freed by the collector alone, as reference cycles are,
    when `function` has run."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        function()
        gc.collect()
        return [each for each in gc.garbage if _is_ours(each)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _is_ours(value: Any) -> bool:
    kinds = (type(value), value if isinstance(value, type) else None, getattr(value, "__func__", None))
    home = getattr(value, "__module__", None) if isinstance(value, types.FunctionType) else None
    homes = [home, *(getattr(each, "__module__", None) for each in kinds)]
    return isinstance(value, (torch.Tensor, torch.nn.Module)) or any(
        isinstance(each, str) and each.split(".")[0] == PACKAGE for each in homes
    )
