"""What an op's own Python costs, in microseconds: `lora_linear` and a patched layer around it with kernels that compute
nothing, beside a bare torch.autograd.Function of the same tensors, which is the least there is.

    python -m benchmarks.overhead [--calls N]

In a loop of nothing else, and cold: between large products, as in a step on a CPU, where the interpreter's code and
objects have left the caches each time and cost ten times as much. And on the Triton path, by the plans that a GPU has
where no table knows better, of a batch x (B, S, K), with launches and vendor's products that compute nothing, and
without what Triton's own launcher takes: there beside two Functions that have as many arguments, save the same and make
the same allocations and launches with everything known before. `plain` is as one writes it, with torch.empty and
kernel[grid](...); `least` allocates as torch's compiled code does and has bound what does not change. `own` is what a
call takes beyond the least where it runs a program (`fastpeft.ops._programs`), `first` what the first of calls alike
does, which finds everything out.
"""

import argparse
import contextlib
import functools
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft import dispatch
from fastpeft.info import cpu_name
from fastpeft.ops import _programs
from fastpeft.ops._quick_tensors import quick_empty

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its path serves CPU tensors then

CALLS, REPEATS = 2000, 7
COLD_CALLS = 40
ROWS, WIDTH, RANK = 6, 8, 4
FEW, SHARED = (2, 8, 32), (2, 10, 40)  # of x for kernels: one program has all, or several a share of every sum
PLANS = {16: dispatch.SHORT, 20: dispatch.PREWRITE}


class Bare(torch.autograd.Function):
    """Saves what `lora_linear` saves, and gives what it is given."""

    @staticmethod
    def forward(ctx, y, x, weight, bias, a, b, s):
        ctx.save_for_backward(x, weight, a, b, s, None)
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s, _ = ctx.saved_tensors
        return None, x, None, None, a, b, None


def empty_kernels(y: torch.Tensor, s: torch.Tensor):
    """Within it the torch path of `lora_linear` gives these and computes nothing."""
    path = importlib.import_module("fastpeft.ops._lora_linear_torch")
    return mock.patch.multiple(
        path,
        forward=lambda *arguments: (y.detach(), s),
        grad_b_and_t=lambda dy, s, b, scale, need_b, need_t: (b, s),
        grad_a_and_x=lambda dy, x, t, weight, a, *rest: (a, x),
    )


