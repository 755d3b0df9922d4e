"""The kernels of `lora_projections` move the bytes that `lora_projections_traffic` derives, and not one more: x once
for every S and once for every dA, each dY once, and dX written once before the base products accumulate onto it.

Counted in the interpreter by tests/traffic.py.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import lora_linear as single_kernels
from fastpeft.kernels import lora_projections as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._tiles import SMALL
from fastpeft.ops import _lora_projections_triton, lora_linear
from tests.memory import saved_for_backward
from tests.ops import lora_projections_traffic as expected
from tests.ops.lora_linear_traffic import Sizes, runs, sums
from tests.ops.lora_projections_cases import call, draw
from tests.traffic import SUMS, count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

M, K, TILES, SIZES = 37, 100, SMALL, Sizes(2, 4)
RANKS = {"1": (5,), "3": (8, 17, 8), "4": (1, 2, 3, 4)}
projections = pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
dropping = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])


def data(*shape):
    return torch.randn(*shape).half()


def matrices(ranks, *shape):
    return [torch.randn(r, K) for r in ranks] if not shape else [torch.randn(*shape, r) for r in ranks]


def masks_of(ranks, dropout):
    """The second projection has none."""
    drops = [dropout and p != 1 for p in range(len(ranks))]
    return drops, [Dropout(torch.tensor([7 + p]), 0.3) if each else None for p, each in enumerate(drops)]


@projections
@dropping
@pytest.mark.parametrize(("processors", "rows"), [(1, M), (13, M), (13, 3)])
def test_shrink_all_reads_x_once(ranks, dropout, processors, rows, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    drops, dropouts = masks_of(ranks, dropout)
    with count_traffic() as traffic:
        kernels.shrink_all(data(rows, K), matrices(ranks), torch.float32, dropouts, TILES)
    found = expected.shrink_all(rows, K, ranks, TILES, SIZES, 4, processors, drops)
    assert traffic.of("_shrink_all_kernel") == found
    assert traffic.atomics == 0


@projections
@dropping
@pytest.mark.parametrize(("processors", "tail"), [(1, True), (13, True), (13, False)])
def test_grad_all_columns_reads_x_once(ranks, dropout, processors, tail, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    monkeypatch.setattr(kernels, "holds_tail", lambda rank, mode: True)
    prepare = kernels._grad_all_columns_launch.__wrapped__  # which keeps nothing
    monkeypatch.setattr(kernels, "_grad_all_columns_launch", prepare)
    drops, dropouts = masks_of(ranks, dropout)
    with count_traffic() as traffic:
        kernels.grad_all_columns(matrices(ranks, M), data(M, K), matrices(ranks), dropouts, tail, TILES)
    found = expected.grad_all_columns(M, K, ranks, TILES, SIZES, processors, drops, tail)
    assert traffic.of("_grad_all_columns_kernel") == found
    parts = runs(M, TILES.rows, 2 * processors // -(-K // TILES.columns))
    # Every partial sum is read back once, in one launch; one program writes the whole of up to three.
    shared = parts > 1 or len(ranks) == kernels.MOST
    assert traffic.of("_sum_partials_kernel") == sums(*[(parts, sum(ranks) * K, 4)] * shared)
    assert traffic.kernels()[0] == "_grad_all_columns_kernel" and traffic.atomics == 0


@projections
@dropping
@pytest.mark.parametrize(("onto", "out"), [(False, torch.float16), (True, torch.float32)], ids=["narrow", "wide onto"])
def test_tail_all_writes_once(ranks, dropout, onto, out):
    drops, dropouts = masks_of(ranks, dropout)
    with count_traffic() as traffic:
        there = torch.randn(M, K).to(out) if onto else None
        kernels.tail_all(matrices(ranks, M), matrices(ranks), dropouts, torch.float16, out, there, TILES)
    found = expected.tail_all(M, K, ranks, TILES, SIZES, drops, out.itemsize, onto)
    assert traffic.of("_tail_all_kernel") == found
    assert traffic.atomics == 0


STEP = {  # dtypes, ranks, whether the pass that makes dA also holds the sum of the rank-r terms of dX
    "half": ("fp16", (4, 8, 3), True),
    "wide": ("fp16-fp32", (16, 33, 8), False),
}


@dropping
@pytest.mark.parametrize("based", [False, True], ids=["", "based"])
@pytest.mark.parametrize(("dtypes", "ranks", "holds"), STEP.values(), ids=STEP)
def test_a_training_step_reads_x_twice_and_each_gradient_once(dtypes, ranks, holds, based, dropout):
    """And once, in forward, what somebody else has computed."""
    problem = draw(dtypes, shape=(3, 7, 40), outputs=(50, 20, 20), ranks=ranks, dropout=dropout, based=based)
    leaves = {name: leaf.requires_grad_(name[0] in "xAB") for name, leaf in problem.leaves().items()}
    with backend("triton"), override_plan(Plan("prewrite", "prewrite", "a test")), count_traffic() as traffic:
        ys = call(problem, leaves)
        assert traffic.loaded(leaves["x"]) == leaves["x"].nbytes
        torch.autograd.backward(ys, problem.dy)
    assert traffic.loaded(leaves["x"]) == 2 * leaves["x"].nbytes
    assert all(traffic.loaded(dy) == dy.nbytes for dy in problem.dy)
    bases = [leaves[f"weight{i}"] for i in range(3)]
    assert all(traffic.loaded(base) == based * base.nbytes for base in bases)
    found = [name for name in traffic.kernels() if name not in SUMS]
    own = 3 * ["_tail_kernel", "_grad_b_and_t_kernel"]  # each projection's
    shared = ["_shrink_all_kernel", "_grad_all_columns_kernel", *([] if holds else ["_tail_all_kernel"])]
    assert sorted(found) == sorted(own + shared)


@pytest.mark.parametrize(("waiting", "launches"), [(None, 1 + 1), (0.5, 3 + 1), (1.5, 2 + 1)])
def test_shares_of_several_outputs_wait_for_one_launch_while_they_are_small(waiting, launches, monkeypatch):
    """In units of one output's; the launch after them adds up dA."""
    shares = 4 * 4 * (64 * 2 + 4 * 64)  # T of two blocks of columns, dB of four runs of rows, at rank 4
    if waiting:
        monkeypatch.setattr(_lora_projections_triton, "WAITING", int(waiting * shares))
    problem = draw("fp16", shape=(64, 40), outputs=(64, 64, 64), ranks=(4, 4, 4))
    leaves = {name: leaf.requires_grad_(name[0] in "xAB") for name, leaf in problem.leaves().items()}
    monkeypatch.setattr(single_kernels, "processor_count", lambda tensor: 8)
    with backend("triton"), count_traffic() as traffic:
        torch.autograd.backward(call(problem, leaves), problem.dy)
    assert sum(name in SUMS for name in traffic.kernels()) == launches


