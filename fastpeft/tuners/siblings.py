"""Projections of one module that read one tensor (q, k and v of attention; gate and up of an MLP) as one op.

Which do is not looked up by name but seen: a call of their parent is watched, and those that were called one after the
other with the same tensor object, unchanged, are a run. From then on the first of a run computes all of it, and the
others find their results there, each if it is called with that very tensor, unchanged. Whenever something is otherwise
(a hook that changes an input, an adapter that only some of them have, a projection that is not called), each computes
by itself as without all this.

A checkpointed segment computes in backward what it computed in forward, tensor for tensor: what is learned in between
waits until no such segment is open, that is, until each was repeated or its graph is gone.
"""

import sys
import threading
from collections import Counter
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fastpeft.dispatch import MAX_RANK
from fastpeft.distributed import is_apart, is_sharded, sharded_by_itself
from fastpeft.ops._autocast import autocast_dtype, is_autocast
from fastpeft.ops.lora_projections import Projection, apply_lora_projections

KEY = "_fastpeft_siblings"  # where a projection remembers its Siblings
PATIENCE = 3  # parents' calls that may turn out otherwise than those before, until nothing is expected of them any more
Runs = dict[nn.Module, list[nn.Module]]  # of each projection that was called, it and what followed it in its run

_threads = threading.local()  # `call`: the parent's call that is going on in a thread


class _Call:
    """One call of a parent, while it goes on. runs: what it goes by, None while it is watched."""

    def __init__(self, of: "Siblings", parent: nn.Module, runs: Runs | None):
        self.of, self.parent, self.runs = of, parent, runs
        self.seen: list[tuple] = []  # (projection, x, its state), in the order of their calls
        self.x: Tensor | None = None
        self.circumstances: list = []
        self.results: dict[nn.Module, tuple[str, Tensor]] = {}  # those computed ahead that nobody has taken yet
        self.surprising = False

    def calls(self, layer: nn.Module) -> bool:
        """Whether it is the parent's own call of the layer, in which nothing but the layer's hooks happens: no wrapper
        (a checkpoint, FullyShardedDataParallel) stands in its place, and `fully_shard` was not called on it."""
        name = self.of.members.get(layer)
        return name is not None and self.parent._modules.get(name) is layer and not sharded_by_itself(layer)


