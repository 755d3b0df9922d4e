"""What programs make tensors by gives what torch's own functions give, or is not used."""

import pytest
import torch

from fastpeft.ops import _quick_tensors
from fastpeft.ops._quick_tensors import quick_empty, quick_part


@pytest.fixture
def forgotten():
    """What is known of torch is found out anew, within the test and after it."""
    for each in (quick_empty, quick_part):
        each.cache_clear()
    yield
    for each in (quick_empty, quick_part):
        each.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3, 5)])
def test_new_memory_is_as_torch_makes_it(shape, dtype):
    expected = torch.empty(shape, dtype=dtype)
    found = quick_empty("cpu")(tuple(expected.shape), expected.stride(), dtype)
    assert _quick_tensors._alike(found, expected) and found.is_contiguous() and not found._is_view()
    assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    found.zero_()
    assert found.resize_(2 * found.numel()).numel() == 2 * expected.numel()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_both_are_inference_tensors_where_torch_s_are(mode):
    with mode():
        expected = torch.empty(2, 3)
        found = quick_empty("cpu")((2, 3), (3, 1), torch.float32)
        part = quick_part()(expected, (3,), (1,), 3)
    assert found.is_inference() == part.is_inference() == expected.is_inference()


VIEWS = {
    "all": lambda x: x.detach(),
    "a row": lambda x: x[1],
    "a column": lambda x: x[:, 2],
    "the other way round": lambda x: x.t(),
    "flat": lambda x: x.view(-1),
    "expanded": lambda x: x[:1].expand(7, 6),
    "nothing": lambda x: x[4:],
}


@pytest.mark.parametrize("of", ["tensor", "parameter", "view"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_part_is_the_view(name, of):
    whole = torch.arange(24.0).view(4, 6)
    if of == "parameter":
        whole = torch.nn.Parameter(whole)
    elif of == "view":
        whole = torch.arange(60.0).view(10, 6)[3:7]
    view = VIEWS[name](whole).detach()
    offset = view.storage_offset() - whole.storage_offset()
    part = quick_part()(whole, tuple(view.shape), view.stride(), offset)
    assert _quick_tensors._alike(part, view) and torch.equal(part, view)
    assert part.untyped_storage()._cdata == whole.untyped_storage()._cdata


def test_no_device_but_those_that_torch_has_it_for():
    assert quick_empty("meta") is None and quick_empty("mps") is None


@pytest.mark.parametrize("kind", ["missing", "another shape", "other arguments", "another type"])
def test_it_is_not_used_where_torch_answers_otherwise(kind, forgotten, monkeypatch):
    from torch._C._dynamo import guards

    def wrong(*arguments):
        if kind == "other arguments":
            raise TypeError("one more is needed")
        return torch.nn.Parameter(torch.zeros(2)) if kind == "another type" else torch.zeros(5)

    for name in ("_empty_strided_cpu", "_reinterpret_tensor"):
        if kind == "missing":
            monkeypatch.delattr(guards, name)
        else:
            monkeypatch.setattr(guards, name, wrong)
    assert quick_empty("cpu") is None and quick_part() is None


def test_a_part_that_is_a_copy_is_not_used(forgotten, monkeypatch):
    from torch._C._dynamo import guards

    def copied(tensor, shape, strides, offset):
        return tensor.detach().as_strided(shape, strides, offset).clone(memory_format=torch.preserve_format)

    monkeypatch.setattr(guards, "_reinterpret_tensor", copied)
    assert quick_part() is None
