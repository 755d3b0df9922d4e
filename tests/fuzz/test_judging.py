"""What the properties ask of every op is asked: results up to rounding, of several results too, the same bits from the
same seed, and nothing touched."""

import itertools

import pytest
import torch

from tests.fuzz.judging import assert_rounded, outcome, tried_twice
from tests.fuzz.layouts import Layout, laid_out


def given(layout=Layout(offset=2)):  # noqa: B008 (immutable)
    return {"x": laid_out(torch.arange(1.0, 7.0).view(2, 3), layout), "w": torch.ones(3)}


def test_of_an_op_that_is_right_nothing_is_said():
    dropped = lambda x, w: x * (torch.rand(3) < 0.5) * w  # noqa: E731
    found = tried_twice(dropped, given(), ["x", "w"], torch.ones(2, 3), seed=3)
    assert found.keys() == {"out", "dx", "dw", "dx again", "dw again"}


def test_other_bits_under_the_same_seed():
    calls = itertools.count()
    with pytest.raises(AssertionError, match="out: other bits under the same seed"):
        tried_twice(lambda x, w: x * w * (1 + 2**-23 * next(calls)), given(), [], torch.ones(2, 3), seed=3)


def test_a_gradient_of_other_bits():
    calls = itertools.count()

    def op(x, w):
        y = x * w
        y.register_hook(lambda grad: grad * (1 + 2**-23 * (next(calls) // 2)))
        return y

    with pytest.raises(AssertionError, match="dx: other bits under the same seed"):
        tried_twice(op, given(), ["x"], torch.ones(2, 3), seed=3)


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_what_is_touched(where):
    def op(x, w):
        if where == "inside":
            x.data[0, 0] = 7.0
        else:
            x.data.as_strided((1,), (1,), 0).fill_(7.0)
        return x * w

    with pytest.raises(AssertionError, match="bytes in the storage of a tensor of \\(2, 3\\) have changed"):
        tried_twice(op, given(), [], torch.ones(2, 3), seed=3)


def test_of_several_results_some_may_be_of_no_use():
    dout = [torch.ones(2, 3), None]
    found = outcome(lambda x, w: [x * 2, x * w], given(), ["x", "w"], dout)
    assert found.keys() == {"out0", "out1", "dx", "dx again"}
    assert torch.equal(found["dx"], torch.full((2, 3), 2.0))
    assert outcome(lambda x, w: [x * 2, x * w], given(), ["x", "w"], [None, None]).keys() == {"out0", "out1"}


def test_a_sum_of_parts_may_be_rounded_as_often():
    truth = {"dx": torch.ones(1, dtype=torch.float64)}
    got = {"dx": torch.tensor([1 + 3 * torch.finfo(torch.float16).eps]).half()}  # six roundings
    assert_rounded(got, truth, truth, torch.float16, 1.0, {"dx": 2})
    with pytest.raises(AssertionError, match="dx: an error of 1.5 times what rounding explains"):
        assert_rounded(got, truth, truth, torch.float16, 1.0)
