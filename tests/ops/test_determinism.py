"""The same seed gives the same bits: of every op twice, on each backend, whatever torch's setting for deterministic
algorithms is, in whatever order a kernel's programs run; and of three steps of training by every method."""

import contextlib

import pytest
import torch

import fastpeft
from fastpeft.dispatch import backend, override_plan
from fastpeft.ops import _lora_linear_torch as path
from tests.compiled import METHODS, adapted
from tests.counting import count, how_many
from tests.interpreter import backwards
from tests.models import batch
from tests.op_calls import OPS

BOTH = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


@contextlib.contextmanager
def deterministic(wanted: bool):
    """torch.use_deterministic_algorithms(wanted), without filling what is not initialised."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def outcome(name: str, seed: int = 0) -> list[torch.Tensor]:
    """The op's result and its gradients, its tensors and its dropout drawn from this seed."""
    op, tensors, options, plan = OPS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = tensors()
        with override_plan(plan) if plan else contextlib.nullcontext():
            out = op(*given, **options)
        leaves = [t for t in given if t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def assert_same_bits(first, second) -> None:
    assert len(first) == len(second) > 1
    for i, pair in enumerate(zip(first, second, strict=True)):
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in pair)), i


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("on", BOTH)
def test_every_op_twice(on, name):
    with backend(on):
        with deterministic(False):
            first = outcome(name)
        with deterministic(True), backwards() if on == "triton" else contextlib.nullcontext():
            second = outcome(name)
    assert_same_bits(first, second)
    assert not torch.equal(first[0], outcome(name, seed=1)[0])  # in torch, of other tensors
    count("results the same bit for bit", len(first))


@pytest.mark.parametrize("name", [name for name in OPS if "dropout" in name])
def test_the_default_device_draws_nothing(name):
    """Seeds and tables are the CPU's, also where tensors without a device are made elsewhere."""
    op, tensors, options, _ = OPS[name]
    given = tensors()
    path.gap_table.cache_clear()

    def drawn():
        torch.manual_seed(3)
        out = op(*given, **options)
        return [
            out.detach(),
            *torch.autograd.grad(out, [t for t in given if t.requires_grad], given[0].new_ones(out.shape)),
        ]

    with backend("torch"):
        with torch.device("meta"):
            found = drawn()
        assert_same_bits(found, drawn())


def trained(method: str, seed: int) -> list[torch.Tensor]:
    """The losses and every gradient of three steps, and what was learned."""
    dropout = {METHODS[method][2]: 0.2} if METHODS[method][2] else {}
    model = adapted(method, **dropout)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    found = []
    torch.manual_seed(seed)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(**batch(length=7 + step)).loss
        loss.backward()
        optimizer.step()
        if method == "adalora":
            model.update_and_allocate(step)
        found += [loss.detach(), *(p.grad for p in learned if p.grad is not None)]
    return found + [p.detach() for p in learned]


ON_KERNELS = list(METHODS)[:: how_many(3, 1)]
STEPS = [("torch", method) for method in METHODS]
STEPS += [pytest.param("triton", method, marks=pytest.mark.interpreter) for method in ON_KERNELS]


@pytest.mark.parametrize(("on", "method"), STEPS)
def test_three_steps_of_training_twice(on, method):
    with fastpeft.backend(on), deterministic(True):
        first, second = trained(method, 0), trained(method, 0)
    assert_same_bits(first, second)
    count("results the same bit for bit", len(first))
