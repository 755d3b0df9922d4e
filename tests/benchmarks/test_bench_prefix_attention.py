"""The benchmark of prefix attention: its truth, its peers, its ledger and its command line, on tiny shapes."""

import dataclasses
import re
import types

import pytest
import torch

from benchmarks import bench_prefix_attention as bench
from benchmarks import prefix_attention_peers as peers
from benchmarks import prefix_attention_truth as truth
from benchmarks import report
from benchmarks.bench_prefix_attention import BENCH, Cell, inputs_of
from benchmarks.harness import Call, measure_memory
from benchmarks.prefix_attention_truth import LEAVES, PrefixTruth
from benchmarks.request import Request
from fastpeft.dispatch import ATTENTION_STRATEGIES
from fastpeft.errors import FastpeftError
from tests.benchmarks.planted import on, planted

CPU = torch.device("cpu")
GROUPED = Cell("tiny", 2, 4, 2, 40, 7, 16, "bf16")
ALIBI = Cell("tiny-alibi", 2, 4, 4, 40, 7, 16, "bf16", alibi=True)
BOTH_WAYS = Cell("tiny-encoder", 2, 4, 4, 40, 7, 16, "bf16", causal=False)
CELLS = pytest.mark.parametrize("cell", [GROUPED, ALIBI, BOTH_WAYS], ids=["grouped", "alibi", "encoder"])
PEERS = {GROUPED: ["peft", "cat-sdpa", "square"], ALIBI: ["peft-bloom"], BOTH_WAYS: ["peft", "cat-sdpa"]}


def named(*names):
    return [i for i in peers.IMPLEMENTATIONS if i.name in names]


@pytest.fixture
def measured(run):
    return lambda implementations, cells=(GROUPED,): run(implementations, cells, bench=BENCH)


@CELLS
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_implementation_that_runs_here_is_right(cell, dtype):
    inputs = inputs_of(Cell(**{**vars(cell), "dtype": dtype}), CPU)
    judge, checked = PrefixTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.needs_gpu or implementation.compiled or not implementation.serves(inputs):
            continue
        if implementation.name == report.FLOOR:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.rms_ratio) == {"out", *LEAVES} and set(verdict.tail_gain) == {"out", "query"}
        checked.append(implementation.name)
    assert checked == [*PEERS[cell], "fastpeft", "fastpeft:torch"]


def definition(q, k, v, pk, pv, slopes, causal=True):
    """Attention over both sets of keys in float64, for autograd."""
    share = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat((p.expand(len(t), -1, -1, -1), t), 2).repeat_interleave(share, 1) for p, t in ((pk, k), (pv, v))
    )
    scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
    if slopes is not None:
        scores = scores + slopes[:, None, None].double() * torch.arange(keys.shape[2])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(pk.shape[1] if causal else keys.shape[2])
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ values


