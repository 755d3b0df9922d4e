"""Ops under torch.compile, in one graph, of static shapes and of dynamic ones: bit for bit the results and gradients of
the ops that are not compiled, under autocast and on a residual too."""

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.attention_oracle import GRADIENTS
from fastpeft.dispatch import backend
from fastpeft.ops import _gated_prompt_attention_torch as gated_path
from fastpeft.ops import _lora_linear_torch as lora_path
from fastpeft.ops import _mixed_lora_linear_torch as mixed_path
from fastpeft.ops import _prefix_attention_torch as attention_path
from tests.counting import count
from tests.fuzz import attention
from tests.fuzz import test_fuzz_gated_prompt_attention as gated
from tests.fuzz import test_fuzz_lora_linear as lora
from tests.fuzz import test_fuzz_mixed_lora_linear as mixed
from tests.fuzz import test_fuzz_prefix_attention as prefix
from tests.fuzz import test_fuzz_prompt_embedding as embedding
from tests.fuzz.judging import outcome, tried_on
from tests.fuzz.layouts import Layout
from tests.fuzz.profiles import shown, tried
from tests.peft_pair import close

DYNAMIC = st.sampled_from((None, True, False))  # torch.compile's argument


@pytest.fixture(scope="module", autouse=True)
def seeds_of_graphs():
    """Ops that are not compiled draw their seeds as graphs do; a graph may be run backward twice."""

    def one(x, count=1):
        return torch.randint(2**62, (count,))

    with pytest.MonkeyPatch.context() as patch, torch._functorch.config.patch(donated_buffer=False):
        for path in (lora_path, attention_path, gated_path):
            patch.setattr(path, "draw_seed", one)
        patch.setattr(mixed_path, "draw_seeds", one)
        yield
    torch._dynamo.reset()


TRACED, INDUCED = {"backend": "aot_eager"}, {"backend": "inductor", "mode": "lite"}


def compiled(function, dynamic: bool | None, how: dict = TRACED):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, **how)


def same_compiled(op, tensors, wanted, dout, seed: int, dynamic: bool | None, how: dict = TRACED) -> None:
    """Result, gradients, and those of a second pass; dtypes, shapes; and nothing is touched."""
    with backend("torch"), torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = outcome(op, tensors, wanted, dout)
        torch.manual_seed(seed)
        found = tried_on(compiled(op, dynamic, how), tensors, wanted, dout)
    assert found.keys() == expected.keys(), f"{sorted(found)} instead of {sorted(expected)}"
    for name, each in expected.items():
        assert found[name].dtype == each.dtype and found[name].shape == each.shape, name
        if how == TRACED:
            assert torch.equal(found[name], each), name
        elif each.numel():
            close(found[name], each, 8 * torch.finfo(each.dtype).eps)
    count("compiled examples")


def of_lora(case: lora.Case, *how) -> None:
    tensors = lora.tensors_of(case)
    dy = tensors.pop("dy")
    wanted = [name for name in case.wanted if tensors[name] is not None]
    same_compiled(lora.op_of(case), tensors, wanted, dy, case.seed, *how)


@tried(3, 300)
@given(lora.CAST_ON_TORCH | lora.RESIDUAL_ON_TORCH | lora.ON_TORCH, DYNAMIC)
def test_lora_linear(case, dynamic):
    shown(case, dynamic)
    of_lora(case, dynamic)


@tried(3, 300)
@given(mixed.CAST_ON_TORCH | mixed.RESIDUAL_ON_TORCH | mixed.ON_TORCH, DYNAMIC)
def test_mixed_lora_linear(case, dynamic):
    shown(case, dynamic)
    problem = mixed.problem_of(case)
    tensors = problem.leaves()
    wanted = [name for name in case.wanted if name in tensors]
    same_compiled(mixed.op_of(case, problem), tensors, wanted, problem.dy, case.seed, dynamic)


@tried(3, 300)
@given(prefix.CAST_ON_TORCH | prefix.ON_TORCH | gated.CAST_ON_TORCH | gated.ON_TORCH, DYNAMIC)
def test_attention(case, dynamic):
    shown(case, dynamic)
    problem = attention.problem_of(case)
    tensors = {name: getattr(problem, name) for name in GRADIENTS}
    wanted = [name for name in case.wanted if tensors[name] is not None]
    same_compiled(attention.op_of(case, problem), tensors, wanted, problem.dout, case.seed, dynamic)


@tried(3, 300)
@given(embedding.ON_TORCH, DYNAMIC)
def test_prompt_embedding(case, dynamic):
    shown(case, dynamic)
    of = embedding.given_of(case)
    same_compiled(embedding.op_of(case, of), of.tensors, case.wanted, of.dout, case.seed, dynamic)


def test_through_inductor():
    """A few, as each takes seconds: results may be fused with their surroundings, but not the op."""
    layouts = {"x": Layout(turn=1), "dy": Layout(step=0)}
    every = ("x", "weight", "bias", "lora_A", "lora_B")
    case = lora.Case((3, 2), 5, 4, 3, "fp32", bias=True, wanted=every, layouts=layouts)
    of_lora(case, None, INDUCED)
    of_lora(case._replace(autocast="bf16"), True, INDUCED)
