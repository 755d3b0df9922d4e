"""The kernels of `lora_mlp` move the bytes that `lora_mlp_traffic` derives, and not one more; a training step is as
many launches as there are passes.

Counted in the interpreter by tests/traffic.py.
"""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.kernels import lora_mlp as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._tiles import SMALL
from tests.ops import lora_mlp_traffic as expected
from tests.ops.lora_mlp_cases import call, draw
from tests.traffic import SUMS, count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

TILES = SMALL
DATA, ADAPTER = torch.float16, torch.float32
SHAPES = {"odd": (37, 69), "whole tiles": (32, 64), "one row": (1, 200), "tall": (70, 20)}
shapes = pytest.mark.parametrize(("m", "h"), SHAPES.values(), ids=SHAPES)
dropping = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
processors = pytest.mark.parametrize("processors", [1, 13])


def data(*shape):
    return torch.randn(*shape).to(DATA)


def drop(dropout) -> Dropout | None:
    return Dropout(torch.tensor([7]), 0.3) if dropout else None


@shapes
@dropping
@processors
@pytest.mark.parametrize("rank", [0, 5])
def test_forward_reads_gate_and_up_once(m, h, dropout, processors, rank, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    with count_traffic() as traffic:
        a = torch.randn(rank, h) if rank else None
        kernels.gated_forward(data(m, h), data(m, h), "silu", a, drop(dropout and rank), TILES)
    found = expected.gated_forward(m, h, rank, TILES, 2, 4, processors, dropout and rank > 0)
    assert traffic.of("_gated_forward_kernel") == found
    assert traffic.atomics == 0


RANKS = {"all": (5, 3, 17), "gate": (5, 0, 0), "up and down": (0, 4, 3), "down": (0, 0, 5), "none": (0, 0, 0)}


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@shapes
@processors
def test_backward_reads_each_once(m, h, ranks, processors, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    sides = [kernels.Side(torch.randn(m, r), torch.randn(h, r), 2.0) if r else None for r in ranks[:2]]
    down = (torch.randn(m, ranks[2]), torch.randn(ranks[2], h)) if ranks[2] else None
    with_h = not ranks[2]
    with count_traffic() as traffic:
        kernels.gated_backward(
            data(m, h), data(m, h), data(m, h), "silu", down=down, sides=tuple(sides), with_h=with_h,
            dropout=drop(ranks[2]), tiles=TILES,
        )  # fmt: skip
    found = expected.gated_backward(m, h, ranks, TILES, 2, 4, processors, ranks[2] > 0, with_h)
    assert traffic.of("_gated_backward_kernel") == found
    assert traffic.atomics == 0


PRODUCT = "_tail_kernel"
FORWARD = ["_shrink_all_kernel", PRODUCT, PRODUCT, "_gated_forward_kernel", PRODUCT]
BACKWARD = ["_grad_b_and_t_kernel", "_gated_backward_kernel", "_grad_all_columns_kernel"]


@dropping
def test_a_training_step_reads_x_gate_and_up_once_each_way(dropout):
    """Forward: S of gate and up, two products with tails, the activation, a product with a tail. Backward: T and dB of
    down, the vendor's product, everything of the activation, dA of gate and up, two of the vendor's products."""
    problem = draw("fp16", dropout=dropout, bias=False)
    leaves = problem.leaves()
    with backend("triton"), count_traffic() as traffic:
        y = call(problem, leaves)
        before = len(traffic.launches)
        loads, stores = traffic.of("_gated_forward_kernel")
        m, h = len(problem.x), problem.projections[0].weight.shape[0]
        assert loads["gate_ptr"] + loads["up_ptr"] + stores["h_ptr"] == 6 * m * h
        once = traffic.of("_shrink_all_kernel")[0]["x_ptr"]
        assert once == problem.x.nbytes
        torch.autograd.grad(y, list(leaves.values()), problem.dy)
    names = traffic.kernels()
    found = [[name for name in part if name not in SUMS] for part in (names[:before], names[before:])]
    assert found == [FORWARD, BACKWARD]
    loads, stores = traffic.of("_gated_backward_kernel")
    streamed = sum(loads[f"{name}_ptr"] for name in ("dh", "gate", "up"))
    assert streamed + stores["dh_ptr"] + stores["dgate_ptr"] == 10 * m * h and "h_ptr" not in stores
    assert traffic.of("_grad_all_columns_kernel")[0]["x_ptr"] == problem.x.nbytes
    assert traffic.atomics == 0


def test_launches_beyond_the_ranks_that_one_kernel_holds():
    """A pass each over dg, du and h more, and the masked term of dh as a kernel of its own."""
    problem = draw("fp16", shape=(9, 33), inner=40, outputs=20, ranks=(33, 34, 40), dropout=True, bias=False)
    leaves = problem.leaves()
    with backend("triton"), count_traffic() as traffic:
        y = call(problem, leaves)
        before = len(traffic.launches)
        torch.autograd.grad(y, list(leaves.values()), problem.dy)
    names = [name for name in traffic.kernels()[before:] if name not in SUMS]
    assert names == [
        "_grad_b_and_t_kernel", PRODUCT, "_gated_backward_kernel", "_grad_columns_kernel", "_grad_b_and_t_kernel",
        "_grad_b_and_t_kernel", "_grad_all_columns_kernel", PRODUCT, PRODUCT,
    ]  # fmt: skip
