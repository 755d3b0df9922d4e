"""`gated_prompt_attention`'s compiled kernels on a GPU, by both strategies, with one gate and with one for each head:
the criterion of `fastpeft.oracle` at larger, odd sizes and in bf16, gates at zero, determinism, CUDA graphs."""

import dataclasses

import pytest
import torch

from fastpeft.attention_oracle import attention_outcomes
from fastpeft.dispatch import GATED_STRATEGIES, backend
from fastpeft.ops import gated_prompt_attention
from tests.cuda.attention import (
    BOUNDS,
    DTYPES,
    SINGLE,
    SINGLE_VENDOR,
    SIZES,
    VENDOR,
    VENDORS,
    assert_repeatable,
    assert_right,
    leaves_of,
    on,
    results_of,
)
from tests.cuda.attention import MODIFIERS as OF_A_PREFIX
from tests.cuda.attention import problem_of as ungated
from tests.cuda.launches import assert_replays

pytestmark = pytest.mark.cuda

# (head dimension, virtual tokens): every number of them at 128, one at each other dimension.
GRID = [(128, 2), (128, 10), (128, 100), (64, 30), (96, 10), (256, 200), (80, 2)]
# A prompt has a softmax without modifiers of its own.
MODIFIERS = [names for names in OF_A_PREFIX if not {"pin", "prefix-bias"} & set(names)] + [("bias", "left")]
ONE, PER_HEAD = (1,), (SIZES["heads"],)
GATES = pytest.mark.parametrize("gate", [ONE, PER_HEAD], ids=["one gate", "per head"])
STRATEGIES = pytest.mark.parametrize("strategy", GATED_STRATEGIES)


def problem_of(*modifiers, gate=PER_HEAD, **options):
    """Gates in fp32. The prompt's values and dout have a mean, so that the gradient of one gate, a sum over everything,
    is no difference of nearly equal numbers, whose gain would say nothing."""
    problem = ungated(*modifiers, gate=gate, **{"prefix": 10, **options})
    problem.options.pop("prefix_window", None)
    dout = problem.dout + 8 / problem.dout.numel() ** 0.5
    return dataclasses.replace(problem, prefix_value=problem.prefix_value + 1, dout=dout, gate=problem.gate.float())


@STRATEGIES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "prefix"), GRID)
def test_as_right_as_eager(depth, prefix, dtype, strategy):
    half = BOUNDS[strategy]
    single = SINGLE if strategy == "fused" else SINGLE_VENDOR
    with on(strategy):
        assert_right(problem_of(depth=depth, prefix=prefix, dtype=dtype), bounds=single if dtype == "fp32" else half)


@STRATEGIES
def test_one_virtual_token_has_a_weight_of_one(strategy):
    """Whatever its key: its gradient is zero, up to rounding."""
    problem = problem_of(prefix=1, queries=64)
    with on(strategy):
        assert_right(problem, ("key", "value", "prefix_value", "gate"), BOUNDS[strategy])
        got, *_ = attention_outcomes(problem, ("prefix_key", "prefix_value"))
    assert got["dprefix_key"].abs().max() < 1e-2 * got["dprefix_value"].abs().max()


@STRATEGIES
@pytest.mark.parametrize("gate", [(), ONE], ids=["a number", "one gate"])
def test_one_gate_for_all_heads(gate, strategy):
    with on(strategy):
        assert_right(problem_of(gate=gate), bounds=BOUNDS[strategy])
        assert_right(problem_of(gate=gate, groups=8), bounds=BOUNDS[strategy])


@GATES
@STRATEGIES
def test_a_gate_in_the_datas_dtype_is_its_value_in_fp32(strategy, gate):
    """As HF peft has it: its gradient is the fp32 one, rounded once."""
    problem = problem_of(gate=gate)
    *five, wide = leaves_of(problem)
    narrow = wide.detach().to(problem.query.dtype)
    results = []
    with on(strategy):
        for each in (narrow, narrow.float()):
            results.append(results_of(gated_prompt_attention, [*five, each.requires_grad_()], problem.dout))
    (*rest, of_narrow), (*others, of_wide) = results
    assert of_narrow.dtype == narrow.dtype and torch.equal(of_narrow, of_wide.to(narrow.dtype))
    if strategy == "fused":  # the vendor's backward is not deterministic by itself
        assert all(torch.equal(one, other) for one, other in zip(rest, others, strict=True))


@pytest.mark.parametrize("modifiers", MODIFIERS, ids="+".join)
def test_modifiers(modifiers):
    with on():
        assert_right(problem_of(*modifiers))


@pytest.mark.parametrize("modifiers", [("alibi", "left"), ("dropout", "window"), ("bias", "sinks")], ids="+".join)
def test_modifiers_in_fp32(modifiers):
    with on():
        assert_right(problem_of(*modifiers, gate=ONE, dtype="fp32"))


