"""Which adapters a call uses.

`set_adapter` is state of the model, seen by every thread. `use_adapter` and `disable_adapter` override it for the
calls inside their block, in this thread (or task) alone. A checkpointed segment takes the choice of its forward along,
so that its recomputation in backward, after the block has ended and perhaps in another thread, makes the same choice.
"""

import contextlib
import contextvars
import functools

# Per patched model, the names in force: {id of its PatchState: names}.
_overrides: contextvars.ContextVar[dict[int, tuple[str, ...]]] = contextvars.ContextVar("fastpeft_adapters")

# How many override blocks are open in the process. While it is 0 a layer reads a plain attribute and nothing else,
# which is what torch.compile can trace.
_open_overrides = 0


def active_names(state) -> tuple[str, ...]:
    """The adapters a call now uses, in the order in which they are added up; `state` is the model's PatchState."""
    if _open_overrides:
        return _overrides.get({}).get(id(state), state.active)
    return state.active


@contextlib.contextmanager
def override(state, names: tuple[str, ...]):
    """Within the block, calls of this thread use `names`."""
    global _open_overrides
    token = _overrides.set({**_overrides.get({}), id(state): names})
    _open_overrides += 1
    try:
        yield
    finally:
        _open_overrides -= 1
        _overrides.reset(token)


def carrying_choice(checkpoint, state):
    """`checkpoint(function, *args)` with the recomputation of `function` bound to the adapters of its forward."""

    @functools.wraps(checkpoint)
    def carried(function, *args, **kwargs):
        names = active_names(state)

        @functools.wraps(function)
        def bound(*inner, **inner_kwargs):
            if active_names(state) == names:
                return function(*inner, **inner_kwargs)
            with override(state, names):
                return function(*inner, **inner_kwargs)

        return checkpoint(bound, *args, **kwargs)

    carried.without_choice = checkpoint
    return carried