def cases() -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """name -> (a forward, what wants a gradient of it); of `empty_kernels`."""
    apply_lora = importlib.import_module("fastpeft.ops.lora_linear").apply_lora
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    layer = fastpeft.patch(nn.Sequential(nn.Linear(WIDTH, WIDTH)), fastpeft.LoraConfig(r=RANK, target_modules=["0"]))[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, bias = layer.weight, layer.bias
    y, s = torch.randn(ROWS, WIDTH), torch.randn(ROWS, RANK)
    wanted = [x, a, b]
    return {
        "a bare Function": (lambda: Bare.apply(y, x, weight, bias, a, b, s), wanted),
        "lora_linear": (lambda: apply_lora(x, weight, bias, None, a, b, 2.0, 0.0), wanted),
        "a patched layer": (lambda: layer(x), wanted),
    }


def no_linear(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)


def no_matmul(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.empty(p.shape[0], q.shape[1], dtype=p.dtype)


def no_addmm_(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return out


@contextlib.contextmanager
def empty_launches(steps: list | None = None):
    """Within it ops take the Triton path as on a GPU, no product is computed, and a launch joins `steps` at most."""
    from triton.runtime.interpreter import InterpretedFunction

    def launcher(kernel, grid):
        if steps is None:
            return lambda *arguments, **options: None
        return lambda *arguments, **options: steps.append((kernel, grid, arguments, options))

    cpu = importlib.import_module("fastpeft.ops._cpu_products")
    with (
        fastpeft.backend("triton"),
        mock.patch.object(InterpretedFunction, "__getitem__", launcher),
        mock.patch.object(dispatch, "predicted_lora_plan", lambda device, rows: PLANS[rows]),
        mock.patch.object(cpu, "lacks_half", lambda dtype: False),  # a CPU's ways round that are no GPU's
        mock.patch.object(torch.nn.functional, "linear", no_linear),
        mock.patch.multiple(torch.Tensor, __matmul__=no_matmul, addmm_=no_addmm_),
    ):
        yield


aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.empty_like.default}
SHAPES = {aten.t.default, aten.as_strided.default, aten.unbind.int, aten.view.default, aten.detach.default}
SHAPES |= {aten.resize_.default}


class Allocation(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Recorded(TorchDispatchMode):
    """Within it what torch allocates joins `steps`, in order; of anything but shapes beside that it knows nothing."""

    def __init__(self, steps: list):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.steps.append(Allocation(tuple(out.shape), out.stride(), out.dtype))
        elif func not in SHAPES:  # which are known before
            raise AssertionError(f"{func} is neither allocation nor shape")
        return out


class Steps(NamedTuple):
    """What an action launches and allocates, in order, to be done again, which gives what the action did: as one writes
    it, and with the least of Python. What else the steps give is there together with it, as what an op makes is."""

    plain: Callable[[], tuple[torch.Tensor, ...]]
    least: Callable[[], tuple[torch.Tensor, ...]]
    launches: int


def steps_of(action: Callable[[], object]) -> Steps:
    steps, places = [], []
    with empty_launches(steps), Recorded(steps):
        found = action()
    for result in [found] if isinstance(found, torch.Tensor) else found:
        free = (place for place in range(len(steps)) if place not in places)
        place = next((place for place in free if _may_be(steps[place], result)), None)
        if place is None:  # a part of a buffer
            place = len(steps)
            steps.append(result.detach())
        else:
            steps[place] = Allocation(tuple(result.shape), result.stride(), result.dtype)
        places.append(place)
    launches = sum(not isinstance(step, (Allocation, torch.Tensor)) for step in steps)
    return Steps(_written(steps, places, _plain_line), _written(steps, places, _least_line), launches)


def _may_be(step, result: torch.Tensor) -> bool:
    """Whether what is allocated is the result, maybe in another shape."""
    return isinstance(step, Allocation) and (math.prod(step.shape), step.dtype) == (result.numel(), result.dtype)


def _written(steps: list, places: list[int], line_of: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that does the steps, and gives those in `places`."""
    scope = {"torch": torch, "empty": quick_empty("cpu")}
    lines = [
        line_of(place, step, scope) if not isinstance(step, torch.Tensor) else f"made_{place} = given_{place}.detach()"
        for place, step in enumerate(steps)
    ]
    scope |= {f"given_{place}": step for place, step in enumerate(steps) if isinstance(step, torch.Tensor)}
    body = "\n    ".join([*lines, f"return {', '.join(f'made_{place}' for place in places)},"])
    exec(f"def again():\n    {body}", scope)
    return scope["again"]


def _plain_line(place: int, step, scope: dict) -> str:
    if isinstance(step, Allocation):
        return f"made_{place} = torch.empty({step.shape}, dtype={step.dtype}, device='cpu')"
    kernel, grid, arguments, options = step
    scope |= {f"kernel_{place}": kernel, f"given_{place}": arguments}
    scope |= {f"{name}_{place}": value for name, value in options.items()}
    return f"kernel_{place}[{grid}](*given_{place}, {', '.join(f'{name}={name}_{place}' for name in options)})"


def _least_line(place: int, step, scope: dict) -> str:
    if isinstance(step, Allocation):
        return f"made_{place} = empty({step.shape}, {step.strides}, {step.dtype})"
    kernel, grid, arguments, options = step
    scope |= {f"launch_{place}": functools.partial(kernel[grid], **options), f"given_{place}": arguments}
    return f"launch_{place}(*given_{place})"


class Known(torch.autograd.Function):
    """Does what it is told in forward and in backward, saves what it is told, and gives what comes of it."""

    @staticmethod
    def forward(ctx, known, *tensors):
        forward, _, saved, _ = known
        outs = forward()
        ctx.save_for_backward(*saved)
        ctx.known = known
        return outs

    @staticmethod
    def backward(ctx, *dys):
        _ = ctx.saved_tensors
        _, backward, _, others = ctx.known
        return None, *backward(), *others


def cases_on_kernels() -> dict[str, tuple[Callable, list[torch.Tensor], list[torch.Tensor]]]:
    """name -> (a forward, what wants a gradient of it, gradients of its results); of `empty_launches`."""
    ops = {name: importlib.import_module(f"fastpeft.ops.{name}") for name in ("lora_linear", "lora_projections")}
    mlp = importlib.import_module("fastpeft.ops.lora_mlp")
    half, cases = dict(dtype=torch.float16), {}
    for words, shape in (("", SHARED), (", few rows", FEW)):
        x, width = torch.randn(shape, requires_grad=True, **half), shape[-1]
        dys = [torch.randn(shape, **half) for _ in range(3)]
        weights = [torch.randn(width, width, **half) for _ in range(3)]
        a = [torch.randn(RANK, width, requires_grad=True, **half) for _ in range(3)]
        b = [torch.randn(width, RANK, requires_grad=True, **half) for _ in range(3)]
        each = zip(weights, a, b, strict=True)
        three = [ops["lora_linear"].Projection(weight, None, *adapter, 2.0, 0.0) for weight, *adapter in each]
        one, wanted = (x, weights[0], None, None, a[0], b[0], 2.0, 0.0), [x, *a, *b]
        cases |= {
            "lora_linear" + words: (functools.partial(ops["lora_linear"].apply_lora, *one), [x, a[0], b[0]], dys[:1]),
            "three projections" + words: (
                functools.partial(ops["lora_projections"].apply_lora_projections, x, three), wanted, dys
            ),
            "a gated MLP" + words: (functools.partial(mlp.apply_lora_mlp, x, *three, "silu"), wanted, dys[:1]),
        }  # fmt: skip
    return cases


def microseconds(actions: list[Callable[[], object]], calls: int = CALLS, repeats: int = REPEATS) -> list[float]:
    """Of one call of each: the least of the repeats, which nothing has disturbed. They take turns, so that what slows
    the machine for a while slows them all."""
    best = [float("inf")] * len(actions)
    for _ in range(repeats):
        for number, action in enumerate(actions):
            start = time.process_time()
            for _ in range(calls):
                action()
            best[number] = min(best[number], time.process_time() - start)
    return [seconds / calls * 1e6 for seconds in best]


def cold_microseconds(action: Callable[[], object], calls: int = COLD_CALLS) -> float:
    """Of one call behind two products that fill a cache: the median, by the clock."""
    x, narrow, wide = torch.randn(1024, 512), torch.randn(512, 512), torch.randn(512, 4096)
    samples = []
    for _ in range(calls):
        _ = x @ narrow, x @ wide
        start = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def python_calls(action: Callable[[], object]) -> int:
    """Functions of Python's that one call enters: the same wherever it is counted."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    action()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def measured(
    calls: int = CALLS, repeats: int = REPEATS, cold_calls: int = COLD_CALLS
) -> list[tuple[str, float, float, float, float, int]]:
    """(name, forward, backward, cold forward, cold backward in microseconds, Python functions entered by a forward) of
    each case."""
    dy = torch.randn(ROWS, WIDTH)
    with empty_kernels(torch.randn(ROWS, WIDTH), torch.randn(ROWS, RANK)):
        names, given = zip(*cases().items(), strict=True)
        forwards = [forward for forward, _ in given]
        backwards = [
            functools.partial(torch.autograd.grad, forward(), wanted, dy, retain_graph=True)
            for forward, wanted in given
        ]
        columns = [microseconds(each, calls, repeats) for each in (forwards, backwards)]
        columns += [[cold_microseconds(action, cold_calls) for action in each] for each in (forwards, backwards)]
        return list(zip(names, *columns, map(python_calls, forwards), strict=True))


class OnKernels(NamedTuple):
    """Of a case, of a forward without a gradient, one with, and a backward: microseconds, those of a Function that does
    the same steps as one writes them, and of one with the least of Python, launches, and Python functions that each
    enters beyond the latter; and the microseconds of the first of calls alike, which finds everything out."""

    name: str
    times: list[float]
    plain: list[float]
    least: list[float]
    launches: list[int]
    entered: list[int]
    first: list[float]


def _known(forward, out, wanted, backward) -> tuple[list[Callable], list[Callable], list[int]]:
    """(What does the same as a forward without a gradient, one with, and a backward, as one writes it; with the least
    of Python; launches of each)."""
    steps = [steps_of(action) for action in (forward, forward, backward)]
    node = out.grad_fn
    others = [None] * (len(node.next_functions) - 1 - len(wanted))

    def actions(alone, *both):
        forward = functools.partial(Known.apply, (*both, node.saved_tensors, others), *wanted, *others)
        backward_too = functools.partial(torch.autograd.grad, forward(), wanted, backward.args[2], retain_graph=True)
        return [alone, forward, backward_too]

    plain, least = (actions(*each) for each in zip(*(step[:2] for step in steps), strict=True))
    return plain, least, [each.launches for each in steps]


def _measured(name: str, forward, wanted, dys, calls: int, repeats: int) -> OnKernels:
    def often():
        for _ in range(_programs.AFTER + 2):  # as many as it takes until a program runs
            out = forward()
        return out

    _programs.forget()
    first = forward()

    def anew():
        _programs.forget()
        forward()

    def backward_of(out):
        return functools.partial(torch.autograd.grad, out, wanted, dys, retain_graph=True)

    out = often()
    backward = backward_of(out)
    plain, least, launches = _known(forward, out if isinstance(out, torch.Tensor) else out[0], wanted, backward)
    _programs.forget()  # that steps were written down was a call of its own kind
    often(), backward()
    with torch.no_grad():
        often()
        found = [microseconds([forward, plain[0], least[0]], calls, repeats) + microseconds([anew], calls, repeats)]
        often()
        entered = [python_calls(forward) - python_calls(least[0])]
    often()
    found += [microseconds([forward, plain[1], least[1]], calls, repeats) + microseconds([anew], calls, repeats)]
    often()
    found += [microseconds([backward, plain[2], least[2], backward_of(first)], calls, repeats)]
    entered += [python_calls(each) - python_calls(one) for each, one in ((forward, least[1]), (backward, least[2]))]
    times, plain_times, least_times, anew_times = map(list, zip(*found, strict=True))
    return OnKernels(name, times, plain_times, least_times, launches, entered, anew_times)


def measured_on_kernels(calls: int = CALLS, repeats: int = REPEATS) -> list[OnKernels]:
    with empty_launches():
        return [_measured(name, *case, calls, repeats) for name, case in cases_on_kernels().items()]


def main(calls: int = CALLS, repeats: int = REPEATS, cold_calls: int = COLD_CALLS) -> int:
    print(f"{cpu_name()}, torch {torch.__version__}")
    print(f"{'':16}  forward us  backward us  cold forward us  cold backward us  Python functions")
    for name, forward, backward, cold_forward, cold_backward, entered in measured(calls, repeats, cold_calls):
        cold = f"{cold_forward:15.1f}  {cold_backward:16.1f}"
        print(f"{name:16}  {forward:10.1f}  {backward:11.1f}  {cold}  {entered:16}")
    if not torch.cuda.is_available():
        columns = "".join(
            f"{words:>15}  plain  least   own  first" for words in ("no gradient us", "forward us", "backward us")
        )
        print(f"\n{'on kernels':27}{columns}  launches")
        for row in measured_on_kernels(calls, repeats):
            numbers = zip(row.times, row.plain, row.least, row.first, strict=True)
            columns = "".join(
                f"{took:15.1f}  {plain:5.1f}  {least:5.1f}  {took - least:4.1f}  {first - least:5.1f}"
                for took, plain, least, first in numbers
            )
            print(f"{row.name:27}{columns}  {', '.join(map(str, row.launches))}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("--calls", type=int, default=CALLS, metavar="N", help=f"in a row (default {CALLS})")
    asked = parser.parse_args().calls
    raise SystemExit(main(asked, cold_calls=min(asked, COLD_CALLS)))
