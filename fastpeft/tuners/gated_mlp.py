"""Which modules compute down(act(gate(x))·up(x)) and nothing else, read from what their class's forward does.

The forward is run once on a symbol in the place of its input, with the children as leaves, and the graph that results
is compared: no names of models, no names of children. What branches on values, keeps state, or does anything beside
(dropout between, a cast, a second input) has another graph, or none. What the forward, and that of the activation, go
by beside their input (a factor that is None, `self.training`) is written down, to be compared later.
"""

import copy
import functools
import inspect
import operator
from collections.abc import Callable
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastpeft.ops.lora_mlp import ACTIVATIONS, activation_reference

# Where an activation is compared with those that are known: in float64, at what is large, small, and in between.
PROBE = (-1e3, -50.0, *(step / 8 for step in range(-80, 81)), 50.0, 1e3, 1e-30, -1e-30)
MULTIPLICATIONS = (operator.mul, torch.mul, torch.multiply)
CONSTANT = (bool, int, float, complex, str, bytes, NoneType, Enum, torch.dtype, torch.device, type)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, functools.partial)
ORDINARY = frozenset(vars(nn.Module()))  # attributes that every module has
Read = dict[str, Any]  # attributes that a forward went by, with their values, or `Missing`


class Missing:
    """In the place of an attribute that was not there."""


def is_as_read(module: nn.Module, read: Read) -> bool:
    """Whether a forward that went by these attributes of the module would find them again."""
    return all(_same(getattr(module, name, Missing), value) for name, value in read.items())


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, CONSTANT + FUNCTIONS) and a == b)


def _lasts(value: Any, module: nn.Module) -> bool:
    """Whether an attribute of the module that is the same later has not changed within."""
    owner = getattr(value, "__self__", None)
    if isinstance(value, FUNCTIONS):
        return owner is module or isinstance(owner, type | ModuleType | NoneType)
    return isinstance(value, CONSTANT)


class GatedMlp(NamedTuple):
    """The names of a module's children gate, up and down, called in this order, and of its activation module, or the
    function that the forward calls in its place."""

    gate: str
    up: str
    down: str
    act: str | Callable[[Tensor], Tensor]


class _Stand:
    """In the place of `self` in a forward: attributes are the module's, and are written down, but a child when it is
    called becomes a node of the graph, and methods see this in the place of the module too."""

    def __init__(self, module: nn.Module, read: Read, graph: Graph, tracer: GraphAppendingTracer):
        self.__dict__.update(_module=module, _read=read, _graph=graph, _tracer=tracer)

    def __getattr__(self, name: str):
        module = self._module
        if name in module._modules:
            return self._leaf(name)
        value = self._read[name] = getattr(module, name, Missing)
        if value is Missing:
            raise AttributeError(f"there is no {name}")
        if not _lasts(value, module):
            raise TypeError(f"a forward that goes by {name}, which may change within")
        return MethodType(value.__func__, self) if getattr(value, "__self__", None) is module else value

    def __setattr__(self, name: str, value):
        raise AttributeError(f"a forward that sets {name} keeps state")

    def _leaf(self, name: str):
        def call(x: Proxy) -> Proxy:
            return Proxy(self._graph.create_node("call_module", name, (x.node,), {}), self._tracer)

        return call


def _graph_of(module: nn.Module, cls: type, read: Read) -> Graph | None:
    """Of the class's forward; None if it takes more than one input or does not run on a symbol."""
    parameters = list(inspect.signature(cls.forward).parameters.values())
    if len(parameters) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    graph = Graph()
    tracer = GraphAppendingTracer(graph)
    x = Proxy(graph.placeholder("x"), tracer)
    try:
        result = cls.forward(_Stand(module, read, graph, tracer), x)
    except Exception:  # whatever a forward of somebody else's raises on a symbol: it is none of these
        return None
    if not isinstance(result, Proxy):
        return None
    graph.output(result.node)
    return graph


def gated_mlp_of(module: nn.Module, cls: type | None = None, read: Read | None = None) -> GatedMlp | None:
    """The structure that the forward of its class, or of `cls`, gives to a module; None if it has another. `read` is
    given what the forward goes by."""
    if len(module._modules) < 3:
        return None
    graph = _graph_of(module, cls or type(module), {} if read is None else read)
    nodes = [] if graph is None else list(graph.nodes)
    if len(nodes) != 7:  # x, gate, act, up, their product, down, output
        return None
    x, product, down = nodes[0], nodes[-3], nodes[-2]
    if not (_is_call_of(down, product) and _multiplies(product)):
        return None
    for act, up in (product.args, product.args[::-1]):
        gate = act.args[0] if _is_activation(act) else None
        if gate is None or not (_is_call_of(gate, x) and _is_call_of(up, x)):
            continue
        if nodes.index(gate) < nodes.index(up) and len({gate.target, up.target, down.target, act.target}) == 4:
            return GatedMlp(gate.target, up.target, down.target, _function_of(act))
    return None


def _is_call_of(node: Node, argument: Node) -> bool:
    return node.op == "call_module" and node.args == (argument,) and not node.kwargs


def _multiplies(node: Node) -> bool:
    both = len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args) and not node.kwargs
    by = (
        node.op == "call_function"
        and node.target in MULTIPLICATIONS
        or (node.op, node.target) == ("call_method", "mul")
    )
    return both and by


def _is_activation(node: Node) -> bool:
    return node.op in ("call_module", "call_function") and len(node.args) == 1 and isinstance(node.args[0], Node)


def _function_of(act: Node) -> str | Callable[[Tensor], Tensor]:
    return act.target if act.op == "call_module" else functools.partial(act.target, **act.kwargs)


def activation_of(act: Callable[[Tensor], Tensor], read: Read | None = None) -> str | None:
    """Which of `lora_mlp`'s activations a module or a function computes; None if none of them. `read` is given what a
    module's forward goes by."""
    if not isinstance(act, nn.Module):
        return _compared(act)
    if act._modules or next(act.parameters(), None) is not None or next(act.buffers(), None) is not None:
        return None
    names: set[str] = set()
    found = _compared(lambda x: _watched(act, names)(x))
    gone_by = {name: getattr(act, name, Missing) for name in sorted(names)}
    if read is not None:
        read.update(gone_by)
    return found if all(_lasts(value, act) for value in gone_by.values()) else None


def _watched(act: nn.Module, names: set[str]) -> nn.Module:
    """A copy, which writes down which attributes it is asked for, beside those that every module has."""

    def asked(self, name: str):
        if name == "training" or not (name in ORDINARY or hasattr(nn.Module, name)):
            names.add(name)
        return super(kind, self).__getattribute__(name)

    other = copy.deepcopy(act)
    kind = other.__class__ = type(type(act).__name__, (type(act),), {"__getattribute__": asked})
    return other


def _compared(act: Callable[[Tensor], Tensor]) -> str | None:
    probe = torch.tensor(PROBE, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            found = act(probe.clone())
        except Exception:  # an activation that is not a function of one tensor, on the CPU, in float64
            return None
        if not isinstance(found, Tensor) or found.shape != probe.shape or found.dtype != probe.dtype:
            return None
        for name in ACTIVATIONS:
            if torch.allclose(found, activation_reference(name, probe), rtol=1e-12, atol=1e-14):
                return name
    return None
