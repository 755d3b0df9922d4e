"""What calls on the kernels, and those of the torch path on a CPU, come to, written down once and done again.

Which allocations, views, launches and vendor's products a call makes, in which order and of which sizes, hangs on what
its tensors are like and on what is asked for, not on values. To find it out takes an op's Python several times as long
as to do it. So one of several calls alike is recorded (`_recording`), as a function of straight lines, its program, and
later ones run that. What is alike is asked of torch in one go, by the `TensorGuards` that torch.compile has for this
question: type, dtype, device, sizes, strides, whether a gradient is wanted, and what intercepts torch's operations.

A program calls the same functions with the same arguments in the same order as what it was recorded of, and lets go of
each tensor behind its last use. What reads more of a tensor than that question covers (a value, an address) is not
recorded, and runs as it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.dispatch import circumstances
from fastpeft.fallback import is_of_a_kernel, is_strict, something_failed
from fastpeft.ops._autocast import device_type_of, is_autocast, without_autocast

SIZES, ALIKE = 1024, 32  # sizes that are known, and calls for tensors of the same: the last ones
AFTER = 8  # calls alike, the next is recorded: that takes as long as a dozen of them, which lengths that change are not

_PLAIN = (Tensor, torch.nn.Parameter)
_modes = torch._C._len_torch_dispatch_stack  # how many look at what torch dispatches, which programs go past
_has_onednn = torch._C._get_mkldnn_enabled  # torch.backends.mkldnn.enabled, which programs of a CPU hang on


class Known:
    """A call for tensors that the guards let through, and under all that was asked. narrow: autocast's dtype, as guards
    see whether it is on, but not this. tf32: see `_tf32_of`."""

    __slots__ = ("guards", "asked", "call", "narrow", "tf32", "seen")

    def __init__(self, guards, asked: tuple, call, narrow: torch.dtype | None, tf32: bool | None):
        self.guards, self.asked, self.call, self.narrow, self.tf32, self.seen = guards, asked, call, narrow, tf32, 1


LEARNED: set[bool] = set()  # True in it once anything is known; to be asked first, and whether nothing is compiled


@functools.lru_cache(SIZES)
def _alike(function, x_shape: torch.Size, matrix_shape: torch.Size) -> list[Known]:
    """What is known of calls with tensors of these sizes, the last first."""
    return []


def forget() -> None:
    """The next calls find everything out."""
    LEARNED.clear()
    _alike.cache_clear()


@functools.cache
def _kernels():
    """To be asked for before anything is kept: whoever forgets tiles forgets that too."""
    from fastpeft.kernels import _common, _tiles

    _tiles.also_forget(forget)
    return _common


@functools.cache
def _make_guards() -> Callable | None:
    """torch's own, which are not public: None, and there are no programs, where they do not answer as they are known to
    from 2.11 on."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        make = functools.partial(TensorGuards, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        x = torch.empty(2, 3, device="cpu")
        check = make(x).check
        others = x.half(), x.t(), torch.empty(3, 2, device="cpu"), torch.nn.Parameter(x)
        return make if check(torch.empty_like(x)) and not any(map(check, others)) else None
    except (ImportError, TypeError, AttributeError):
        return None


def _guards(tensors: Sequence[Tensor]):
    """None for tensors that no guards let through: one that is there twice, or whose Python is not torch's own."""
    if len(set(map(id, tensors))) < len(tensors) or not all(type(each) in _PLAIN for each in tensors):
        return None
    make = _make_guards()
    guards = make and make(*tensors)
    return guards if guards and guards.check(*tensors) else None


def _asked(patched: str | None, rest: tuple) -> tuple:
    """All that a call hangs on beside its tensors."""
    return rest, circumstances(patched), is_strict(), _has_onednn()


def _tf32_of(tensors: Sequence[Tensor], call) -> bool | None:
    """Whether kernels' products of fp32 may be tf32's, which takes long to ask, or None where these tensors, and
    products in the call's dtype, come to none."""
    if not call.by_kernels:
        return None
    kernels, some = _kernels(), call.dtype is torch.float32 or any(each.dtype is torch.float32 for each in tensors)
    return kernels.allows_tf32() if some else None


def _is_still(tf32: bool | None) -> bool:
    return tf32 is None or tf32 is _kernels().allows_tf32()


