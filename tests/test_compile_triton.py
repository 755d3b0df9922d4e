"""Every op on the kernels, traced through what it says of its results without computing them: their shapes, strides and
dtypes."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_flatten

import fastpeft
from fastpeft.dispatch import override_plan
from tests.op_calls import OPS
from tests.peft_pair import close

pytestmark = pytest.mark.interpreter


class Foretold(torch.fx.Interpreter):
    """Runs a graph and compares the results of our operators with what was foretold of them when it was traced."""

    def run_node(self, node):
        out = super().run_node(node)
        if getattr(node.target, "namespace", "") == "fastpeft":
            SEEN.append(node.target._opname)
            for one, told in zip(tree_flatten(out)[0], tree_flatten(node.meta["val"])[0], strict=True):
                assert (one.shape, one.dtype, one.device) == (told.shape, told.dtype, told.device), node
                assert strides(one) == strides(told), node
        return out


def strides(tensor: torch.Tensor) -> list[int]:
    """Of the dimensions that have any steps."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]


SEEN: list[str] = []  # the operators that were compared


def compiler(graph: torch.fx.GraphModule, inputs):
    return make_boxed_func(Foretold(graph).run)


def run(op, tensors, options) -> list[torch.Tensor]:
    torch.manual_seed(3)
    leaves = tensors()
    out = op(*leaves, **options)
    out.square().sum().backward()
    return [out.detach(), *(each.grad for each in leaves if each.requires_grad)]


@pytest.mark.parametrize("name", OPS)
def test_results_are_as_foretold(name):
    op, tensors, options, plan = OPS[name]
    torch._dynamo.reset()
    SEEN.clear()
    compiled = torch.compile(op, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    with fastpeft.backend("triton"), override_plan(plan):
        expected, found = run(op, tensors, options), run(compiled, tensors, options)
    assert all(each is not None for each in found)
    assert len(set(SEEN)) == len(SEEN) == 2, SEEN  # forward and backward
    if "dropout" not in name:  # whose seed a compiled graph draws in another way
        for one, other in zip(found, expected, strict=True):
            close(one, other, 1e-6)
    torch._dynamo.reset()