@pytest.mark.parametrize("rows", [None, 9], ids=["whole", "by rows"])
@CELLS
def test_the_truth_is_the_autograd_of_the_definition(cell, rows, monkeypatch):
    if rows:
        monkeypatch.setattr(truth, "CHUNK_BYTES", rows * 8 * (cell.S + cell.P) * cell.H // cell.Hkv)
    inputs = inputs_of(cell, CPU)
    found = PrefixTruth(inputs)
    leaves = [t.detach().double().requires_grad_() for t in inputs.leaves().values()]
    out = definition(*leaves, inputs.slopes, inputs.causal)
    grads = torch.autograd.grad(out, leaves, inputs.grad.double())
    torch.testing.assert_close(found.base["out"] + found.tail["out"], out.detach())
    torch.testing.assert_close(found.base["query"] + found.tail["query"], grads[0])
    for name, grad in zip(LEAVES[1:], grads[1:], strict=True):
        torch.testing.assert_close(found.tail[name], grad)
    eager = peers.build_fastpeft(inputs, backend="torch").run()[0]
    torch.testing.assert_close(found.eager["out"], eager.detach(), rtol=2e-2, atol=2e-2)


@CELLS
def test_flex_attention_computes_the_same(cell, monkeypatch):
    """Its forward, without compilation; its gradients need a GPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = inputs_of(Cell(**{**vars(cell), "dtype": "fp32"}), CPU)
    call, found = peers.build_flex(inputs), PrefixTruth(inputs)
    for leaf in call.leaves.values():
        leaf.requires_grad_(False)
    expected = found.tail["out"] + found.base["out"]
    torch.testing.assert_close(call.run_forward().double(), expected, rtol=1e-4, atol=1e-5)


def faulty(change):
    return planted(lambda *tensors: definition(*tensors, None), LEAVES, change)


FAULTS = {
    "nothing": (faulty(lambda name, t: t), None),
    "scale of dprefix_key": (faulty(on("prefix_key", lambda t: t * 1.01)), "dprefix_key: gain 1.0"),
    "dprefix_value is zero": (faulty(on("prefix_value", torch.zeros_like)), "dprefix_value: zero everywhere"),
    "dprefix of one sample": (faulty(on("prefix_key", lambda t: t / 2)), "dprefix_key: rms"),
    "NaN in one place": (
        faulty(on("key", lambda t: t.clone().index_fill_(2, torch.tensor([5]), float("nan")))),
        "dkey: not f",
    ),
    "last row unwritten": (
        faulty(on("query", lambda t: t.clone().index_fill_(2, torch.tensor([39]), 0.0))),
        "dquery: rms",
    ),
    "shape": (faulty(on("out", lambda t: t[:, :, :-1])), "out: (2, 4, 39, 16)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_prints_no_speed(fault, measured, capsys):
    implementation, words = FAULTS[fault]
    document = measured([*named(report.FLOOR), implementation])
    assert report.problems(document) == []
    row = document["results"][1]
    if words is None:
        assert row["status"] == "ok" and row["median_ms"] > 0 and report.exit_code(document) == 0
    elif fault == "shape":  # autograd itself refuses a gradient of another shape
        assert row["status"] == "failed"
    else:
        assert row["status"] == "wrong" and words in row["note"], row["note"]
        assert row["median_ms"] is None and report.exit_code(document) == 3


def test_a_prefix_that_is_left_out_or_scaled_is_seen():
    inputs = inputs_of(GROUPED, CPU)
    leaves = inputs.leaves()

    def scaled(factor):
        q, k, v, pk, pv = leaves.values()
        return definition(q, k, v, pk, pv * factor, None).to(q.dtype)

    found = PrefixTruth(inputs)
    for factor in (0.98, 1.02):
        problems = found.verify(Call(lambda f=factor: scaled(f), leaves, inputs.grad), 10.0).problems
        assert any(problem.startswith("out: gain of the prefix's part") for problem in problems), problems


def test_the_baseline_is_hfs_own_way():
    """peft's cache and transformers' functions give what the peers compute."""
    from transformers import DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    inputs = inputs_of(GROUPED, CPU)
    rows = tuple(t.expand(2, -1, -1, -1) for t in (inputs.pk, inputs.pv))
    k, v = DynamicCache([rows]).update(inputs.k, inputs.v, 0)
    mask = peers.causal_mask(inputs).expand(2, 1, -1, -1)
    out = sdpa_attention_forward(types.SimpleNamespace(num_key_value_groups=2), inputs.q, k, v, mask)[0]
    assert torch.equal(peers.build_peft(inputs).run_forward(), out.transpose(1, 2))
    bloom = peers.build_bloom(inputs_of(ALIBI, CPU)).frozen["alibi"]
    assert torch.equal(bloom, build_alibi_tensor(torch.ones(2, 47), 4, torch.bfloat16))


def test_saved_bytes_show_what_a_prefix_costs():
    """HF keeps repeated keys and a mask of numbers; ours the same as the floor, and the prefix is a parameter."""
    inputs = inputs_of(Cell("tiny", 2, 8, 2, 64, 8, 16, "fp32"), CPU)
    saved = {name: measure_memory(named(name)[0].build(inputs), CPU).saved for name in ("frozen", "peft", "fastpeft")}
    assert saved["fastpeft"] == saved["frozen"]
    assert saved["peft"] - saved["frozen"] >= 2 * 4 * 2 * (8 * 72 - 2 * 64) * 16


def test_the_work_of_llamas_attention():
    cell = Cell("llama3-8b", 8, 32, 8, 2048, 30, 128, "bf16")
    base, ours = (cell.work(frozen, "fwd+bwd") for frozen in (True, False))
    assert base.flops == pytest.approx((275 + 687) * 1e9, rel=2e-3)
    assert ours.flops / base.flops - 1 == pytest.approx(2 * 30 / 2048)
    assert base.bytes == pytest.approx((336 + 671) * 1e6, rel=5e-3)  # and the statistics of the rows
    assert cell.work(False, "fwd") + cell.work(False, "bwd") == ours
    encoder = dataclasses.replace(cell, causal=False)
    assert encoder.work(True, "fwd").flops == 2 * cell.work(True, "fwd").flops


def asked(**options):
    return [(c.name, *(getattr(c, size) for size in bench.SIZES.split(","))) for c in bench.cells(Request(**options))]


def test_the_cells_of_a_command_line():
    llama = ("llama3-8b", 4, 32, 8)
    assert asked() == [(*llama, s, 30, 128) for s in (2048, 512, 8192)]
    assert asked(quick=True, prefixes=(5, 9)) == [(*llama, 2048, p, 128) for p in (5, 9)]
    assert asked(shapes=("bert-base",), batches=(1, 2), seqs=(7,)) == [
        ("bert-base", b, 12, 12, 7, 30, 64) for b in (1, 2)
    ]
    assert asked(tiny=True) == [("tiny", 2, 4, 2, 32, 30, 16)]
    assert asked(shapes=("bloom-560m", (1, 4, 2, 9, 3, 8))) == [
        ("bloom-560m", 8, 16, 16, 64, 30, 64),
        ("given", 1, 4, 2, 9, 3, 8),
    ]
    found = {name: bench.cells(Request(shapes=(name,)))[0] for name in ("bert-base", "bloom-560m", "llama3-8b")}
    assert {name: (c.causal, c.alibi, c.dtype) for name, c in found.items()} == {
        "bert-base": (False, False, "bf16"),
        "bloom-560m": (True, True, "bf16"),
        "llama3-8b": (True, False, "bf16"),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((8, 32, 8, 512, 30),)}, "8,32,8,512,30 is not B,H,Hkv,S,P,D"),
        ({"shapes": ((1, 4, 3, 64, 8, 16),)}, "H = 4 is no multiple of Hkv = 3"),
        ({"shapes": ((1, 4, 2, 64, 8, 16),), "prefixes": (3,)}, "--prefix is for shapes by name"),
        ({"shapes": ((1, 4, 2, 64, 8, 16),), "seqs": (3,)}, "--batch and --seq are for shapes by name"),
        ({"shapes": ("lorafusion-grid",)}, "is of linear layers"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(FastpeftError, match=re.escape(words)):
        bench.cells(Request(**options))


def test_strategies_of_the_kernels_are_not_timed_without_a_gpu(measured):
    names = [f"fastpeft:{strategy}" for strategy in ATTENTION_STRATEGIES]
    document = measured(named(report.FLOOR, *names))
    assert document["plan"]["without"]["prefix_attention"] == dict.fromkeys(names, "its kernels need a GPU")


@pytest.mark.parametrize("strategy", ["merge", "concat"])
def test_a_strategy_is_missing_where_the_vendor_cannot(strategy):
    from benchmarks.baselines import Missing

    with pytest.raises(Missing, match="ALiBi is the kernels' own"):
        named(f"fastpeft:{strategy}")[0].build(inputs_of(ALIBI, CPU))


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(2, 8, 2, 512, 30, 128), (2, 8, 8, 64, 30, 64)], ids=["grouped", "alibi"])
def test_peers_pass_the_check_on_the_gpu(sizes):
    inputs = inputs_of(Cell("tiny", *sizes, "bf16", alibi=sizes[2] == 8), torch.device("cuda"))
    found = PrefixTruth(inputs)
    for implementation in (i for i in peers.IMPLEMENTATIONS if i.peer and i.name != report.FLOOR):
        if implementation.serves(inputs) and not implementation.compiled:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
