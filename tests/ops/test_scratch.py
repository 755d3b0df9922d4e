"""Memory that each thread writes again and again: nothing that is returned lies in it, and nobody shares it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.dispatch import backend
from fastpeft.ops import _scratch
from fastpeft.ops._lora_linear_torch import dropped
from fastpeft.ops._scratch import ELEMENTS, scratch_like
from tests.memory import Allocations
from tests.op_calls import OPS

DROPPING = [name for name in OPS if "dropout" in name]


def where(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_it_is_the_same_memory_each_time():
    first, second = scratch_like(torch.ones(3, 5), torch.float32), scratch_like(torch.ones(7, 2), torch.float32)
    assert where(first) == where(second)
    assert second.shape == (7, 2) and second.is_contiguous()
    assert where(scratch_like(torch.ones(3), torch.bfloat16)) != where(first)


def test_each_thread_has_its_own():
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: where(scratch_like(torch.ones(3), torch.float32))).result() != where(
            scratch_like(torch.ones(3), torch.float32)
        )


def test_what_is_larger_has_memory_of_its_own():
    row = torch.ones(1, ELEMENTS + 1)
    first, second = scratch_like(row, torch.float32), scratch_like(row, torch.float32)
    assert where(first) != where(second) and first.shape == row.shape


@pytest.mark.parametrize("first", [True, False])
def test_inside_and_outside_of_inference_mode(monkeypatch, first):
    monkeypatch.setattr(_scratch, "_own", type("Own", (), {})())
    for inside in (first, not first):
        with torch.inference_mode(inside):
            scratch_like(torch.ones(3), torch.float32).fill_(1)


def test_what_is_only_pretended_is_not_kept():
    with FakeTensorMode():
        fake = scratch_like(torch.ones(3, 4), torch.float32)
    assert fake.shape == (3, 4)
    assert type(scratch_like(torch.ones(3, 4), torch.float32)) is torch.Tensor


@pytest.mark.parametrize("name", DROPPING)
def test_nothing_that_a_call_returns_lies_in_it(name):
    op, tensors, options, _ = OPS[name]
    given = tensors()
    with backend("torch"):
        out = op(*given, **options)
        gradients = torch.autograd.grad(out, [t for t in given if t.requires_grad], torch.ones_like(out))
    kept = {where(scratch_like(torch.ones(1), dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert not kept & {where(each) for each in [out, *gradients]}


def test_from_the_second_time_on_a_masked_copy_allocates_nothing():
    x, places = torch.randn(64, 32), torch.tensor([1, 5])
    dropped(x, torch.float32, places)
    with Allocations() as allocated:
        z = dropped(x, torch.float32, places)
    assert not allocated.sizes
    assert z.count_nonzero() == x.numel() - 2
