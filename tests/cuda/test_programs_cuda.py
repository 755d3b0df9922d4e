"""Programs on a GPU: of every op that has them the third of calls alike gives what the first gives, by launches of
compiled kernels, whichever device is current, in CUDA's graphs too, and without waiting for the device."""

import contextlib

import pytest
import torch

from fastpeft.dispatch import override_plan
from fastpeft.ops._quick_tensors import quick_empty, quick_part
from tests.cuda.launches import assert_replays, waiting_is_an_error
from tests.ops.programs_cases import REFUSED, WITH_PROGRAMS, differentiated, same

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_kernels")]


def on_device(tensors, device, dtype=torch.bfloat16):
    return [each.detach().to(device, dtype).requires_grad_(each.requires_grad) for each in tensors]


@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_a_program_gives_what_it_was_recorded_of(name, counted_programs):
    op, tensors, options, plan = WITH_PROGRAMS[name]
    given = on_device(tensors(), "cuda")
    with override_plan(plan) if plan else contextlib.nullcontext():
        found = [differentiated(lambda *each: op(*each, **options), given) for _ in range(3)]
        with waiting_is_an_error():
            found.append(differentiated(lambda *each: op(*each, **options), given))
    assert all(same(each, found[0]) for each in found[1:])
    assert len(counted_programs["recorded"]) == 2
    assert counted_programs["ran"] == (0 if name in REFUSED else 4)


@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_in_a_graph(name, counted_programs):
    op, tensors, options, plan = WITH_PROGRAMS[name]
    given = on_device(tensors(), "cuda")
    options = {key: value for key, value in options.items() if "dropout" not in key}
    with override_plan(plan) if plan else contextlib.nullcontext():
        for _ in range(2):
            differentiated(lambda *each: op(*each, **options), given)
        assert_replays(lambda: differentiated(lambda *each: op(*each, **options), given))
    assert (counted_programs["ran"] > 2) is (name not in REFUSED)


@pytest.mark.parametrize("name", ["lora-prewrite", "projections", "mlp"])
def test_on_another_device_than_the_current(name, counted_programs):
    """With one GPU the current device is the only one, and programs are as they are."""
    op, tensors, options, plan = WITH_PROGRAMS[name]
    last = torch.cuda.device_count() - 1
    given = on_device(tensors(), torch.device("cuda", last))
    with override_plan(plan) if plan else contextlib.nullcontext(), torch.cuda.device(0):
        found = [differentiated(lambda *each: op(*each, **options), given) for _ in range(3)]
    assert all(same(each, found[0]) and each[0].get_device() == last for each in found)
    assert counted_programs["ran"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_memory_is_torch_s_own(dtype):
    """Of its allocator, on the device that is current."""
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        before = torch.cuda.memory_allocated()
        found = quick_empty("cuda")((3, 5), (5, 1), dtype)
        assert torch.cuda.memory_allocated() > before
    assert (found.shape, found.stride(), found.dtype, found.get_device()) == ((3, 5), (5, 1), dtype, last)
    part = quick_part()(found.zero_(), (5,), (1,), 5)
    part.fill_(1.0)
    assert torch.equal(found[1], part) and part.device == found.device and float(found.sum()) == 5.0


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(inside, counted_programs):
    op, tensors, options, _ = WITH_PROGRAMS["lora-prewrite"]
    given = on_device(tensors(), "cuda", torch.float32)
    found = []
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            out = op(*given, **options)
            if inside:
                found.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
        if not inside:
            found.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    assert all(same(each, found[0]) for each in found[1:]) and found[0][0].dtype is torch.bfloat16
    assert counted_programs["ran"] == (2 if inside else 4)
