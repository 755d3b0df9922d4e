"""Selective checkpointing keeps what products gave and gives it again: what it has kept, no op changes."""

import contextlib
import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastpeft.dispatch import backend, override_plan
from tests.op_calls import OPS
from tests.ops.programs_cases import WITH_PROGRAMS

PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "linear", "_unsafe_view")}
LINEAR = OPS | WITH_PROGRAMS
CASES = [
    (name, served)
    for name, (*_, plan) in LINEAR.items()
    for served in ("torch", "triton")
    if name.partition("-")[0] not in ("prefix", "gated", "prompt") and (plan is None or served == "triton")
]


def kept(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "served"), CASES)
def test_what_is_kept_stays_as_it_is(name, served):
    op, tensors, options, plan = LINEAR[name]
    torch.manual_seed(2)
    given = tensors()
    wanted = [each for each in given if each is not None and each.requires_grad]

    def gradients(compute):
        torch.manual_seed(3)
        return torch.autograd.grad(compute(*given).square().sum(), wanted)

    def selective(*given):
        contexts = functools.partial(create_selective_checkpoint_contexts, kept)
        return checkpoint(lambda *each: op(*each, **options).sin(), *given, use_reentrant=False, context_fn=contexts)

    with backend(served), override_plan(plan) if plan else contextlib.nullcontext():
        expected = gradients(lambda *each: op(*each, **options).sin())
        found = gradients(selective)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-5)
