"""The kernels of `prompt_embedding` move what `fastpeft.cost` says cannot be avoided, and not one byte more; counted in
the interpreter by tests/traffic.py."""

import pytest
import torch

from fastpeft import cost
from fastpeft.dispatch import backend
from tests.ops.prompt_embedding_cases import draw, op_on
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

SHAPES = {"one": (1, 1, 1, 1), "odd": (5, 4, 3, 69), "whole blocks": (4, 2, 2, 64), "a long prompt": (2, 1, 30, 40)}


def moved(problem):
    """(Traffic of forward, of backward to all that learns)."""
    op, leaves = op_on(problem)
    with backend("triton"):
        with count_traffic() as forward:
            out = op(*leaves)
        with count_traffic() as backward:
            torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], problem.dout)
    assert forward.atomics == backward.atomics == 0
    return forward, backward


@pytest.mark.parametrize(("batch", "tokens", "count", "hidden"), SHAPES.values(), ids=SHAPES)
def test_ids_rows_prompt_and_result_once_each(batch, tokens, count, hidden):
    sizes = {"batch": batch, "tokens": tokens, "count": count, "hidden": hidden}
    forward, backward = moved(draw("fp16", **sizes))
    row = hidden * 2
    assert forward.of("_prepend_kernel") == (
        {"ids_ptr": batch * tokens * 8, "rows_ptr": batch * tokens * row, "prompt_ptr": count * row},
        {"out_ptr": batch * (count + tokens) * row},
    )
    assert backward.of("_grad_prompt_kernel") == ({"dout_ptr": batch * count * row}, {"out_ptr": count * row})
    named = {"B": batch, "S": tokens, "P": count, "hidden": hidden, "itemsize": 2}
    for passed, traffic in (("fwd", forward), ("bwd", backward)):
        (launch,) = traffic.launches
        total = launch.loads.total() + launch.stores.total()
        assert total == cost.prompt_embedding(passed, **named).bytes, passed


def test_a_prompt_in_fp32_is_read_and_its_gradient_written_in_fp32():
    forward, backward = moved(draw("fp16-fp32", batch=3, tokens=2, count=2, hidden=40, ids=torch.int32))
    loads, stores = forward.of("_prepend_kernel")
    assert loads == {"ids_ptr": 3 * 2 * 4, "rows_ptr": 3 * 2 * 40 * 2, "prompt_ptr": 2 * 40 * 4}
    assert stores == {"out_ptr": 3 * 4 * 40 * 2}
    assert backward.of("_grad_prompt_kernel") == ({"dout_ptr": 3 * 2 * 40 * 2}, {"out_ptr": 2 * 40 * 4})


def test_behind_padding_only_the_starts_are_read_besides():
    """Once for each token, for each block of a prompt's row, and for each block of a gradient's."""
    forward, backward = moved(draw("fp16", batch=3, tokens=2, count=2, hidden=40, starts=True))
    loads, stores = forward.of("_prepend_kernel")
    assert loads == {
        "ids_ptr": 3 * 2 * 8, "rows_ptr": 3 * 2 * 80, "prompt_ptr": 2 * 80, "start_ptr": (3 * 2 + 2 * 2 * 3) * 8
    }  # fmt: skip
    assert stores == {"out_ptr": 3 * 4 * 80}
    expected = {"dout_ptr": 3 * 2 * 80, "start_ptr": 2 * 2 * 3 * 8}
    assert backward.of("_grad_prompt_kernel") == (expected, {"out_ptr": 2 * 80})


def test_prompts_by_sample_and_embeddings_are_read_once_and_have_gradients_for_nothing():
    forward, backward = moved(draw("fp16", batch=3, tokens=2, count=2, hidden=40, embeds=True, by_sample=True))
    rows = 3 * 2 * 40 * 2
    assert forward.of("_prepend_kernel") == ({"rows_ptr": rows, "prompt_ptr": rows}, {"out_ptr": 2 * rows})
    assert backward.launches == []
