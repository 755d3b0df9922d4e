"""Weights with room for B beside them and A below them: one product of the vendor's without a copy of the weight, as
right as with it."""

import dataclasses

import pytest
import torch

from fastpeft.ops import _lora_linear_triton as path
from fastpeft.ops import _rooms, lora_linear
from fastpeft.oracle import GRADIENTS
from tests.ops.lora_linear_cases import assert_right, draws, on
from tests.ops.lora_projections_cases import assert_right as projections_are_right
from tests.ops.lora_projections_cases import draw as projections
from tests.ops.test_lora_projections import ONE as BOUNDS

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "symmetric_products")]

WIDER, NARROWER = ((37, 40), 72), ((37, 72), 40)  # x, N: N > K and N < K


def rehomed(problem, rank=64):
    return dataclasses.replace(problem, weight=_rooms.with_room(problem.weight, rank))


@pytest.fixture
def copied(monkeypatch):
    """The shapes of what was copied next to its rank-r part."""
    shapes, joined = [], _rooms.joined

    def spy(wide, narrow, dim):
        found = joined(wide, narrow, dim)
        if found is None:
            shapes.append(tuple(wide.shape))
        return found

    monkeypatch.setattr(_rooms, "joined", spy)
    return shapes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", ["fp32", "fp16", "fp16-fp32"])
@pytest.mark.parametrize(("shape", "outputs"), [WIDER, NARROWER], ids=["wider", "narrower"])
@pytest.mark.parametrize("strategy", ["augment", "prewrite"])
def test_every_gradient(strategy, shape, outputs, dtypes, dropout, copied):
    """In fp32 a BLAS sums few rows in other ways: see test_lora_linear.py. Without room the weight would be copied."""
    with on("triton", strategy):
        problems = draws(3, shape, outputs, dtypes=dtypes, dropout=dropout)
        assert_right([rehomed(problem) for problem in problems], GRADIENTS)
    assert (outputs, shape[1]) not in copied
    if dtypes != "fp16-fp32" and not dropout:
        ways = {"augment": {shape, (37, outputs)}, "prewrite": {shape} if outputs > shape[1] else {(37, outputs)}}
        assert set(copied) == ways[strategy]


@pytest.mark.parametrize(("ranks", "copies"), [((5, 5, 5), 1), ((5, 17, 5), 2)])
def test_projections_of_one_rank_share_the_copy_of_x(ranks, copies, copied):
    problems = [projections("fp16", outputs=(71, 80, 72), ranks=ranks, seed=seed) for seed in range(2)]
    problems = [
        dataclasses.replace(problem, weight=tuple(_rooms.with_room(weight, 17) for weight in problem.weight))
        for problem in problems
    ]
    with on("triton", "augment"):
        projections_are_right(problems, BOUNDS)
    assert copied == [(39, 69)] * copies * 2


@pytest.mark.parametrize(
    ("strategy", "forward", "backward"),
    [("prewrite", "augment", "augment"), ("addmm", "addmm", "addmm"), ("fused", "fused", "fused")],
)
def test_prewrite_becomes_augment_where_that_moves_fewer_bytes(strategy, forward, backward):
    weight = _rooms.with_room(torch.zeros(40, 72), 16)
    assert path._in_its_room(strategy, weight, 16, True) == forward == backward
    assert path._in_its_room(strategy, weight, 16, False) == strategy
    assert path._in_its_room(strategy, weight, 200, True) == strategy
    assert path._in_its_room(strategy, weight.contiguous(), 16, True) == strategy


def test_adapters_in_turns_leave_nothing_behind():
    """One of a larger rank before, and B changed in place as an optimizer does."""
    big, small = (draws(1, *WIDER, rank=rank, dtypes="fp16")[0] for rank in (24, 5))
    weight = _rooms.with_room(big.weight, 24)
    with on("triton", "augment"):
        for problem in (big, small, big):
            assert_right([dataclasses.replace(problem, weight=weight)])
        x, a, b = big.x, big.lora_A, big.lora_B.clone().requires_grad_()
        lora_linear(x, weight, None, a, b, 0.5).sum().backward()
        with torch.no_grad():
            b.sub_(b.grad)
        after = lora_linear(x, weight, None, a, b, 0.5)
        assert torch.equal(after, lora_linear(x, weight.contiguous(), None, a, b.detach().clone(), 0.5))


def test_what_is_written_beside_a_weight_is_no_change_of_it():
    """Backward may have saved it: two calls, then both backward."""
    (problem,) = draws(1, *WIDER, dtypes="fp16")
    weight = _rooms.with_room(problem.weight, 16)
    version, before = weight._version, weight.clone()
    with on("triton", "augment"):
        x = problem.x.requires_grad_()
        first, second = (lora_linear(x, weight, None, problem.lora_A, problem.lora_B, s) for s in (0.5, 0.25))
        (first + second).sum().backward()
    assert weight._version == version and torch.equal(weight, before)


def test_the_whole_is_aligned_and_holds_the_rank():
    for shape, rank in (((40, 72), 16), ((64, 64), 1), ((63, 65), 64), ((4, 8), 200)):
        weight = _rooms.with_room(torch.ones(shape, dtype=torch.float16), rank)
        rows, columns = _rooms.room_of(weight).whole
        assert columns % 64 == rows % 64 == 0 and 0 <= columns - shape[1] - rank < 64 > rows - shape[0] - rank >= 0
        assert torch.equal(weight, torch.ones_like(weight)) and weight.shape == shape
        assert _rooms.fits(weight, rank) and not _rooms.fits(weight, rank + 64)
        beside = _rooms.joined(weight, torch.full((shape[0], rank), 2.0), 1)
        below = _rooms.joined(weight, torch.full((rank, shape[1]), 3.0), 0)
        assert beside.shape == (shape[0], _rooms.padded(shape[1], rank)) and beside.shape[1] % 8 == 0
        assert torch.equal(beside[:, : shape[1]], weight) and bool((beside[:, shape[1] : shape[1] + rank] == 2).all())
        assert torch.equal(below[: shape[0]], weight) and bool((below[shape[0] : shape[0] + rank] == 3).all())
        assert not beside[:, shape[1] + rank :].any() and not below[shape[0] + rank :].any()


OTHERS = {
    "a part of the rows": lambda weight: weight[:20],
    "a part of the columns": lambda weight: weight[:, :16],
    "the last rows": lambda weight: weight[8:],
    "transposed": lambda weight: weight.t(),
    "a copy": lambda weight: weight.clone(),
    "another dtype": lambda weight: weight.double(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_only_the_weight_itself_has_the_room(other):
    weight = _rooms.with_room(torch.ones(40, 72), 16)
    view = OTHERS[other](weight)
    assert _rooms.room_of(weight) is not None and _rooms.room_of(view) is None
    assert _rooms.joined(view, torch.zeros(len(view), 16), 1) is None and not _rooms.fits(view, 1)


def test_rooms_go_with_their_weights():
    before = len(_rooms._rooms)
    weight = _rooms.with_room(torch.ones(40, 72), 16)
    assert len(_rooms._rooms) == before + 1
    del weight
    assert len(_rooms._rooms) == before
