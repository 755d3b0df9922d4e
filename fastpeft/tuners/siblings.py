"""Projections of one module that read one tensor (q, k and v of attention; gate and up of an MLP) as one op.

Which do is not looked up by name but seen: the first call of their parent is watched, and those that were called one
after the other with the same tensor object are a run. From then on the first of a run computes all of it, and the
others find their results there, each if it is called with that very tensor, unchanged. Whenever something is
otherwise (a hook that changes an input, an adapter that only some of them have, a projection that is not called), each
computes by itself as without all this.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastpeft.dispatch import MAX_RANK
from fastpeft.distributed import check_gathered
from fastpeft.ops.lora_projections import Projection, apply_lora_projections

KEY = "_fastpeft_siblings"  # where a projection remembers its Siblings
PATIENCE = 3  # parents' calls that may turn out otherwise than those before, until nothing is expected of them any more


class Siblings:
    """The projections of one parent. runs: of each run's first the whole of it; None until a call was watched."""

    def __init__(self, members: Sequence[nn.Module]):
        self.members = list(members)
        self.runs: dict[nn.Module, list[nn.Module]] | None = None
        self.surprises = 0
        self.calls: dict[int, list] = {}  # thread -> what of its parent's call is going on, see `_Watched`, `_Ahead`

    def __getstate__(self) -> dict:
        return {**self.__dict__, "calls": {}}

    def result(self, layer: nn.Module, name: str, x: Tensor) -> Tensor | None:
        """What `layer`, whose adapter `name` a call uses, gives for x, if it is computed as one of a run."""
        if self.surprises > PATIENCE:
            return None
        tracing = torch.compiler.is_dynamo_compiling()
        here = 0 if tracing else threading.get_ident()
        if self.runs is None:
            if not tracing:
                self.calls.setdefault(here, []).append((layer, x))
            return None
        ahead = self.calls.get(here)
        if ahead is not None and layer in ahead[-1]:
            *taken_for, results = ahead
            found = results.pop(layer)
            if taken_for[0] is x and taken_for[1:] == _circumstances(x, tracing) and found[0] == name:
                return found[1]
            self._surprised(here)
            return None
        run = self.runs.get(layer)
        return None if run is None else self._compute(run, x, here, tracing)

    def _compute(self, run: list[nn.Module], x: Tensor, here: int, tracing: bool) -> Tensor | None:
        names = [_lone_adapter(each) for each in run]
        usable = [(each, name) for each, name in zip(run, names, strict=True) if name is not None]
        if len(usable) < 2 or usable[0][0] is not run[0]:
            return None
        projections = [projection_of(each, name) for each, name in usable]
        if not all(_fits(each, x) for each in projections):
            return None
        backend = run[0].backend()
        first, *others = apply_lora_projections(x, projections, backend)
        results = {each: (name, y) for (each, name), y in zip(usable[1:], others, strict=True)}
        self.calls[here] = [x, *_circumstances(x, tracing), results]
        return first

    def ended(self, parent: nn.Module, args, output) -> None:
        """After a call of the parent, of which `output` is None if it was broken off: nothing of it is kept."""
        record = self.calls.pop(0 if torch.compiler.is_dynamo_compiling() else threading.get_ident(), None)
        if record is None or output is None:
            return
        if self.runs is None:
            self._learn(record)
        elif record[-1]:
            self._surprised(None)

    def _learn(self, record: list[tuple[nn.Module, Tensor]]) -> None:
        runs: list[list] = []
        for layer, x in record:
            if runs and runs[-1][0] is x:
                runs[-1].append(layer)
            else:
                runs.append([x, layer])
        seen = [layer for layer, _ in record]
        if len(set(seen)) < len(seen):  # called twice: which of a run's results would be whose?
            self.surprises += 1
        else:
            self.runs = {run[1]: run[1:] for run in runs if len(run) > 2}

    def _surprised(self, here: int | None) -> None:
        """Watch once more."""
        self.surprises += 1
        self.runs = None
        if here is not None:
            self.calls.pop(here, None)


def _circumstances(x: Tensor, tracing: bool) -> list:
    """What must be the same for a result to be taken later: x's values, and what the results' types and graphs depend
    on. A compiled call's trace is one piece of code."""
    if tracing:
        return []
    version = None if x.is_inference() else x._version
    return [version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)]


def _lone_adapter(layer: nn.Module) -> str | None:
    """The one adapter that a layer's call uses now, where the op can compute it with its base product."""
    find: Callable | None = getattr(layer, "lone_adapter", None)
    return None if find is None or KEY not in layer.__dict__ else find()


def projection_of(layer: nn.Module, name: str) -> Projection:
    """A layer with one adapter, for the op."""
    settings = layer.settings(name)
    a, b = layer.factors(name)
    check_gathered(a, "a factor of LoRA")
    check_gathered(b, "a factor of LoRA")
    bias = layer._bias_with(name, settings)
    return Projection(layer.matrix(), bias, a, b, settings.scaling, layer.dropout_of(name))


def _fits(projection: Projection, x: Tensor) -> bool:
    """Whether the op takes x; if not, the layer itself says why."""
    weight = projection.weight
    same = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    held = projection.lora_A.shape[0] <= MAX_RANK  # beyond, `lora_linear` has slices of ranks, which this op has not
    return x.ndim > 0 and same and held and weight.device == x.device and weight.shape[1] == x.shape[-1]


def join_siblings(model: nn.Module) -> None:
    """Let adapted projections compute together, wherever a module has several of one width."""
    for parent in list(model.modules()):
        members = [child for child in dict.fromkeys(parent.children()) if _can_join(child)]
        widths = [child.width()[1] for child in members]
        members = [each for each, width in zip(members, widths, strict=True) if widths.count(width) > 1]
        if members:
            siblings = Siblings(members)
            parent.register_forward_hook(siblings.ended, always_call=True)
            for each in members:
                each.__dict__[KEY] = siblings


def _can_join(module: nn.Module) -> bool:
    return KEY not in module.__dict__ and hasattr(module, "lone_adapter") and module.is_dense()


def part_siblings(model: nn.Module) -> None:
    """Undo `join_siblings`, as far as it went."""
    for module in model.modules():
        module.__dict__.pop(KEY, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Siblings):
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)
