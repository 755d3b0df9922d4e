"""An exception at a chosen line of the library, as Ctrl-C may raise one anywhere, and what a model then is."""

import dis
import linecache
import os
import sys
import types
from collections.abc import Callable

import torch
from torch import nn

import fastpeft
from fastpeft import calls, dispatch, selection
from fastpeft.tuners.layer import LayerState

ROOT = os.path.dirname(os.path.abspath(fastpeft.__file__)) + os.sep
LOAD_CONST = bytes([dis.opmap["LOAD_CONST"]])
SILENT = {dis.opmap[name] for name in ("NOP", "PUSH_EXC_INFO") if name in dis.opmap}
Place = tuple[str, int, str]  # file, line, function


class Interrupted(KeyboardInterrupt):
    """Raised at a line, where a user's Ctrl-C would be."""


class _Lines:
    """A trace function that sees the lines executed inside the package, and may raise at one of them."""

    def __init__(self, at: int | None = None):
        self.at, self.seen = at, []

    def __call__(self, frame, event, arg):
        return self.inside if frame.f_code.co_filename.startswith(ROOT) else None

    def inside(self, frame, event, arg):
        if event == "line" and _may_raise(frame):
            self.seen.append((frame.f_code.co_filename[len(ROOT) :], frame.f_lineno, frame.f_code.co_name))
            if len(self.seen) == self.at:
                sys.settrace(None)
                raise Interrupted(f"{self.seen[-1]}")
        return self.inside


def _may_raise(frame) -> bool:
    """Two things are lines to a trace, and yet nothing is ever raised there: `try:`, which does nothing, and the end of
    a `with` block, which calls __exit__(None, None, None) at once."""
    code, at = frame.f_code.co_code, frame.f_lasti
    for start in (at, at + 2):
        first, second, third = (code[start + step : start + step + 2] for step in (0, 2, 4))
        if first == second == third and first[:1] == LOAD_CONST and frame.f_code.co_consts[first[1]] is None:
            return False
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() != "try:"


def interrupted_in(code: types.CodeType, action: Callable, at: int) -> bool:
    """Call `action`, with an Interrupted before the instruction number `at`, from 1 up, that frames of `code` execute,
    but for those at which Python looks for no signal; whether there was one."""
    seen = 0

    def inside(frame, event, arg):
        nonlocal seen
        if event == "opcode" and code.co_code[frame.f_lasti] not in SILENT:
            seen += 1
            if seen == at:
                sys.settrace(None)
                raise Interrupted(f"instruction {frame.f_lasti}, line {frame.f_lineno}")
        return inside

    def entered(frame, event, arg):
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        return inside

    try:
        _traced(entered, action)
    except Interrupted:
        return True
    return False


def lines_of(action: Callable) -> list[Place]:
    """The lines inside the package that a call of `action` executes, one after the other."""
    tracer = _Lines()
    _traced(tracer, action)
    return tracer.seen


def interrupted(action: Callable, at: int) -> bool:
    """Call `action`, with an Interrupted at its line number `at`, from 1 up; whether it came out."""
    try:
        _traced(_Lines(at), action)
    except Interrupted:
        return True
    return False


def _traced(tracer: Callable, action: Callable) -> None:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        action()
    finally:
        sys.settrace(before)


def telling(places: list[Place]) -> list[int]:
    """The numbers, from 1 up, of the lines at which an interruption may tell something of its own: each line the first,
    the second and the last time."""
    times: dict[Place, list[int]] = {}
    for number, place in enumerate(places, 1):
        times.setdefault(place, []).append(number)
    return sorted({number for each in times.values() for number in (*each[:2], each[-1])})


def spread(numbers: list[int], count: int) -> list[int]:
    """So many of them, evenly, the first and the last among them."""
    if count >= len(numbers):
        return numbers
    return sorted({numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count)})


def portrait(model: nn.Module) -> dict:
    """What a model is, in values that compare between two models made alike: classes, children, hooks, modes, tensors,
    and what it knows of its adapters."""
    out = {}
    for path, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        out[f"module {path}"] = (type(module), tuple(module._modules), module.training, hooks)
        layer = module.__dict__.get("_fastpeft")
        if isinstance(layer, LayerState):
            out[f"layer {path}"] = (tuple(layer.adapters), tuple(layer.kept), tuple(layer.unmerged))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        out[f"tensor {name}"] = (tensor.dtype, tensor.requires_grad, _bits(tensor))
    out["attention"] = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if (state := model.__dict__.get("_fastpeft")) is not None:
        out["adapters"] = tuple(state.configs), state.active, state.trainable, state.merged, tuple(state.parts)
        out["sets"] = frozenset(state.thawed), frozenset(state.quirky), frozenset(state.in_place), state.undo is None
    return out


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def unlike(first: dict, second: dict) -> list[str]:
    """Where two portraits differ."""
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def left_behind() -> list[str]:
    """What of this thread's choices is not as when nothing has been called."""
    found = {
        "selection": selection._overrides.get(),
        "backend": dispatch._context.get(),
        "plan": dispatch._plan.get(),
        "calls": calls._current.get(),
    }
    return [f"{name}: {value!r}" for name, value in found.items() if value]