def test_single_layers_read_x_once_each():
    """What the count above is beside: lora.md's ledger of single layers."""
    x, a, b = data(5, 40).requires_grad_(), matrices((4,))[0][:, :40].contiguous(), torch.randn(20, 4)
    with backend("triton"), override_plan(Plan("prewrite", "prewrite", "a test")), count_traffic() as traffic:
        for _ in range(3):
            y = lora_linear(x, data(20, 40), None, a.requires_grad_(), b.requires_grad_(), 0.5)
            y.backward(torch.ones_like(y))
    assert traffic.loaded(x) == 6 * x.nbytes


class Arithmetic(TorchDispatchMode):
    """The names of torch's operations whose result has this shape; views, copies and allocations are none."""

    NONE = ("detach", "slice", "empty", "set_", "_to_copy")

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.names = shape, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape and function._opname not in self.NONE:
            self.names[function._opname] += 1
        return out


@dropping
@pytest.mark.parametrize("dtypes", STEP)
def test_the_kernels_dx_is_one_buffer_that_products_accumulate_onto(dtypes, dropout):
    """Of torch's operations as large as dX, three `addmm_` onto what the kernels wrote, and no sum of two tensors; of
    three single layers autograd adds two."""
    dtypes, ranks, _ = STEP[dtypes]
    fused, alone = dx_arithmetic("triton", dtypes, ranks, dropout)
    assert fused == {"addmm_": 3}
    assert alone == {"addmm_": 3, "add": 2}


@dropping
def test_the_torch_path_s_dx_is_one_buffer_that_products_accumulate_onto(dropout):
    """The first base product, and onto it two more and the rank-r terms. Of so few rows no product is oneDNN's, which
    does not accumulate; half precision may be widened, block by block."""
    fused, alone = dx_arithmetic("torch", "fp32", (4, 8, 3), dropout)
    assert fused == {"mm": 1, "addmm_": 5}
    assert alone == {"mm": 3, "addmm_": 3, "add": 2}


def dx_arithmetic(name: str, dtypes: str, ranks, dropout: bool) -> list[Counter]:
    """Of a backward of the op, and of one of three single layers."""
    problem = draw(dtypes, shape=(21, 40), outputs=(50, 20, 30), ranks=ranks, dropout=dropout)
    leaves = {key: leaf.requires_grad_(key[0] in "xAB") for key, leaf in problem.leaves().items()}

    def single(i: int) -> torch.Tensor:
        bias, matrices = leaves.get(f"bias{i}"), (leaves[f"A{i}"], leaves[f"B{i}"])
        return lora_linear(leaves["x"], leaves[f"weight{i}"], bias, *matrices, 0.5, dropout=0.3, training=dropout)

    found = []
    with backend(name), override_plan(Plan("prewrite", "prewrite", "a test")):
        for ys in (call(problem, leaves), list(map(single, range(3)))):
            wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
            with Arithmetic(problem.x.shape) as made:
                torch.autograd.grad(ys, wanted, problem.dy)
            found.append(made.names)
    return found


@dropping
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_backward_keeps_x_once_and_of_each_projection_s_and_a_seed(name, dropout):
    """No mask, no copy of x or of a matrix; single layers keep the same, x being one tensor."""
    problem = draw("bf16-fp32", dropout=dropout)
    leaves = {key: leaf.requires_grad_(key[0] in "xAB") for key, leaf in problem.leaves().items()}
    besides = [leaf for key, leaf in leaves.items() if key != "x"]
    with backend(name), saved_for_backward(besides=besides) as saved:
        call(problem, leaves)
    rows = problem.x.shape[:-1].numel()
    sums = [4 * rows * len(a) for a in problem.A]  # in fp32
    drops = sum(p > 0 for p in problem.dropouts or ())
    seeds = [24 if name == "triton" else 8 * drops] * bool(drops)  # on the kernels drawn in one launch
    assert leaves["x"].nbytes in saved.values()
    assert sum(saved.values()) == leaves["x"].nbytes + sum(sums) + sum(seeds)
