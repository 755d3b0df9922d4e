"""What the properties of `prefix_attention` and `gated_prompt_attention` share: calls that nobody chose, and how large
the sums are of which results and gradients are made."""

import dataclasses
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastpeft import attention_oracle as oracle
from fastpeft.attention_oracle import GRADIENTS, AttentionProblem
from fastpeft.dispatch import strategy_refusal
from tests.counting import count
from tests.fuzz.attention_sizes import Softmax, gated_sizes_of, largest_score, sizes_of
from tests.fuzz.judging import assert_rounded, autocast_to, in_double, outcome, tried_on
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.ops.prefix_attention_cases import on

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
LAID_OUT = (*GRADIENTS, "dout", "padding_mask", "segment_ids", "alibi_slopes", "key_positions")
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FIVE = GRADIENTS[:5]
EXPONENT = 2.0  # roundings of a score, each of which moves its weight by as much


class Case(NamedTuple):
    """A call. gate: its dimensions, or None for `prefix_attention`; bias, prefix_bias: whether of each sample and of
    each head; by_sample: a prefix for each sample; extras_in_fp32: bias, sinks and gate; prefix_dtype: of what autocast
    may meet in another; layouts: of `LAID_OUT`; wanted: which gradients; strategy: where it serves the call."""

    batch: int = 1
    groups: int = 1
    heads_of_group: int = 1
    queries: int = 1
    keys: int = 1
    prefix: int = 1
    depth: int = 1
    dtype: str = "fp32"
    extras_in_fp32: bool = False
    autocast: str | None = None
    prefix_dtype: str | None = None
    causal: bool = True
    scale: float | None = None
    padding: bool = False
    segments: bool = False
    start: int | None = None
    bias: tuple[bool, bool] | None = None
    prefix_bias: tuple[bool, bool] | None = None
    alibi: bool = False
    positions: bool = False
    window: int | None = None
    pin: bool = False
    softcap: float | None = None
    sinks: bool = False
    by_sample: bool = False
    gate: int | None = None
    dropout: float = 0.0
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    strategy: str | None = None
    seed: int = 0

    __repr__ = changed


@st.composite
def cases(draw, sizes, depths, dtypes, strategies, gates, autocasts=(None,), prefix_dtypes=(None,)):
    """Cases of these numbers of queries, keys and virtual keys, of up to two samples and four heads."""
    gate, flags = draw(gates), st.tuples(st.booleans(), st.booleans())
    queries, keys = draw(st.just(0) | sizes), draw(st.just(0) | sizes if gate is None else sizes)
    segments, positions, window = draw(st.booleans()), draw(st.booleans()), draw(st.none() | st.integers(1, 40))
    start = st.none() | st.integers(-3, keys + 3)
    if segments or (positions and window is not None):  # queries stand among the keys
        queries = min(queries, keys)
    if segments or (positions and window is not None):
        start = st.none() | st.integers(0, max(0, keys - queries))
    return Case(
        batch=draw(st.integers(0, 2)),
        groups=draw(st.integers(1, 2)),
        heads_of_group=draw(st.integers(1, 2)),
        queries=queries,
        keys=keys,
        prefix=draw(sizes),
        depth=draw(depths),
        dtype=draw(st.sampled_from(dtypes)),
        extras_in_fp32=draw(st.booleans()),
        autocast=draw(st.sampled_from(autocasts)),
        prefix_dtype=draw(st.sampled_from(prefix_dtypes)),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from((None, 0.4, -0.3, 0.0))),
        padding=draw(st.booleans()),
        segments=segments,
        start=draw(start),
        bias=draw(st.none() | flags),
        prefix_bias=draw(st.none() | flags) if gate is None else None,
        alibi=draw(st.booleans()),
        positions=positions,
        window=window,
        pin=draw(st.booleans()) if gate is None else False,
        softcap=draw(st.none() | st.sampled_from((1.5, 30.0))),
        sinks=draw(st.booleans()),
        by_sample=draw(st.booleans()),
        gate=gate,
        dropout=draw(st.sampled_from((0.0, 0.0, 0.0, 0.3, 0.9))),
        wanted=draw(st.lists(st.sampled_from(GRADIENTS), unique=True).map(tuple)),
        layouts=draw(layouts_of(LAID_OUT)),
        strategy=draw(strategies),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def result_dtype(case: Case) -> torch.dtype:
    """Autocast's, where that acts."""
    return DTYPES[case.dtype] if case.autocast is None or case.dtype == "fp64" else KINDS[case.autocast]


