"""Calls of few rows, whose kernels take less time than the host needs to launch them: replayed from CUDA graphs, as a
server does, and beside that launched one by one onto an idle device, as eager PyTorch does.

COVERED, the usual way, keeps the device busy while the host launches, which hides the host where it is the faster of
the two or not far behind, but leaves the gaps between small kernels in the figures.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .harness import Call

COVERED, GRAPH, EAGER = "covered", "graph", "eager"
NAMES = {GRAPH: "replayed", EAGER: "eager"}  # in the name of a cell's shape
FEW_ROWS = 64
DECODED = (1, 8, 64)  # rows: samples of one new token each
WARM_UPS = 3  # on a side stream, as capture demands


def each_way(cells: Iterable) -> list:
    """The cells (with a name, M rows and `launches`), those of few rows twice: replayed from a graph, and eager."""
    found = []
    for cell in cells:
        ways = [replace(cell, name=f"{cell.name}, {name}", launches=way) for way, name in NAMES.items()]
        found += ways if cell.M <= FEW_ROWS else [cell]
    return found


@dataclass
class Replayed(Call):
    """A call whose forward and backward are each one launch, of a graph. What it returns is overwritten when it is
    called again; its Python, and its context, ran when it was captured."""

    graphs: tuple[Any, Any] = ()
    y: torch.Tensor | tuple[torch.Tensor, ...] = ()
    grads: tuple[torch.Tensor, ...] = ()

    def run_forward(self):
        self.graphs[0].replay()
        return self.y

    def run_backward(self, y) -> tuple[torch.Tensor, ...]:
        self.graphs[1].replay()
        return self.grads


def captured(call: Call) -> Replayed:
    """The call on CUDA, as graphs of its forward and of its backward, which share their memory. Raises RuntimeError
    where the call does what no graph can hold, as to wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call.run()
    torch.cuda.current_stream().wait_stream(side)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        y = call.run_forward()
    with torch.cuda.graph(backward, pool=forward.pool()):
        grads = call.run_backward(y)
    return Replayed(
        call.forward,
        call.leaves,
        call.grad,
        call.frozen,
        call.context,
        call.activations,
        (forward, backward),
        tuple(each.detach() for each in y) if isinstance(y, tuple) else y.detach(),
        grads,
    )