@pytest.mark.parametrize("modifiers", [(), ("sinks",), ("by-sample", "scale"), ("bidirectional",)], ids="+".join)
def test_modifiers_of_the_merge(modifiers):
    with on("merge"):
        assert_right(problem_of(*modifiers, queries=512), bounds=VENDOR)


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS, indirect=True)
@pytest.mark.parametrize("queries", [64, 331, 1000])
def test_every_vendor_takes_the_sequences_own_result_and_its_l(queries, vendor):
    with on("merge"):
        assert_right(problem_of(queries=queries, depth=128), bounds=VENDOR)
        assert_right(problem_of(queries=queries, groups=8, gate=ONE), bounds=VENDOR)


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 1), (12, 4)])
def test_groups_of_heads(heads, groups):
    for strategy in GATED_STRATEGIES:
        with on(strategy):
            assert_right(problem_of(heads=heads, groups=groups, gate=(heads,)), bounds=BOUNDS[strategy])


@pytest.mark.parametrize(("queries", "keys"), [(1, 500), (2, 9), (77, 500), (15, 15)])
def test_cached_and_short(queries, keys):
    with on():
        assert_right(problem_of("left", queries=queries, keys=keys))
        assert_right(problem_of(queries=queries, keys=keys, gate=ONE))


@STRATEGIES
@pytest.mark.parametrize(
    "wanted", [("gate",), ("query",), ("key", "value"), ("prefix_key",), ("prefix_value", "gate"), ("value", "gate")]
)
def test_subsets_of_gradients(strategy, wanted):
    with on(strategy):
        assert_right(problem_of(), wanted, BOUNDS[strategy])


@GATES
@STRATEGIES
def test_at_gate_zero_the_gate_alone_has_a_gradient(strategy, gate):
    """Where training begins: out is the same with any prompt, whose keys and values have gradients of zero."""
    problem = problem_of("bidirectional", gate=gate)  # else the first row, of one key, has no gradient
    problem = dataclasses.replace(problem, gate=torch.zeros_like(problem.gate))
    with on(strategy):
        assert_right(problem, bounds=BOUNDS[strategy])
        got, *_ = attention_outcomes(problem, problem.present())
        *three, pk, pv, gate = leaves_of(problem)
        assert torch.equal(got["out"], gated_prompt_attention(*three, pk + 1, pv + 1, gate, causal=False))
    assert not got["dprefix_key"].any() and not got["dprefix_value"].any()
    assert got["dgate"].all()


def test_gates_of_some_heads_are_zero_and_negative():
    problem = problem_of()
    gate = torch.where(torch.arange(len(problem.gate), device=problem.gate.device) % 2 == 0, 0.0, -problem.gate.abs())
    for strategy in GATED_STRATEGIES:
        with on(strategy):
            assert_right(dataclasses.replace(problem, gate=gate), bounds=BOUNDS[strategy])


def test_a_row_without_keys_has_the_prompts_part_alone():
    problem = problem_of("left")
    start = 1 + 3 * (len(problem.query) - 1)  # of the last sample
    with on():
        *five, gate = leaves_of(problem)
        out = gated_prompt_attention(*five, gate, **problem.options)[-1, :, : start - 1]
        other = gated_prompt_attention(five[0], *(t + 1 for t in five[1:3]), *five[3:], gate, **problem.options)
    assert out.any() and torch.equal(out, other[-1, :, : start - 1])


# Dropout is the kernels' own: nothing is merged then.
@GATES
@pytest.mark.parametrize(("strategy", "dropout"), [*((name, 0.0) for name in GATED_STRATEGIES), ("fused", 0.3)])
def test_twenty_repeats_are_equal_bit_for_bit(strategy, dropout, gate):
    problem = problem_of(queries=1024, depth=128, gate=gate)
    leaves = leaves_of(problem)

    def run():
        torch.manual_seed(3)
        return results_of(gated_prompt_attention, leaves, problem.dout, dropout=dropout, training=True)

    assert_repeatable(run, strategy)


@GATES
@STRATEGIES
def test_cuda_graphs(strategy, gate):
    problem = problem_of(queries=512, depth=128, gate=gate)
    leaves = leaves_of(problem)
    with on(strategy):
        assert_replays(lambda: results_of(gated_prompt_attention, leaves, problem.dout))


def test_on_the_gpu_triton_is_what_auto_means():
    leaves = leaves_of(problem_of())
    with backend("auto"):
        automatic = gated_prompt_attention(*leaves)
    with backend("triton"):
        assert torch.equal(automatic, gated_prompt_attention(*leaves))


def test_strided_as_a_models_projections_are():
    problem = problem_of(depth=128)
    *five, gate = leaves_of(problem)
    fused = torch.stack([problem.query] * 3, 3).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :, 1]
    heads_last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in five[1:3]]
    prompt = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in five[3:]]
    for strategy in GATED_STRATEGIES:
        with on(strategy):
            expected = gated_prompt_attention(*five, gate)
            assert expected.transpose(1, 2).is_contiguous()
            assert torch.equal(expected, gated_prompt_attention(fused, *heads_last, *prompt, gate))
