"""Ops under torch.compile, in one graph, of static shapes and of dynamic ones: bit for bit the results and gradients of
the ops that are not compiled, under autocast and on a residual too."""

import sys

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.attention_oracle import GRADIENTS
from fastpeft.dispatch import backend
from fastpeft.ops import _gated_prompt_attention_torch as gated_path
from fastpeft.ops import _lora_linear_torch as lora_path
from fastpeft.ops import _lora_projections_torch as projections_path
from fastpeft.ops import _mixed_lora_linear_torch as mixed_path
from fastpeft.ops import _prefix_attention_torch as attention_path
from tests.counting import count
from tests.fuzz import attention
from tests.fuzz import test_fuzz_expert_lora_linear as experts
from tests.fuzz import test_fuzz_gated_prompt_attention as gated
from tests.fuzz import test_fuzz_lora_linear as lora
from tests.fuzz import test_fuzz_lora_mlp as mlp
from tests.fuzz import test_fuzz_lora_projections as projections
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

    def each(x, dropouts):
        return [seed if p else None for seed, p in zip(one(x, len(dropouts)).split(1), dropouts, strict=True)]

    with pytest.MonkeyPatch.context() as patch, torch._functorch.config.patch(donated_buffer=False):
        for path in (lora_path, attention_path, gated_path):
            patch.setattr(path, "draw_seed", one)
        patch.setattr(mixed_path, "draw_seeds", one)
        patch.setattr(projections_path, "draw_seeds", each)
        patch.setattr(sys.modules["fastpeft.ops.lora_mlp"], "draw_seeds", lambda x, call: each(x, call.dropouts))
        yield
    torch._dynamo.reset()


TRACED, INDUCED = {"backend": "aot_eager"}, {"backend": "inductor", "mode": "lite"}


def compiled(function, dynamic: bool | None, how: dict = TRACED):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, **how)


def layouts_in_graphs(dout, out) -> list:
    """dout as a graph is handed it, whatever the caller's strides: with the result's, or, where sizes are dynamic,
    contiguous or channels last. On strides depends the order in which products add up."""
    laid_out = [torch.empty_like(out).copy_(dout), dout.contiguous()]
    if dout.ndim == 4:
        laid_out.append(dout.contiguous(memory_format=torch.channels_last))
    return list({each.stride(): each for each in laid_out}.values())


def differing(found, expected, exact: bool) -> list[str]:
    """Names of those that are not the same: bit for bit, or up to rounding."""
    assert found.keys() == expected.keys(), f"{sorted(found)} instead of {sorted(expected)}"
    for name, each in expected.items():
        assert found[name].dtype == each.dtype and found[name].shape == each.shape, name
        if not exact and each.numel():
            close(found[name], each, 8 * torch.finfo(each.dtype).eps)
    return [name for name, each in expected.items() if exact and not torch.equal(found[name], each)]


def same_compiled(
    op, tensors, wanted, dout, seed: int, dynamic: bool | None, how: dict = TRACED, exact: bool | None = None
) -> None:
    """Result, gradients, and those of a second pass; dtypes, shapes; and nothing is touched. exact: bit for bit, which
    inductor's are not, nor those of ops whose S lies otherwise in a graph than beside the other projections'."""
    exact = how == TRACED if exact is None else exact

    def seeded(function, *given):
        torch.manual_seed(seed)
        return function(*given)

    with backend("torch"), torch.random.fork_rng():
        found = seeded(tried_on, compiled(op, dynamic, how), tensors, wanted, dout)
        handed = layouts_in_graphs(dout, found["out"])
        expected = [seeded(outcome, op, tensors, wanted, each) for each in handed]
    wrong = [differing(found, each, exact) for each in expected]
    assert not all(wrong), f"{min(wrong, key=len)} with dout laid out in any of {len(wrong)} ways"
    count("compiled examples")


def of_lora(case: lora.Case, *how) -> None:
    tensors = lora.tensors_of(case)
    dy = tensors.pop("dy")
    wanted = [name for name in case.wanted if tensors[name] is not None]
    same_compiled(lora.op_of(case), tensors, wanted, dy, case.seed, *how)


