"""Where a kernel cannot run on the user's machine: a compile error, too few resources, a launch that fails.

Its call is computed by the torch path, with one warning, and so are later ones of its kind, without another attempt.
Where Triton was demanded it is a BackendError. Dropout goes by the kernels' masks as long as these can be drawn, so
that a forward, its backward and a checkpoint's recomputation have one mask whoever computes them.

Only what is raised inside Triton counts. Running out of memory does not, nor what the device reports of another
kernel's failure, after which no number can be trusted.
"""

import contextlib
import contextvars
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastpeft.dispatch import requested_backend
from fastpeft.errors import BackendError
from fastpeft.scoped import scoped

# What CUDA and HIP say at the next launch of a kernel that has failed before.
LATE = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")

# How a call was served, as a number that an operator can hand from forward to backward:
# (whether on Triton, whether that was demanded, whether it fell back).
_SERVED = ((False, False, False), (True, False, False), (True, True, False), (True, False, True))

_failed: dict[tuple, str] = {}  # kind of call -> why its kernels failed
_drawn: set[tuple] = set()  # where the kernels have drawn a mask
_lock = threading.Lock()
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("fastpeft_no_fallback", default=False)


def is_strict() -> bool:
    """Whether it is a block of `no_fallback`."""
    return _strict.get()


def is_demanded(patched: str | None) -> bool:
    """Whether a call that Triton serves must run there or raise; `patched` is what `patch` was given."""
    return is_strict() or requested_backend(patched) == "triton"


@contextlib.contextmanager
def no_fallback():
    """Within the block, in this thread, a kernel that fails is a BackendError, whichever backend was asked for: of what
    is measured or checked it has to be known who has computed it."""
    with scoped(_strict, True):
        yield


def kernel_failures() -> dict[str, str]:
    """What has fallen back in this process: op, phase, device and what the call was -> why. Empty where nothing has; it
    raises nothing."""
    return {_words(kind): reason for kind, reason in _failed.items()}


def something_failed() -> bool:
    """Whether any kernel has, in this process."""
    return bool(_failed)


def kernels_or_torch(
    kind: Callable[[], tuple], demanded: bool, kernels: Callable, torch_path: Callable
) -> tuple[Any, bool]:
    """(`kernels()`, True), or where they fail, or have failed for this kind of call, (`torch_path()`, False).

    Args:
        kind: gives op, phase ("forward", "backward"), device, and what else the kernels are compiled for; asked where
            something has failed.
        demanded: whether Triton must serve the call.
        kernels, torch_path: write into nothing but what they allocate.

    Raises:
        BackendError: the kernels fail and are demanded.
    """
    if demanded or not _failed or kind() not in _failed:
        try:
            return kernels(), True
        except Exception as error:
            if not is_of_a_kernel(error):
                raise
            _note(kind(), error, demanded)
    return torch_path(), False


def mask_of_kernels(kind: tuple, needed: bool, draw: Callable):
    """`draw()`, a mask by the kernels' generator, or None where that cannot run.

    Raises BackendError if it is `needed`, because the kernels' forward had it, or has been drawn before: with another
    mask the gradients would be wrong.
    """
    if kind in _failed and not needed:
        return None
    try:
        mask = draw()
    except Exception as error:
        if not is_of_a_kernel(error):
            raise
        _note(kind, error, needed or kind in _drawn)
        return None
    _drawn.add(kind)
    return mask


def is_of_a_kernel(error: Exception) -> bool:
    """Whether an error comes from compiling or launching a kernel, and leaves the device as it was. What the
    interpreter finds is a mistake in a kernel."""
    if type(error).__name__ == "InterpreterError":
        return False
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in LATE):
        return False
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.partition(".")[0] == "triton" for name in (type(error).__module__, *names))


def _note(kind: tuple, error: Exception, fatal: bool) -> None:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
    call = _words(kind)
    if fatal:
        raise BackendError(f"the Triton kernels failed and cannot be done without ({call}): {reason}") from error
    with _lock:
        first = _failed.setdefault(kind, reason) is reason
    if first:
        warnings.warn(
            f"the Triton kernels failed ({call}), and the torch path computes this and every such call from now on: "
            f"{reason}. FASTPEFT_BACKEND=triton makes it an error, FASTPEFT_BACKEND=torch does without the attempt",
            RuntimeWarning,
            stacklevel=3,
        )


def _words(kind: tuple) -> str:
    op, phase, device, *what = kind
    return f"{op}, {phase}, on {device}: {', '.join(map(str, what))}"


def code_of(triton: bool, call) -> int:
    """What `served` reads: of a call with the fields `demanded` and `fell_back`."""
    return _SERVED.index((triton, triton and call.demanded, call.fell_back))


def served(code: int) -> tuple[bool, dict[str, bool]]:
    """(Whether a forward ran on Triton, the call's fields `demanded` and `fell_back`.)"""
    triton, demanded, fell_back = _SERVED[code]
    return triton, {"demanded": demanded, "fell_back": fell_back}
