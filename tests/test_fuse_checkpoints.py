"""Projections that go together, in checkpointed calls: what has no backward, one later, or two."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastpeft
from fastpeft.tuners import siblings
from tests.fused import SIZES, adapted, assert_alike, called, outcome
from tests.fused import seen as seen
from tests.models import batch

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def checkpointed(reentrant: bool) -> nn.Module:
    """A model whose calls have not been seen yet."""
    model = fastpeft.fuse(adapted().train(), "projections")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def steps(model: nn.Module, count: int, seen: list[int]) -> list[int]:
    """How many ops each of some steps has made: a step computes each segment twice."""
    made = []
    for _ in range(count):
        before = len(seen)
        outcome(model)
        made.append(len(seen) - before)
    return made


def broken_off(model: nn.Module) -> None:
    """A forward that ends in the last layer, between attention and MLP."""

    def fail(module, args):
        raise torch.OutOfMemoryError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch())
    handle.remove()
    gc.collect()  # of pytest's traceback, which has the graph


@REENTRANT
def test_a_forward_that_is_thrown_away(reentrant, seen):
    model = checkpointed(reentrant)
    model(**batch())
    assert steps(model, 2, seen) == [2 * len(SIZES)] * 2


@REENTRANT
def test_a_forward_that_is_broken_off(reentrant, seen):
    model = checkpointed(reentrant)
    broken_off(model)
    assert steps(model, 3, seen) == [2 * (len(SIZES) - 1), 2 * len(SIZES), 2 * len(SIZES)]
    broken_off(model)
    assert steps(model, 2, seen) == [2 * len(SIZES)] * 2


@REENTRANT
def test_a_graph_that_is_kept_and_what_the_report_says_meanwhile(reentrant, seen):
    model = checkpointed(reentrant)
    together = "q_proj, k_proj, v_proj as one op, predicted to pay on GPUs"
    meanwhile = "; while the backward of a checkpointed call is to come, such calls layer by layer"

    def reason() -> str:
        return next(row.reason for row in fastpeft.report(model).layers if row.path.endswith("q_proj"))

    kept = model(**batch())
    assert steps(model, 2, seen) == [0, 0]
    assert reason().endswith(f"; {together}{meanwhile}")
    called(model.eval())  # which is not checkpointed
    assert seen == SIZES
    model.train()
    del kept
    assert reason().endswith(f"; {together}")
    assert steps(model, 1, seen) == [2 * len(SIZES)]
    kept = model(**batch())
    assert reason().endswith(f"; {together}") and kept is not None


@REENTRANT
def test_what_has_been_repeated_may_still_be_held(reentrant, seen):
    """As a loop holds its last loss while it computes the next one."""
    model = checkpointed(reentrant)
    loss = model(**batch()).loss
    loss.backward()
    assert steps(model, 1, seen) == [2 * len(SIZES)] and loss.requires_grad


@REENTRANT
def test_two_backward_passes_over_one_graph(reentrant, seen):
    """The second comes after other calls, and repeats what the forward did all the same."""
    model = checkpointed(reentrant)
    expected = outcome(adapted().train())
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    assert steps(model, 1, seen) == [0]
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_alike({"loss": loss.detach(), **found}, {k: v for k, v in expected.items() if k != "logits"})
    assert seen == [] and steps(model, 1, seen) == [2 * len(SIZES)]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.second(x)


def pair() -> nn.Module:
    model = fastpeft.patch(nn.Sequential(Pair()), fastpeft.LoraConfig(target_modules=["first", "second"], r=2))
    return fastpeft.fuse(model, "projections")


def test_a_segment_inside_another(seen):
    model, x = pair(), torch.randn(3, 8, requires_grad=True)

    def inside(x):
        return checkpoint(model, x, use_reentrant=True)

    watched, then = (checkpoint(inside, x, use_reentrant=True) for _ in range(2))
    watched.sum().backward()
    then.sum().backward()
    assert seen == [] and not _open(model)
    checkpoint(inside, x, use_reentrant=True).sum().backward()
    assert seen == [2] * 3  # in forward, in the outer's repetition, and in the inner's in that


@REENTRANT
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_waits_for_nothing(copied, reentrant, seen):
    model, x = pair(), torch.randn(3, 8, requires_grad=True)
    watched = checkpoint(model, x, use_reentrant=reentrant)
    other = copied(model)
    assert _open(model) and not _open(other)
    checkpoint(other, x, use_reentrant=reentrant).sum().backward()
    assert seen == [2] * 2
    watched.sum().backward()
    assert seen == [2] * 2 and not _open(model)


@pytest.mark.filterwarnings("error")  # torch makes one of an error in a hook of a call that is broken off
@pytest.mark.parametrize("early_stop", [True, False])
@REENTRANT
def test_a_segment_that_ends_in_an_operation_of_torch_s(reentrant, early_stop, seen):
    """By which it is repeated, if it is not reentrant."""
    model, x = pair(), torch.randn(3, 8, requires_grad=True)
    model(x)
    (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
    seen.clear()
    with set_checkpoint_early_stop(early_stop):
        checkpoint(lambda x: model(x).sin(), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert seen == [2] * 2 and not _open(model)


def _open(model: nn.Module) -> bool:
    return any(module.__dict__[siblings.KEY].open for module in model.modules() if siblings.KEY in module.__dict__)
