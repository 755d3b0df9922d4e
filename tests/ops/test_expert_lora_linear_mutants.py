"""The test of the tests: mistakes planted in `expert_lora_linear`, on both backends, each of which must be found."""

import ast
import contextlib
import importlib
from pathlib import Path

import pytest

from fastpeft.dispatch import backend
from fastpeft.ops import expert_lora_linear_reference
from tests.counting import count
from tests.ops.test_expert_lora_linear import NAMES, close, exact, gradients, tensors_for
from tests.planting import mutated
from tests.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("poison")

TORCH, TRITON, OP = "_expert_lora_linear_torch", "_expert_lora_linear_triton", "expert_lora_linear"
# (module, function, what goes wrong, text, text with the mistake)
MUTANTS = [
    (TORCH, "base_product", "the first bias for all", "torch.addmm(bias[expert]", "torch.addmm(bias[0]"),
    (
        TORCH,
        "base_product",
        "the first weight for all",
        "(bias[expert], x[each], weight[expert]",
        "(bias[expert], x[each], weight[0]",
    ),
    (TORCH, "base_gradients", "dX of the first weight", "weight[expert], 1.0, dx", "weight[0], 1.0, dx"),
    (TORCH, "base_gradients", "dW of the first expert", "out=dw[expert]", "out=dw[0]"),
    (TORCH, "base_gradients", "dbias of the first expert", "out=dbias[expert]", "out=dbias[0]"),
    (TORCH, "forward", "no scaling", "b_g * scaling", "b_g"),
    (TORCH, "forward", "the first A for all", "a_g[expert], 1.0", "a_g[0], 1.0"),
    (TORCH, "forward", "the first B for all", "scaled[expert].t()", "scaled[0].t()"),
    (TORCH, "forward", "S scaled", "a_g[expert], 1.0", "a_g[expert], scaling"),
    (TORCH, "backward", "dB not scaled", ".t() * scaling", ".t()"),
    (TORCH, "backward", "dB of the first expert", "db[g][expert] = ", "db[g][0] = "),
    (TORCH, "backward", "T not scaled", "b[g][expert].t(), scaling", "b[g][expert].t(), 1.0"),
    (TORCH, "backward", "T of the first B", "b[g][expert].t(), scaling", "b[g][0].t(), scaling"),
    (TORCH, "backward", "dA of the first expert", "da[g][expert] = ", "da[g][0] = "),
    (TORCH, "backward", "dX of the first A", "t, a[g][expert])", "t, a[g][0])"),
    (TORCH, "backward", "dX without T A", "add_product(dx[each], t, a[g][expert])", "pass"),
    (TRITON, "layout_of", "no scaling", "(scaling,) * experts", "(1.0,) * experts"),
    (
        TRITON,
        "layout_of",
        "experts without rows left out",
        "served.get(expert, range(0))",
        "served.get(expert, range(1))",
    ),
    (TRITON, "forward", "A for B", "_flat(b_g), layout, y, y.dtype", "_flat(a_g), layout, y, y.dtype"),
    (TRITON, "forward", "B as A lies", "residual=y, of_b=True", "residual=y"),
    (TRITON, "backward", "T of B as A lies", "_flat(b[g]), layout, of_b=True", "_flat(b[g]), layout"),
    (TRITON, "backward", "dB as A lies", "dy, layout, of_b=True", "dy, layout"),
    (TRITON, "backward", "dX without a residual", "dx, dy.dtype, residual=dx", "dx, dy.dtype"),
    (OP, "by_expert", "the ranks of A before the experts", "view(experts, -1, inputs)", "view(-1, experts, inputs).mT"),
    (
        OP,
        "by_expert",
        "the experts of B before the ranks",
        "-1, experts).permute(2, 0, 1)",
        "experts, -1).permute(1, 0, 2)",
    ),
]


@contextlib.contextmanager
def planted(module, function: str, old: str, new: str):
    """Inside, the module's function has the mistake."""
    tree = ast.parse(mutated(Path(module.__file__).read_text(), function, old, new))
    tree.body = [node for node in tree.body if getattr(node, "name", None) == function]
    right, namespace = getattr(module, function), dict(vars(module))
    exec(compile(tree, module.__file__, "exec"), namespace)
    vars(module)[function] = namespace[function]
    try:
        yield
    finally:
        vars(module)[function] = right


def fault(on: str) -> str | None:
    """What is wrong, in words; a lane that would leave its tensor is stopped before it does."""
    tensors = tensors_for("experts without rows")
    truth = gradients(exact(tensors), NAMES, expert_lora_linear_reference)
    try:
        with backend(on), count_traffic():
            y, found = gradients(tensors, NAMES)
        close(y, truth[0], 1e-5)
        for name in NAMES:
            close(found[name], truth[1][name], 1e-5)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.interpreter
def test_the_right_ones_have_no_fault():
    assert fault("torch") is None and fault("triton") is None


@pytest.mark.interpreter
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: f"{each[0]}-{each[1]}-{each[2]}")
def test_a_mistake_is_found(mutant):
    name, function, _, old, new = mutant
    with planted(importlib.import_module(f"fastpeft.ops.{name}"), function, old, new):
        assert fault("triton" if name == TRITON else "torch") is not None
    count("planted mistakes")
