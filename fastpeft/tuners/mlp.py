"""Gated MLPs whose projections are adapted, each as one op (`fastpeft.ops.lora_mlp`).

A module that computes down(act(gate(x))·up(x)) (`fastpeft.tuners.gated_mlp`) is kept, and its class is swapped for a
subclass whose forward asks, call by call, whether all of it is the op's: one adapter in each adapted projection, plain
products of frozen dense weights, and no hook, nor any forward of an instance's own, on what would not be called. If
not, the forward of its own class runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastpeft.dispatch import MAX_RANK
from fastpeft.distributed import give_class, is_apart, own_class, own_weight
from fastpeft.ops._autocast import autocast_dtype
from fastpeft.ops.lora_mlp import Projection, apply_lora_mlp
from fastpeft.tuners.gated_mlp import GatedMlp, Read, activation_of, gated_mlp_of, is_as_read
from fastpeft.tuners.layer import AdapterLayer, give_back_forward, patched_class
from fastpeft.tuners.siblings import projection_of

KEY = "_fastpeft_mlp"  # where a module remembers its Found
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Found:
    """What was read from a module's class and its activation, and from which, so that it is read again if these, or the
    attributes that their forwards go by, are others; structure and activation are None where the module has become
    something else. recompute: as `lora_mlp`'s."""

    def __init__(self, original: type, recompute: bool):
        self.original, self.recompute = original, recompute
        self.structure: GatedMlp | None = None
        self.activation: str | None = None
        self.of: tuple = ()
        self.read: tuple[Read, Read] = {}, {}  # of the module, of the activation

    def look(self, module: nn.Module) -> bool:
        """Whether the module is a gated MLP with a known activation now."""
        act = self.structure.act if self.structure is not None else None
        now = self._of(module._modules.get(act) if isinstance(act, str) else act)
        same = self.of and all(a is b for a, b in zip(now, self.of, strict=True))
        if not (same and all(map(is_as_read, (module, now[1]), self.read))):
            if torch.compiler.is_compiling():
                return False
            self._read(module)
        return self.activation is not None

    def _of(self, act: Callable[[Tensor], Tensor] | None) -> tuple:
        return self.original.forward, act, getattr(type(act), "forward", None)

    def _read(self, module: nn.Module) -> None:
        read: tuple[Read, Read] = {}, {}
        self.structure, self.activation = gated_mlp_of(module, self.original, read[0]), None
        act = None if self.structure is None else self.structure.act
        act = module._modules.get(act) if isinstance(act, str) else act
        if act is not None:
            self.activation = activation_of(act, read[1])
        self.of, self.read = self._of(act), read


class FusedMlp:
    """A gated MLP that is one op in the calls that the op knows."""

    prefix = "Fused"
    behind: tuple[type, ...] = ()
    __reduce_ex__ = AdapterLayer.__reduce_ex__

    def forward(self, *args, **kwargs):
        found: Found = self.__dict__[KEY]
        projections = _projections(self, found, *args) if len(args) == 1 and not kwargs else None
        if projections is None:
            return found.original.forward(self, *args, **kwargs)
        backend = next(each.backend() for each in _children(self, found) if hasattr(each, "backend"))
        settings = {"recompute": found.recompute, "patched_backend": backend}
        return apply_lora_mlp(args[0], *projections, found.activation, **settings)


def _children(module: nn.Module, found: Found) -> list[nn.Module]:
    """Those that are gate, up and down."""
    return [module._modules[name] for name in found.structure[:3]]


def _projections(module: nn.Module, found: Found, x) -> list[Projection] | None:
    """What the op computes of this call; None if it does not."""
    if not isinstance(x, Tensor) or x.ndim == 0 or _has_any_global_hook() or not found.look(module):
        return None
    children = _children(module, found)
    if any(map(_is_watched, (*children, *(each for each in found.of[1:] if isinstance(each, nn.Module))))):
        return None
    projections = []
    for child in children:
        projection = _projection(child)
        if projection is None or not _fits(projection, x):
            return None
        projections.append(projection)
    gate, up, down = projections
    adapted = any(each.lora_A is not None for each in projections)
    widths = gate.weight.shape == up.weight.shape and down.weight.shape[1] == gate.weight.shape[0]
    return projections if adapted and widths and gate.weight.shape[1] == x.shape[-1] else None


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module is more than its class's forward."""
    own = module.__dict__
    return "forward" in own or "_hf_hook" in own or any(own[name] for name in HOOKS)


def _is_adapted(child: nn.Module) -> bool:
    """Not asked of the instance, as a wrapper (FullyShardedDataParallel, a checkpoint), whose own call is needed,
    answers with what it wraps."""
    return hasattr(type(child), "lone_adapter")


def _projection(child: nn.Module) -> Projection | None:
    if _is_adapted(child):
        name = child.lone_adapter()
        if name is None or not child.plain_base():
            return None
        a, b = child.factors(name)
        return None if is_apart(a) or is_apart(b) or a.shape[0] > MAX_RANK else projection_of(child, name)
    weight = own_weight(child)
    if type(child).forward is not nn.Linear.forward or type(weight) not in (nn.Parameter, Tensor):
        return None
    return Projection(weight, child.bias)


def _fits(projection: Projection, x: Tensor) -> bool:
    """Whether the op takes a weight for x, frozen and in its dtype."""
    weight = projection.weight
    same = weight.dtype == x.dtype or autocast_dtype(x) is not None
    frozen = not weight.requires_grad or not torch.is_grad_enabled()
    return same and frozen and weight.device == x.device and weight.is_floating_point()


def words_by_path(model: nn.Module) -> dict[str, str]:
    """For a report: of the projections whose MLP is one op, as adapters are chosen now, what it is and does."""
    words = {}
    for path, module in model.named_modules():
        found: Found | None = module.__dict__.get(KEY)
        if found is None or not found.look(module) or not all(map(_is_one_of_the_op, _children(module, found))):
            continue
        names = found.structure[:3]
        said = f"; {', '.join(names)} as one op, predicted to pay on GPUs"
        if found.recompute:
            said += ", with gate(x) and up(x) computed once more in backward"
        words |= {f"{path}.{name}".lstrip("."): said for name in names}
    return words


def _is_one_of_the_op(child: nn.Module) -> bool:
    return not _is_adapted(child) or (child.lone_adapter() is not None and child.plain_base())


def join_mlps(model: nn.Module, recompute: bool) -> None:
    """Let gated MLPs with an adapted projection be one op, those that are one already by this `recompute` too."""
    for module in list(model.modules()):
        if KEY in module.__dict__:
            module.__dict__[KEY].recompute = recompute
            continue
        if "forward" in module.__dict__:
            continue
        if not any(map(_is_adapted, module.children())):
            continue
        found = Found(own_class(module), recompute)
        if not found.look(module) or not any(map(_is_adapted, _children(module, found))):
            continue
        module.__dict__[KEY] = found
        give_class(module, patched_class(FusedMlp, found.original))


def part_mlps(model: nn.Module) -> None:
    """Undo `join_mlps`, as far as it went."""
    for module in model.modules():
        found = module.__dict__.get(KEY)
        if found is not None:
            if isinstance(module, FusedMlp):
                give_back_forward(module, found.original, None)
            del module.__dict__[KEY]
