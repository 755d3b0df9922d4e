"""The benchmark of gated_prompt_attention: its truth, its peers, what it refuses, its command line, on tiny shapes."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks import bench_gated_prompt_attention as bench
from benchmarks import gated_prompt_attention_peers as peers
from benchmarks import prefix_attention_truth, report
from benchmarks.bench_gated_prompt_attention import BENCH, Cell, inputs_of
from benchmarks.gated_prompt_attention_truth import LEAVES, GatedInputs, GatedTruth
from benchmarks.harness import measure_memory
from benchmarks.prefix_attention_peers import ours
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.dispatch import GATED_STRATEGIES
from fastpeft.errors import FastpeftError
from fastpeft.ops import _gated_prompt_attention_torch as torch_path
from fastpeft.ops import gated_prompt_attention
from tests.benchmarks.planted import on, planted

CPU = torch.device("cpu")
ONE = Cell("tiny", 2, 4, 2, 40, 7, 16, "bf16")
PER_HEAD = Cell("tiny-mha", 2, 4, 4, 40, 7, 16, "bf16", gates=4)
GROUPED_PER_HEAD = dataclasses.replace(ONE, gates=4)
BOTH = pytest.mark.parametrize("cell", [ONE, PER_HEAD], ids=["one gate", "per head"])
HERE = ["peft", "sdpa-twice", "fastpeft", "fastpeft:torch"]


def named(*names):
    return [i for i in peers.IMPLEMENTATIONS if i.name in names]


@pytest.fixture
def measured(run):
    return lambda implementations, cells=(ONE,): run(implementations, cells, bench=BENCH)


@pytest.mark.parametrize("cell", [ONE, PER_HEAD, GROUPED_PER_HEAD], ids=["one gate", "per head", "grouped per head"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_implementation_that_runs_here_is_right(cell, dtype):
    inputs = inputs_of(dataclasses.replace(cell, dtype=dtype), CPU)
    judge, checked = GatedTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.needs_gpu or implementation.compiled or implementation.name == report.FLOOR:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.gain) == {"out", *LEAVES} and set(verdict.tail_gain) == {"out", "query"}
        checked.append(implementation.name)
    assert checked == HERE


def definition(q, k, v, pk, pv, gate):
    """Attention and the gated softmax over the prompt, for autograd."""

    def attend(keys, values, seen):
        keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (keys, values))
        scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ values

    length, prompt = q.shape[2], pk.shape[1]
    own = attend(k, v, torch.ones(length, length, dtype=torch.bool).tril())
    of = attend(*(t.expand(len(q), -1, -1, -1) for t in (pk, pv)), torch.ones(length, prompt, dtype=torch.bool))
    return own + gate.view(-1, 1, 1) * of


@pytest.mark.parametrize("rows", [None, 9], ids=["whole", "by rows"])
@pytest.mark.parametrize("cell", [ONE, PER_HEAD, GROUPED_PER_HEAD], ids=["one gate", "per head", "grouped per head"])
def test_the_truth_is_the_autograd_of_the_definition(cell, rows, monkeypatch):
    if rows:
        monkeypatch.setattr(prefix_attention_truth, "CHUNK_BYTES", rows * 8 * cell.S * cell.H // cell.Hkv)
    inputs = inputs_of(cell, CPU)
    found = GatedTruth(inputs)
    leaves = [t.detach().double().requires_grad_() for t in inputs.leaves().values()]
    out = definition(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs.grad.double())
    for name, expected in zip(("out", *LEAVES), (out.detach(), *grads), strict=True):
        whole = found.tail[name] + found.base.get(name, 0.0)
        torch.testing.assert_close(whole, expected)
        torch.testing.assert_close(found.eager[name].double(), expected, rtol=0.05, atol=0.05)
    shut = [*leaves[:5], torch.zeros_like(leaves[5])]
    torch.testing.assert_close(found.base["out"], definition(*shut).detach())


@BOTH
def test_flex_attention_computes_the_same(cell, monkeypatch):
    """Its forward, without compilation; its gradients need a GPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = inputs_of(dataclasses.replace(cell, dtype="fp32"), CPU)
    call, found = peers.build_flex(inputs), GatedTruth(inputs)
    for leaf in call.leaves.values():
        leaf.requires_grad_(False)
    expected = found.tail["out"] + found.base["out"]
    torch.testing.assert_close(call.run_forward().double(), expected, rtol=1e-4, atol=1e-5)


