"""LoRA on parameters of a module whose forward is not known: while it is called, it reads adapted parameters in the
place of its own, as in HF peft. Each call computes W + s·B A, which is of W's size."""

import contextlib
import contextvars
from collections.abc import Iterator

from fastpeft.errors import PatchError
from fastpeft.scoped import scoped
from fastpeft.tuners.lora_parameters import LoraParameters

# Inside the call of a module: {(id of the module, parameter): (its adapted value, what has not been read yet)}.
_in_place: contextvars.ContextVar[dict | None] = contextvars.ContextVar("fastpeft_parameters", default=None)


class LoraMatrices(LoraParameters):
    """LoRA on parameters of any module."""

    def adapted_forward(self, names: list[str], *args, **kwargs):
        with self._reading(names) as unread:
            result = self.base_forward(*args, **kwargs)
        if unread:
            raise PatchError(
                f"{type(self).__name__} has not read {', '.join(sorted(unread))} from itself in this call, so its "
                "adapter would do nothing; leave it out of target_parameters"
            )
        return result

    @contextlib.contextmanager
    def _reading(self, names: list[str]) -> Iterator[set[str]]:
        """Inside, this thread reads adapted parameters from the module; yields those that it has not read yet."""
        values = {key: self.adapted(names, key) for key in self._fastpeft.adapters[names[0]].each}
        unread = set(values)
        mine = {(id(self), key): (value, unread) for key, value in values.items()}
        with scoped(_in_place, {**(_in_place.get() or {}), **mine}):
            yield unread

    def __getattr__(self, key: str):
        value = super().__getattr__(key)
        found = (_in_place.get() or {}).get((id(self), key))
        if found is None:
            return value
        found[1].discard(key)
        return found[0]