class Siblings:
    """The projections of one parent. runs: what was learned of their calls, None until one was watched. `settled` is
    what those calls go by that may be repeated in backward. open: of these what lives no longer than they can be."""

    def __init__(self, members: dict[nn.Module, str]):
        self.members = members  # and their names in the parent
        self.runs: Runs | None = None
        self.settled: Runs | None = None
        self.open: WeakSet[object] = WeakSet()
        self.surprises = 0
        self.traced: _Call | None = None  # the call that torch.compile is tracing

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "open"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, open=WeakSet())  # no graph of the original's repeats a copy's call

    def began(self, parent: nn.Module, args) -> None:
        """Before a call of the parent. What is left of another (it was interrupted, or this one is inside it) is let
        go of, so that one call's tensors are held, at most."""
        if torch.compiler.is_dynamo_compiling():
            self.traced = _Call(self, parent, self.runs or {})
            return
        before = getattr(_threads, "call", None)
        if before is not None and before.results:
            before.of.surprised()
        _threads.call = _Call(self, parent, self._runs_of_a_call())

    def _runs_of_a_call(self) -> Runs | None:
        if _is_backward():
            return self.settled
        segment = _segment()
        if segment is None:
            return self.runs
        if not self.open:
            self.settled = self.runs
        self.open.add(segment)
        return self.settled

    def ended(self, parent: nn.Module, args, output) -> None:
        """After a call of the parent, of which `output` is None if it was broken off: nothing of it is kept."""
        if torch.compiler.is_dynamo_compiling():
            self.traced = None
            return
        if _is_backward() and not torch._C._autograd._get_current_graph_task_keep_graph():
            node = torch._C._current_autograd_node()
            if isinstance(node, FunctionCtx):  # torch's own nodes have no weak references, and are no segment's
                self.open.discard(node)
        call = getattr(_threads, "call", None)
        if call is None or call.of is not self:
            return
        _threads.call = None
        if output is None:
            return
        if call.surprising or call.results:
            self.surprised()
        elif call.runs is None and call.seen:
            self._learn(call.seen)

    def result(self, layer: nn.Module, name: str, x: Tensor) -> Tensor | None:
        """What `layer`, whose adapter `name` a call uses, gives for x, if it is computed as one of a run."""
        tracing = torch.compiler.is_dynamo_compiling()
        call = self.traced if tracing else getattr(_threads, "call", None)
        if call is None or call.of is not self or not call.calls(layer):
            return None
        if call.runs is None:
            call.seen.append((layer, x, _state(x)))
            return None
        if layer in call.results:
            return self._taken(call, layer, name, x, tracing)
        run = call.runs.get(layer)
        if run is None and not tracing and self.surprises <= PATIENCE:
            self.runs = None  # the adapter in use has more layers than the one before: watch once more
        return None if run is None or len(run) < 2 or call.results else self._compute(call, run, name, x, tracing)

    def _taken(self, call: _Call, layer: nn.Module, name: str, x: Tensor, tracing: bool) -> Tensor | None:
        computed, y = call.results.pop(layer)
        right = call.x is x and computed == name and call.circumstances == _circumstances(x, tracing)
        if not right:
            call.surprising = True
            call.results.clear()
        if not call.results:
            call.x = None
        return y if right else None

    def _compute(self, call: _Call, run: list[nn.Module], name: str, x: Tensor, tracing: bool) -> Tensor | None:
        if call.surprising or run[0].lone_adapter() != name or _is_apart(run[0], name):
            return None
        based = not run[0].plain_base()  # all of one op have their base products from it, or none has
        usable, passed_over = [(run[0], name)], False
        for each in run[1:]:
            other = _lone_adapter(each, based) if call.calls(each) else None
            passed_over = passed_over or other is None
            # Behind one that is called for itself dropout is drawn when its turn comes.
            if other is not None and not (passed_over and each.dropout_of(other)):
                usable.append((each, other))
        projections = [projection_of(*each) for each in usable]
        if len(usable) < 2 or not all(_fits(each, x) for each in projections):
            return None
        if based:
            bases = [each.base_forward(x) for each, _ in usable]
            projections = [each._replace(weight=y) for each, y in zip(projections, bases, strict=True)]
        first, *rest = apply_lora_projections(x, projections, run[0].backend(), based)
        call.x, call.circumstances = x, _circumstances(x, tracing)
        call.results = {each: (other, y) for (each, other), y in zip(usable[1:], rest, strict=True)}
        return first

    def _learn(self, seen: list[tuple]) -> None:
        layers = [layer for layer, *_ in seen]
        if len(set(layers)) < len(layers):  # called twice: which of a run's results would be whose?
            self.surprised()
            return
        runs: Runs = {}
        after = its_x = its_state = None
        for layer, x, state in reversed(seen):
            runs[layer] = [layer, *runs[after]] if its_x is x and _same(state, its_state) else [layer]
            after, its_x, its_state = layer, x, state
        self.runs = runs

    def surprised(self) -> None:
        """Watch once more, or no more."""
        self.surprises += 1
        self.runs = None if self.surprises <= PATIENCE else {}


def _is_backward() -> bool:
    """Whether autograd is running, so that a call of a module is a checkpointed segment's second."""
    return torch._C._current_graph_task_id() != -1


def _segment() -> object | None:
    """Of a checkpointed segment's first call, what lives as long as the segment can be repeated: under checkpoint's
    hooks, that which the tensors saved in it are unpacked by; inside the forward of an autograd.Function (reentrant,
    DeepSpeed's), which nothing tells but the stack, the outermost one's context, a node of the graph. None of another
    call."""
    if torch.is_grad_enabled():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        checkpoint = hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"
        return hooks[1] if checkpoint else None
    found, frame = None, sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            context = frame.f_locals.get("ctx")
            found = context if isinstance(context, FunctionCtx) else found
        frame = frame.f_back
    return found


def _state(x: Tensor) -> int | Tensor:
    """By which a change of x is seen: tensors of inference mode have no versions."""
    return x.detach().clone() if x.is_inference() else x._version


def _same(first: int | Tensor | None, second: int | Tensor | None) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and first == second