def test_the_baseline_is_pefts_own_layer():
    """AdaptedAttention around a LlamaAttention whose o_proj changes nothing gives what the peer computes."""
    from peft.tuners.adaption_prompt.layer import AdaptedAttention
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    heads, groups, depth, length, prompt = 4, 2, 16, 11, 7
    sizes = {"hidden_size": heads * depth, "num_attention_heads": heads, "num_key_value_heads": groups}
    torch.manual_seed(0)
    layer = LlamaAttention(LlamaConfig(**sizes, attn_implementation="sdpa"), 0)
    nn.init.eye_(layer.o_proj.weight)
    adapted = AdaptedAttention("llama", prompt, layer)
    nn.init.constant_(adapted.adaption_gate, 0.4)
    hidden = torch.randn(2, length, heads * depth)
    still = torch.ones(2, length, depth), torch.zeros(2, length, depth)  # a rotation by nothing
    expected = adapted(hidden_states=hidden, position_embeddings=still, attention_mask=None)[0]

    def heads_of(projection, t):
        return projection(t).detach().unflatten(-1, (-1, depth)).transpose(1, 2)

    q, k, v = (heads_of(p, hidden) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    pk, pv = (heads_of(p, adapted.adaption_prompt)[0] for p in (layer.k_proj, layer.v_proj))
    out = peers.build_peft(GatedInputs(q, k, v, pk, pv, q, gate=adapted.adaption_gate.detach())).run_forward()
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected)