def problem_of(case: Case) -> AttentionProblem:
    """Its tensors, laid out; of padding there may be nothing but."""
    generator = torch.Generator().manual_seed(case.seed)
    data = DTYPES[case.dtype]
    extra = torch.float32 if case.extras_in_fp32 and data != torch.float64 else data
    b, h, g, s, t = case.batch, case.groups * case.heads_of_group, case.groups, case.queries, case.keys

    def placed(name, values):
        return laid_out(values, case.layouts.get(name, CONTIGUOUS))

    def normal(name, *shape, dtype=data):
        return placed(name, torch.randn(shape, generator=generator).to(dtype))

    prefix = (*((b,) if case.by_sample else ()), g, case.prefix, case.depth)
    made = {name: normal(name, b, heads, rows, case.depth) for name, heads, rows in
            (("query", h, s), ("key", g, t), ("value", g, t))}  # fmt: skip
    made["dout"] = normal("dout", b, h, s, case.depth, dtype=result_dtype(case))
    other = data if case.prefix_dtype is None or case.dtype == "fp64" else KINDS[case.prefix_dtype]
    made |= {name: normal(name, *prefix, dtype=other) for name in ("prefix_key", "prefix_value")}
    for name, flags, columns in (("bias", case.bias, t), ("prefix_bias", case.prefix_bias, case.prefix)):
        if flags is not None:
            made[name] = normal(name, b if flags[0] else 1, h if flags[1] else 1, s, columns, dtype=extra)
    if case.sinks:
        made["sinks"] = normal("sinks", h, dtype=extra)
    if case.gate is not None:
        made["gate"] = normal("gate", *((), (1,), (h,))[case.gate], dtype=extra)
    options = {"causal": case.causal, "scale": case.scale, "query_start": case.start, "softcap": case.softcap}
    options["sliding_window"] = case.window
    if case.padding:
        seen = torch.rand(b, t, generator=generator) < torch.rand(b, 1, generator=generator)
        options["padding_mask"] = placed("padding_mask", seen)
    if case.segments:
        runs = torch.randint(2, (b, t), generator=generator).cumsum(1)
        options["segment_ids"] = placed("segment_ids", runs)
    if case.alibi:
        options["alibi_slopes"] = placed("alibi_slopes", torch.rand(h, generator=generator))
    if case.positions:
        options["key_positions"] = placed("key_positions", torch.randint(2 * t + 1, (b, t), generator=generator))
    if case.gate is None:
        options["prefix_window"] = "pin" if case.pin else "slide"
    return AttentionProblem(**made, dropout=case.dropout, options=options)


def narrowed(case: Case, problem: AttentionProblem) -> AttentionProblem:
    """What autocast makes of it."""
    dtype = result_dtype(case)
    return dataclasses.replace(problem, **{name: getattr(problem, name).to(dtype) for name in FIVE})


def op_of(case: Case, problem: AttentionProblem):
    """The call, as a function of its tensors by name."""

    def op(**leaves):
        with autocast_to(case.autocast and KINDS[case.autocast]):
            return oracle._op(problem, leaves)

    return op


def holds(case: Case, backend: str) -> None:
    given = problem_of(case)
    problem = narrowed(case, given)
    tensors = {name: getattr(given, name) for name in GRADIENTS}
    wanted = [name for name in case.wanted if tensors[name] is not None]
    scores = oracle._scores(problem)
    multiplied = {name: getattr(problem, name) for name in GRADIENTS}
    strategy = case.strategy
    if strategy is not None and strategy_refusal(strategy, oracle._tensors(multiplied), scores, case.dropout):
        strategy = None
    with on(backend, strategy), torch.random.fork_rng():
        torch.manual_seed(case.seed)
        keep, p = oracle.op_dropout(problem)
        torch.manual_seed(case.seed)
        besides = [each for each in problem.options.values() if isinstance(each, Tensor)]
        got = tried_on(op_of(case, given), tensors, wanted, given.dout, besides)
    out = got["out"]
    assert out.dtype == result_dtype(case) and out.transpose(1, 2).is_contiguous()

    def definition(**leaves):
        return oracle._reference(problem, leaves, keep, p)

    doubles, dout = in_double(multiplied), problem.dout.double()
    truth = outcome(definition, doubles, wanted, dout)
    of = Softmax(oracle._tensors(doubles), scores, 1.0 if keep is None else keep / (1 - p))
    sizes = sizes_of(of, dout) if case.gate is None else gated_sizes_of(of, doubles["gate"], dout)
    sizes = {name: each.reshape(truth[name].shape) for name, each in sizes.items() if name in truth}
    rows = case.batch * case.queries * case.heads_of_group * case.groups
    terms = case.depth + max(rows, case.keys + case.prefix) + EXPONENT * largest_score(of)
    assert_rounded(got, truth, sizes, result_dtype(case), terms)
    count("examples")
