"""A context variable's value for a block, which no Ctrl-C leaves behind."""

import contextlib
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def scoped(variable: ContextVar[T | None], value: T):
    """Within the block, in this thread or task, the variable has this value.

    An exception may come between any two instructions here, also in the middle of `set` and `reset`: so both are inside
    the `try`, and what a reset has not done is done after it. One that comes before the block's end has begun, in
    contextlib's own lines, leaves the value until the exception's traceback is let go of, when Python closes this
    generator; no Python code can end it before.
    """
    before, token = variable.get(None), None
    try:
        token = variable.set(value)
        yield
    finally:
        try:
            if token is not None:
                variable.reset(token)
        finally:
            if variable.get(None) is value:
                variable.set(before)
