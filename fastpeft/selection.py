"""Which adapters a call uses.

`set_adapter` is state of the model, seen by every thread. `use_adapter` and `disable_adapter` override it for the
calls inside their block, in this thread (or task) alone. A checkpointed segment takes the choice of its forward along,
so that its recomputation in backward, after the block has ended and perhaps in another thread, makes the same choice.
"""

import contextlib
import contextvars
import threading

# Per patched model, the names in force: {id of its PatchState: names}.
_overrides: contextvars.ContextVar[dict[int, tuple[str, ...]]] = contextvars.ContextVar("fastpeft_adapters")

# How many override blocks are open in the process. While it is 0 a layer reads a plain attribute and nothing else,
# which is what torch.compile can trace.
_open_overrides = 0
_counting = threading.Lock()


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
    with _counting:
        _open_overrides += 1
    try:
        yield
    finally:
        with _counting:
            _open_overrides -= 1
        _overrides.reset(token)


class CarriedCheckpoint:
    """A checkpoint function, called as it is, with the recomputation bound to the adapters of its forward.

    A class and not a closure, so that the model that holds it can be pickled, and copied with a state of its own.
    """

    def __init__(self, checkpoint, state):
        self.without_choice = checkpoint
        self.state = state

    def __call__(self, function, *args, **kwargs):
        state = self.state
        names = active_names(state)

        def bound(*inner, **inner_kwargs):
            if active_names(state) == names:
                return function(*inner, **inner_kwargs)
            with override(state, names):
                return function(*inner, **inner_kwargs)

        return self.without_choice(bound, *args, **kwargs)