FAULTS = {
    "nothing": (lambda name, t: t, None),
    "gate's gradient 1 % too large": (on("gate", lambda t: t * 1.01), "dgate: gain"),
    "gate's gradient of one sample": (on("gate", lambda t: t / 2), "dgate: gain"),
    "gate's gradient is zero": (on("gate", torch.zeros_like), "dgate: zero everywhere"),
    "dprompt_key without the scale": (on("prompt_key", lambda t: t * 4), "dprompt_key: gain"),
    "dprompt_value without the gate": (on("prompt_value", lambda t: t / 0.4), "dprompt_value: gain"),
    "NaN in one place": (
        on("prompt_key", lambda t: t.clone().index_fill_(1, torch.tensor([3]), torch.nan)),
        "dprompt_key: not f",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_prints_no_speed(fault, measured):
    change, words = FAULTS[fault]
    document = measured([*named(report.FLOOR), planted(definition, LEAVES, change)])
    assert report.problems(document) == []
    row = document["results"][1]
    if words is None:
        assert row["status"] == "ok" and row["median_ms"] > 0 and report.exit_code(document) == 0
    else:
        assert_refused(document, words)


def assert_refused(document, words):
    row = document["results"][-1]
    assert row["status"] == "wrong" and words in row["note"], row["note"]
    assert row["median_ms"] is None and row["overhead_over_floor"] is None and report.exit_code(document) == 3


def wrongly(**changes):
    """Ours, given other arguments than those of the cell: {name: change of what it is}."""

    def attend(inputs, leaves):
        scale = changes.get("scale", 1.0) * inputs.q.shape[-1] ** -0.5
        *five, gate = leaves.values()
        return gated_prompt_attention(*five, changes.get("gate", lambda gate: gate)(gate), scale=scale)

    return ours("fastpeft", "ours", attend=attend)


OURS_WRONG = {
    "the gate 1 % too large": (wrongly(gate=lambda gate: gate * 1.01), "out: gain of the prompt's part 1.0"),
    "the gate's tanh": (wrongly(gate=torch.tanh), "out: gain of the prompt's part 0.9"),
    "no gate": (wrongly(gate=lambda gate: gate / gate.detach()), "out: gain of the prompt's part 2.4"),
    "the scale 2 % too large": (wrongly(scale=1.02), "dquery: gain of the prompt's part 1.0"),
}


@pytest.mark.parametrize("mistake", OURS_WRONG)
def test_a_mistake_of_ours_prints_no_speed(mistake, measured):
    implementation, words = OURS_WRONG[mistake]
    assert_refused(measured([*named(report.FLOOR), implementation]), words)


@BOTH
def test_a_backward_of_the_gated_sum_prints_no_speed(cell, measured, monkeypatch):
    """The mistake that this op invites: δ of the sequence's softmax from O instead of O_s."""
    right = torch_path.forward
    assert measured(named("fastpeft"), [cell])["results"][0]["status"] == "ok"

    def forward(*arguments):
        out, _, lse = right(*arguments)
        return out, out, lse

    monkeypatch.setattr(torch_path, "forward", forward)
    assert_refused(measured(named(report.FLOOR, "fastpeft"), [cell]), "dquery: rms error")


def test_one_head_of_a_gates_gradient_that_is_off_is_seen():
    """Also where the others hide it: 20 % of the smallest head's."""
    inputs = inputs_of(dataclasses.replace(PER_HEAD, H=32, Hkv=32, gates=32), CPU)
    found = GatedTruth(inputs)

    def off(t):
        t = t.clone()
        t[t.abs().argmin()] += 0.2 * t.abs().mean()
        return t

    problems = found.verify(planted(definition, LEAVES, on("gate", off)).build(inputs)).problems
    assert len(problems) == 1 and problems[0].startswith("dgate: rms error"), problems


def test_the_gradient_of_one_gate_is_no_difference_of_nearly_equal_sums():
    """So that its gain says something: the sum is at least five of its terms' standard deviations."""
    inputs = inputs_of(bench.tiers(tiny=True)[0][0], CPU)
    found = GatedTruth(inputs)
    terms = found.tail["out"] / inputs.gate.double() * inputs.grad.double()
    torch.testing.assert_close(terms.sum()[None], found.tail["gate"])
    assert abs(terms.sum()) > 5 * terms.numel() ** 0.5 * terms.std()


def test_saved_bytes_show_what_a_prompt_costs():
    """Ours keeps as much as the floor, O_s in place of out: no weight of the prompt, no repeated key."""
    inputs = inputs_of(Cell("tiny", 2, 8, 2, 64, 10, 16, "fp32"), CPU)
    names = ("frozen", "peft", "sdpa-twice", "fastpeft")
    saved = {name: measure_memory(named(name)[0].build(inputs), CPU).saved for name in names}
    assert saved["fastpeft"] == saved["frozen"]
    weights, rows = 2 * 8 * 64 * 10 * 4, 2 * 8 * 64 * 16 * 4
    assert saved["peft"] - saved["frozen"] >= 2 * weights  # of the softmax, and times the gate
    assert saved["sdpa-twice"] - saved["frozen"] >= rows  # the prompt's result, for the gate's gradient


def test_the_work_is_that_of_the_cost_model():
    cell = bench.tiers(tiny=False)[0][0]
    assert (cell.name, cell.P, cell.gates) == ("llama3-8b", 10, 1)
    sizes = {"B": 8, "H": 32, "Hkv": 8, "S": 2048, "D": 128, "itemsize": 2}
    for passed in cost.PASSES:
        assert cell.work(True, passed) == cost.prefix_attention(passed, **sizes, P=0)
        assert cell.work(False, passed) == cost.gated_prompt_attention(passed, **sizes, P=10)


def test_the_cells_are_llamas_first_then_a_gate_for_each_head():
    first, *others = bench.tiers(tiny=False)
    assert [(c.S, c.Hkv, c.gates) for c in first] == [(2048, 8, 1), (512, 8, 1), (8192, 8, 1)]
    assert [(c.S, c.Hkv, c.gates) for tier in others for c in tier] == [(s, 32, 32) for s in (2048, 512, 8192)]
    assert all(c.B == 8 and c.P == 10 for tier in (first, *others) for c in tier)


def test_strategies_of_the_kernels_are_not_timed_without_a_gpu(measured):
    names = [f"fastpeft:{strategy}" for strategy in GATED_STRATEGIES]
    document = measured(named(report.FLOOR, *names))
    assert document["plan"]["without"]["gated_prompt_attention"] == dict.fromkeys(names, "its kernels need a GPU")


def test_the_cells_of_a_command_line():
    def asked(**options):
        return [(c.name, c.B, c.S, c.P, c.gates) for c in bench.cells(Request(**options))]

    assert asked() == [("llama3-8b", 4, s, 10, 1) for s in (2048, 512, 8192)]
    assert asked(tiny=True, per_head=True, prefixes=(3, 17)) == [("tiny", 2, 32, p, 4) for p in (3, 17)]
    assert asked(shapes=((1, 4, 2, 33, 5, 16),), per_head=True) == [("given", 1, 33, 5, 4)]
    for shape, words in (("bert-base", "for decoders"), ("bloom-560m", "BLOOM"), ("lorafusion-grid", "linear layers")):
        with pytest.raises(FastpeftError, match=words):
            bench.cells(Request(shapes=(shape,)))


@pytest.mark.cuda
@pytest.mark.parametrize("gates", [1, 8])
def test_peers_pass_the_check_on_the_gpu(gates):
    inputs = inputs_of(Cell("tiny", 2, 8, 2, 512, 10, 128, "bf16", gates=gates), torch.device("cuda"))
    found = GatedTruth(inputs)
    for implementation in (i for i in peers.IMPLEMENTATIONS if i.peer and i.name != report.FLOOR):
        if not implementation.compiled:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