def _circumstances(x: Tensor, tracing: bool) -> list:
    """What must be the same for a result to be taken later: x's values, and what the results' types and graphs depend
    on. A compiled call's trace is one piece of code."""
    if tracing:
        return []
    version = None if x.is_inference() else x._version
    return [version, torch.is_grad_enabled(), is_autocast(x)]


def _lone_adapter(layer: nn.Module, based: bool) -> str | None:
    """The one adapter that a layer's call will use, where the op can compute it, `based` on the layer's own product or
    with it; what its hooks do before a call (gather a weight, change an input) is not done yet."""
    if KEY not in layer.__dict__ or not hasattr(layer, "lone_adapter") or layer._forward_pre_hooks:
        return None
    name = layer.lone_adapter()
    return None if name is None or layer.plain_base() is based or _is_apart(layer, name) else name


def _is_apart(layer: nn.Module, name: str) -> bool:
    """Whether an adapter's matrices were sharded by themselves, which the layer's own call says in words."""
    return any(map(is_apart, layer.factors(name)))


def projection_of(layer: nn.Module, name: str) -> Projection:
    """A layer with one adapter, for the op; without a weight where the layer has its base product for itself."""
    settings = layer.settings(name)
    base = (layer.matrix(), layer._bias_with(name, settings)) if layer.plain_base() else (None, None)
    return Projection(*base, *layer.factors(name), float(settings.scaling), layer.dropout_of(name))


def _fits(projection: Projection, x: Tensor) -> bool:
    """Whether the op takes x; if not, the layer itself says why."""
    weight, a = projection.weight, projection.lora_A
    same = weight is None or weight.dtype == x.dtype or autocast_dtype(x) is not None
    held = a.shape[0] <= MAX_RANK  # beyond, `lora_linear` has slices of ranks, which this op has not
    reads = a if weight is None else weight
    return x.ndim > 0 and same and held and reads.device == x.device and reads.shape[-1] == x.shape[-1]


def in_words(layer: nn.Module) -> str:
    """For a report: with which others a layer is one op; nothing if it is none."""
    siblings: Siblings | None = layer.__dict__.get(KEY)
    if siblings is None:
        return ""
    words = _run_in_words(siblings, siblings.runs, layer)
    settled = _run_in_words(siblings, siblings.settled or {}, layer)
    if siblings.open and settled != words:
        words += f"; while the backward of a checkpointed call is to come, such calls{settled or ' layer by layer'}"
    return words


def _run_in_words(siblings: Siblings, runs: Runs | None, layer: nn.Module) -> str:
    if runs is None:
        return "; one op with its neighbours if a call shows that they read one tensor"
    run = max((run for run in runs.values() if layer in run), key=len, default=[layer])
    names = ", ".join(siblings.members[each] for each in run)
    return f"; {names} as one op, predicted to pay on GPUs" if len(run) > 1 else ""


def join_siblings(model: nn.Module) -> None:
    """Let adapted projections compute together, wherever a module has several of one width."""
    for parent in list(model.modules()):
        members = {child: name for name, child in parent.named_children() if _can_join(child)}
        widths = Counter(map(_inputs, members))
        members = {child: name for child, name in members.items() if widths[_inputs(child)] > 1}
        if all(KEY in each.__dict__ for each in members):
            continue
        _part(parent)
        siblings = Siblings(members)
        parent.register_forward_pre_hook(siblings.began)
        parent.register_forward_hook(siblings.ended, always_call=True)
        for each in members:
            each.__dict__[KEY] = siblings


def _can_join(module: nn.Module) -> bool:
    """Not asked of the instance, as a wrapper answers with what it wraps."""
    if not hasattr(type(module), "lone_adapter"):
        return False
    return module.is_dense() or module.has_own_product() or is_sharded(getattr(module, "weight", None))


def _inputs(layer: nn.Module) -> tuple[int, ...]:
    """(K,), or () for a part of a flat parameter, whose width its next call will show."""
    return layer.width()[1:]


def part_siblings(model: nn.Module) -> None:
    """Undo `join_siblings`, as far as it went."""
    for module in model.modules():
        module.__dict__.pop(KEY, None)
        _part(module)


def _part(parent: nn.Module) -> None:
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Siblings):
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)
