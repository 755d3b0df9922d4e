"""Which adapters a call uses.

`set_adapter` is state of the model, seen by every thread. `use_adapter` and `disable_adapter` override it for the
calls inside their block, in this thread (or task) alone. A checkpointed segment takes the choice of its forward along,
so that its recomputation in backward, after the block has ended and perhaps in another thread, makes the same choice.

A call may name an adapter for each of its samples instead (`adapter_names=`): that is an override too, of the names
that occur, with the names row by row beside them.
"""

import contextlib
import contextvars
import threading
import types
from collections.abc import Callable

import torch

from fastpeft.config_base import PeftType
from fastpeft.distributed import check_reentrant
from fastpeft.scoped import scoped

# The methods whose parameters are read by several layers, or by a layer and for the loss.
IN_SEVERAL_SEGMENTS = (PeftType.PREFIX_TUNING, PeftType.ADALORA)

# No adapter, among the names of a mixed batch's rows, as in HF peft.
BASE = "__base__"

# Per patched model, the names in force: {_key of its PatchState: names}; and those of rows: {_key(state, ROWS): names}.
ROWS = "rows_"
_overrides: contextvars.ContextVar[dict[str, tuple[str, ...]] | None]
_overrides = contextvars.ContextVar("fastpeft_adapters", default=None)

# Whether any override block is open in the process. While none is, a layer reads a plain attribute and nothing else.
_any_open = False
_open: set[object] = set()  # one for each; no number, which an interrupted block would leave wrong for good
_changing = threading.Lock()

# What `_overrides` has in this thread, or None, as attributes of a module. torch.compile knows no context variables;
# but of a module it reads an attribute as Python does, and again in the guard that precedes every compiled call, in the
# thread that makes it. So each choice has code of its own, and finds it.
_here = types.ModuleType("fastpeft.selection.here")
_here.__getattr__ = lambda key: (_overrides.get() or {}).get(key)


def _key(state, kind: str = "") -> str:
    return f"{kind}of_{id(state)}"


def active_names(state) -> tuple[str, ...]:
    """The adapters a call now uses, in the order in which they are added up; `state` is the model's PatchState."""
    if state.traced_rows is not None:
        return tuple(name for name in dict.fromkeys(state.traced_rows) if name != BASE)
    if _any_open:
        names = getattr(_here, _key(state))
        return state.active if names is None else names
    return state.active


def row_names(state) -> tuple[str, ...] | None:
    """For each sample of the batch the adapter that a call now uses, or BASE; None where all samples share."""
    if state.traced_rows is not None:  # in compiled code, or in what that calls
        return state.traced_rows
    return getattr(_here, _key(state, ROWS)) if _any_open else None


def chosen_here(state) -> bool:
    """Whether a block of this thread, or a call, has chosen adapters."""
    return _any_open and getattr(_here, _key(state)) is not None


def disabled(state) -> bool:
    """Whether calls now are to compute the base model, by a block that says so."""
    return _any_open and getattr(_here, _key(state)) == ()


@contextlib.contextmanager
def override(state, names: tuple[str, ...], rows: tuple[str, ...] | None = None):
    """Within the block, calls of this thread use `names`; with `rows`, each sample that of its own."""
    block = object()
    with scoped(_overrides, {**(_overrides.get() or {}), _key(state): names, _key(state, ROWS): rows}):
        try:
            _note(_open.add, block)
            yield
        finally:
            _note(_open.discard, block)  # an interruption of which leaves layers slower, and no choice


def by_rows(state, rows: tuple[str, ...], function, /, *args, **kwargs):
    """`function(*args, **kwargs)`, inside which each sample uses the adapter that `rows` names for it."""
    names = tuple(name for name in dict.fromkeys(rows) if name != BASE)
    if torch.compiler.is_dynamo_compiling():  # which traces one call at a time, and knows no context variables
        before, state.traced_rows = state.traced_rows, rows
        try:
            return function(*args, **kwargs)
        finally:
            state.traced_rows = before
    with override(state, names, rows):
        return function(*args, **kwargs)


def _note(change: Callable[[object], None], block: object) -> None:
    global _any_open
    with _changing:
        change(block)
        _any_open = bool(_open)


class CarriedCheckpoint:
    """A checkpoint function, called as it is, with the recomputation bound to the adapters of its forward.

    A class and not a closure, so that the model that holds it can be pickled, and copied with a state of its own.
    """

    def __init__(self, checkpoint, state):
        self.without_choice = checkpoint
        self.state = state

    def __call__(self, function, *args, **kwargs):
        state = self.state
        names, rows = active_names(state), row_names(state)
        if not torch.compiler.is_dynamo_compiling():
            shared = [name for name in names if state.configs[name].peft_type in IN_SEVERAL_SEGMENTS]
            check_reentrant(self.without_choice, shared)

        def bound(*inner, **inner_kwargs):
            if (active_names(state), row_names(state)) == (names, rows):
                return function(*inner, **inner_kwargs)
            with override(state, names, rows):
                return function(*inner, **inner_kwargs)

        return self.without_choice(bound, *args, **kwargs)


def carry_no_more(model: torch.nn.Module) -> None:
    """Give every module of a model the checkpoint function back that a `CarriedCheckpoint` calls."""
    for module in model.modules():
        carried = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(carried, CarriedCheckpoint):
            module._gradient_checkpointing_func = carried.without_choice