def known(function, tensors: Sequence[Tensor], patched: str | None, rest: tuple) -> Known | None:
    """What `learn` was told of tensors and everything else alike.

    Args:
        function: the op's autograd.Function.
        tensors: x, a matrix of the layer's, and all others that the call has.
        patched: the backend that `patch` was given.
        rest: whatever else was asked for, and which of the tensors that may be missing are; what `learn` is told holds
            numbers of Python's, and nothing that may change.
    """
    x = tensors[0]
    if type(x) not in _PLAIN or _modes():
        return None
    found = _alike(function, x.shape, tensors[1].shape)
    if not found:
        return None
    asked = _asked(patched, rest)
    for each in found:
        alike = each.asked == asked and each.guards.check(*tensors) and _is_still(each.tf32)
        if alike and (each.narrow is None or each.narrow is torch.get_autocast_dtype(device_type_of(x))):
            if each.call.programs is None and each.call.is_straight:
                each.seen += 1
                if each.seen > AFTER:
                    each.call = each.call._replace(programs=Programs())
            return each
    return None


def learn(function, tensors: Sequence[Tensor], patched: str | None, rest: tuple, call, narrow) -> None:
    """Keeps the call, a NamedTuple, for those that will be alike: with a field `programs`, whether it is `by_kernels`,
    and whether it `is_straight`, which the torch path is not where it asks how many elements are dropped. On a GPU that
    is asked for to compare with, and is not kept."""
    guards = _guards(tensors) if (call.by_kernels or tensors[0].is_cpu) and not _modes() else None
    if guards is None:
        return
    found = _alike(function, tensors[0].shape, tensors[1].shape)
    found.insert(0, Known(guards, _asked(patched, rest), call, narrow, _tf32_of(tensors, call)))
    del found[ALIKE:]
    LEARNED.add(True)


class Programs:
    """Of calls alike: those of their forwards and of their backwards, each by the gradients that are wanted."""

    def __init__(self):
        self.forward: dict[tuple, Callable] = {}
        self.backward: tuple[tuple[tuple, Any, bool | None, Callable], ...] = ()  # and by more, see `backward_of`


def forward_of(call, needs: tuple, function: Callable, tensors: tuple, drawn: tuple = ()):
    """function(*tensors, *drawn, call, needs), by a program if calls alike have one: of tensors that are as they were
    when the call was known. drawn: others, as many in each, of any sizes."""
    programs, rest = call.programs, (call, needs)
    if programs is None or something_failed():
        return function(*tensors, *drawn, *rest)
    if (program := programs.forward.get(needs)) is None:
        result, programs.forward[needs] = _recorded(function, tensors, drawn, rest)
        return result
    try:
        return program(*tensors, *drawn)
    except Exception as error:  # where a kernel fails, the function deals with that
        if not is_of_a_kernel(error):
            raise
    return function(*tensors, *drawn, *rest)


def backward_of(call, needs: tuple, function: Callable, tensors: tuple, *others, drawn: tuple = ()):
    """function(*tensors, *drawn, call, needs, *others) under no autocast, likewise: of a gradient and of what was
    saved, which is asked again, as a hook may have changed it."""
    programs, rest = call.programs, (call, needs, *others)
    if programs is not None and not _modes() and not something_failed():
        # Which may be others than in forward, as whether fp32 may be tf32.
        asked = needs, circumstances(), _has_onednn()
        given = [each for each in tensors if each is not None]
        for known_asked, guards, tf32, program in programs.backward:
            if known_asked == asked and guards.check(*given) and _is_still(tf32):  # made without autocast
                try:
                    return program(*tensors, *drawn)
                except Exception as error:
                    if not is_of_a_kernel(error):
                        raise
                return function(*tensors, *drawn, *rest)
        if not is_autocast(given[0]) and (guards := _guards(given)) is not None:
            result, program = _recorded(function, tensors, drawn, rest)
            tf32 = _tf32_of(given, call)
            programs.backward = ((asked, guards, tf32, program), *programs.backward)[:ALIKE]
            return result
    with without_autocast(next(each for each in tensors if each is not None)):
        return function(*tensors, *drawn, *rest)


def _recorded(function: Callable, tensors: tuple, drawn: tuple, rest: tuple) -> tuple[Any, Callable]:
    """(function(*tensors, *drawn, *rest), what gives the same of tensors alike)."""
    from fastpeft.ops._recording import Recording

    def as_it_is(*given):
        return function(*given, *rest)

    recording = Recording(tensors, drawn, rest[0].by_kernels)
    with recording.watching():
        result = function(*tensors, *drawn, *rest)
    program = None if something_failed() else recording.program(result)
    return result, program or as_it_is