@tried(3, 300)
@given(lora.CAST_ON_TORCH | lora.RESIDUAL_ON_TORCH | lora.ON_TORCH, DYNAMIC)
@example(lora.Case(leading=(), outputs=7, dtypes="fp16", bias=True, layouts={"bias": Layout(step=0)}), None)
@example(lora.Case(leading=(2, 1), inputs=2, bias=True, layouts={"x": Layout(turn=3)}), None)
def test_lora_linear(case, dynamic):
    shown(case, dynamic)
    of_lora(case, dynamic)


@tried(3, 300)
@given(mixed.CAST_ON_TORCH | mixed.RESIDUAL_ON_TORCH | mixed.ON_TORCH, DYNAMIC)
@example(
    mixed.Case(
        rows=(1,), between=(7,), inputs=31, outputs=7, adapters=(mixed.Adapter(), mixed.Adapter(8, -0.7)),
        dtypes="bf16-fp32", residual=True, wanted=("x", "B1"), layouts={"dy": Layout(turn=7, offset=3)}, seed=7599,
    ),
    True,
)  # fmt: skip
def test_mixed_lora_linear(case, dynamic):
    shown(case, dynamic)
    problem = mixed.problem_of(case)
    tensors = problem.leaves()
    wanted = [name for name in case.wanted if name in tensors]
    same_compiled(mixed.op_of(case, problem), tensors, wanted, problem.dy, case.seed, dynamic)


@tried(3, 300)
@given(projections.ON_TORCH, DYNAMIC)
@example(
    projections.Case(
        (3, 2), 5, tuple(projections.Projected(n, 2, 0.5, 0.3, wanted=projections.ops.KINDS) for n in (4, 1)),
        base="bf16", based=True, wanted=True,
    ),
    None,
)  # fmt: skip
def test_lora_projections(case, dynamic):
    """All results are used: where one is not, a graph hands zeros back for it."""
    shown(case, dynamic)
    problem = projections.problem_of(case)
    tensors = {name: leaf.detach() for name, leaf in problem.leaves().items()}
    op = projections.op_of(case, problem)

    def joined(**leaves):
        return torch.cat([y.flatten() for y in op(**leaves)])

    dy = torch.randn(sum(y.numel() for y in op(**tensors)), generator=torch.Generator().manual_seed(case.seed))
    same_compiled(joined, tensors, projections.wanted_of(case, tensors), dy, case.seed, dynamic, exact=False)


@tried(3, 300)
@given(mlp.ON_TORCH, DYNAMIC)
@example(mlp.Case((0,), sides=(mlp.Side(1, wanted=("lora_A",)), mlp.Side(1), mlp.Side())), None)
def test_lora_mlp(case, dynamic):
    shown(case, dynamic)
    problem = mlp.problem_of(case)
    tensors, wanted = problem.tensors, mlp.wanted_of(case, problem.tensors)
    same_compiled(mlp.op_of(case, problem), tensors, wanted, problem.dy, case.seed, dynamic, exact=False)


@tried(3, 300)
@given(experts.ON_TORCH, DYNAMIC)
@example(experts.Case(rows=(2, 0), adapters=(), wanted=("x",)), True)
def test_expert_lora_linear(case, dynamic):
    shown(case, dynamic)
    tensors, ends, dy = experts.given_of(case)
    wanted = [name for name in case.wanted if tensors.get(name) is not None]
    same_compiled(experts.op_of(case, ends), tensors, wanted, dy, case.seed, dynamic, exact=False)


@tried(3, 300)
@given(prefix.CAST_ON_TORCH | prefix.ON_TORCH | gated.CAST_ON_TORCH | gated.ON_TORCH, DYNAMIC)
@example(
    attention.Case(
        groups=2, heads_of_group=2, queries=2, keys=17, prefix=7, depth=20, dtype="fp64", autocast="fp16",
        prefix_dtype="fp16", scale=0.4, padding=True, start=20, bias=(False, False), pin=True, dropout=0.3,
        wanted=("value", "key", "query"), layouts={"dout": Layout(turn=18, offset=1)}, seed=14739,
    ),
    False,
)  # fmt: skip
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


def test_a_gradient_that_differs_in_a_graph_is_shown():
    def op(x):
        return x * (x.detach() * (1 + 2**-23) if torch.compiler.is_compiling() else x.detach())

    x, dout = torch.randn(3, 5), torch.randn(5, 3).t()
    with pytest.raises(AssertionError, match="dx"):
        same_compiled(op, {"x": x}, ["x"], dout, 0, None)
