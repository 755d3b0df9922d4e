"""What an op's own Python costs, in microseconds: `lora_linear` and a patched layer around it with kernels that compute
nothing, beside a bare torch.autograd.Function of the same tensors, which is the least there is.

    python -m benchmarks.overhead

In a loop of nothing else, and cold: between large products, as in a step on a CPU, where the interpreter's code and
objects have left the caches each time and cost ten times as much. And on the Triton path, as a GPU's calls go, with
launches that launch nothing: with what torch takes to allocate, without what Triton's own launcher takes.
"""

import contextlib
import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import fastpeft

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its path serves CPU tensors then

CALLS, REPEATS = 2000, 7
COLD_CALLS = 40
ROWS, WIDTH, RANK = 6, 8, 4


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


@contextlib.contextmanager
def empty_launches():
    """Within it ops take the Triton path, and a launch does nothing but join the list that is given."""
    from triton.runtime.interpreter import InterpretedFunction

    launches = []

    def launcher(kernel, grid):
        return lambda *arguments, **options: launches.append(kernel)

    with fastpeft.backend("triton"), mock.patch.object(InterpretedFunction, "__getitem__", launcher):
        yield launches


def cases_on_kernels() -> dict[str, tuple[Callable, list[torch.Tensor], list[torch.Tensor]]]:
    """name -> (a forward, what wants a gradient of it, gradients of its results); of `empty_launches`."""
    ops = {name: importlib.import_module(f"fastpeft.ops.{name}") for name in ("lora_linear", "lora_projections")}
    mlp = importlib.import_module("fastpeft.ops.lora_mlp")
    half = dict(dtype=torch.bfloat16)
    x, dy = torch.randn(ROWS, WIDTH, requires_grad=True, **half), torch.randn(ROWS, WIDTH, **half)
    weight, s = torch.randn(WIDTH, WIDTH, **half), torch.randn(ROWS, RANK, **half)
    a = [torch.randn(RANK, WIDTH, requires_grad=True, **half) for _ in range(3)]
    b = [torch.randn(WIDTH, RANK, requires_grad=True, **half) for _ in range(3)]
    three = [ops["lora_linear"].Projection(weight, None, *each, 2.0, 0.0) for each in zip(a, b, strict=True)]
    one = [x, a[0], b[0]]
    return {
        "a bare Function": (lambda: Bare.apply(dy, x, weight, None, a[0], b[0], s), one, [dy]),
        "lora_linear": (lambda: ops["lora_linear"].apply_lora(x, weight, None, None, a[0], b[0], 2.0, 0.0), one, [dy]),
        "three projections": (
            lambda: ops["lora_projections"].apply_lora_projections(x, three), [x, *a, *b], [dy] * 3
        ),
        "a gated MLP": (lambda: mlp.apply_lora_mlp(x, *three, "silu"), [x, *a, *b], [dy]),
    }  # fmt: skip


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


def measured_on_kernels(
    calls: int = CALLS, repeats: int = REPEATS
) -> list[tuple[str, float, float, int, int, int, int]]:
    """(name, forward, backward in microseconds, launches of each, Python functions entered by each) of each case."""
    with empty_launches() as launches:
        rows = []
        for name, (forward, wanted, dys) in cases_on_kernels().items():
            backward = functools.partial(torch.autograd.grad, forward(), wanted, dys, retain_graph=True)
            both, counts = (forward, backward), []
            for action in both:
                launches.clear()
                action()
                counts.append(len(launches))
            rows.append((name, *microseconds(both, calls, repeats), *counts, *map(python_calls, both)))
        return rows


def main(calls: int = CALLS, repeats: int = REPEATS, cold_calls: int = COLD_CALLS) -> int:
    print(f"{'':16}  forward us  backward us  cold forward us  cold backward us  Python functions")
    for name, forward, backward, cold_forward, cold_backward, entered in measured(calls, repeats, cold_calls):
        cold = f"{cold_forward:15.1f}  {cold_backward:16.1f}"
        print(f"{name:16}  {forward:10.1f}  {backward:11.1f}  {cold}  {entered:16}")
    if not torch.cuda.is_available():
        print(f"\n{'on kernels':17}  forward us  backward us  launches      Python functions")
        for name, forward, backward, *counts in measured_on_kernels(calls, repeats):
            print("{:17}  {:10.1f}  {:11.1f}  {:3} and {:3}  {:7} and {}".format(name, forward, backward, *counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
