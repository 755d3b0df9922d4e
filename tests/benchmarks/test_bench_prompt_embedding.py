"""The benchmark of prompt_embedding: its truth, its peers, what it refuses, its cells, on tiny shapes."""

import dataclasses

import pytest
import torch

from benchmarks import bench_prompt_embedding as bench
from benchmarks import prompt_embedding_peers as peers
from benchmarks import report
from benchmarks.bench_prompt_embedding import BENCH, Cell, inputs_of
from benchmarks.harness import measure_memory
from benchmarks.predict import predictions
from benchmarks.prompt_embedding_truth import PromptTruth, concatenated
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.errors import FastpeftError
from fastpeft.ops import prompt_embedding
from tests.benchmarks.planted import on, planted

CPU = torch.device("cpu")
CELL = Cell("tiny", 4, 13, 7, 48, 61, "fp32")
HERE = ["peft", "cat", "fastpeft", "fastpeft:torch"]


def named(*names):
    return [i for i in peers.IMPLEMENTATIONS if i.name in names]


@pytest.fixture
def measured(run):
    return lambda implementations, cells=(CELL,): run(implementations, cells, bench=BENCH)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("batch", [1, 4, 33])
def test_every_implementation_that_runs_here_is_right(batch, dtype):
    inputs = inputs_of(dataclasses.replace(CELL, B=batch, dtype=dtype), CPU)
    judge, checked = PromptTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.needs_gpu or implementation.compiled or implementation.name == report.FLOOR:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.gain) == {"prompt"}
        checked.append(implementation.name)
    assert checked == HERE


@pytest.mark.interpreter
def test_the_kernels_are_right():
    (implementation,) = named("fastpeft:fused")
    inputs = inputs_of(dataclasses.replace(CELL, dtype="fp16"), CPU)
    assert PromptTruth(inputs).verify(implementation.build(inputs), implementation.rms_bound).problems == []


def test_the_compiled_peer_compiles_the_concatenation(monkeypatch):
    """Without a compilation, of which a CPU's would take half a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = inputs_of(CELL, CPU)
    assert PromptTruth(inputs).verify(peers.build_compiled(inputs)).problems == []


def test_the_truth_is_the_sum_of_the_samples_in_float64():
    inputs = inputs_of(CELL, CPU)
    found = PromptTruth(inputs)
    leaf = inputs.prompt.double().requires_grad_()
    out = concatenated(inputs.ids, inputs.table.double(), leaf)
    (expected,) = torch.autograd.grad(out, leaf, inputs.grad.double())
    torch.testing.assert_close(found.gradient.tail, expected, rtol=0, atol=0)
    torch.testing.assert_close(found.out.double(), out.detach(), rtol=0, atol=0)


def test_the_baseline_is_pefts_own_forward():
    """What a PeftModelForCausalLM gives its base, for the same prompt and tokens."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=48, **sizes)).to(torch.bfloat16)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    model, seen = peft.get_peft_model(base, config), []
    base.model.register_forward_pre_hook(lambda m, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True)
    prompt = model.prompt_encoder["default"].embedding.weight
    inputs = inputs_of(dataclasses.replace(CELL, dtype="bf16"), CPU)
    inputs.table, inputs.prompt = base.model.embed_tokens.weight.detach(), prompt.detach()
    model(input_ids=inputs.ids)
    (theirs,) = torch.autograd.grad(seen[0], prompt, inputs.grad)
    out, (gradient,) = peers.build_peft(inputs).run()
    assert torch.equal(out, seen[0]) and torch.equal(gradient, theirs)
    assert prompt.dtype == peers.ADAPTER == theirs.dtype


def definition_of(inputs):
    return lambda prompt: concatenated(inputs.ids, inputs.table.double(), prompt)


def one_off(t):
    """One number is the next one up."""
    t = t.clone()
    t.view(-1)[5] = torch.nextafter(t.view(-1)[5], torch.tensor(torch.inf))
    return t


FAULTS = {
    "nothing": (lambda name, t: t, None),
    "one bit of the result": (on("out", lambda t: one_off(t.float())), "out: 1 numbers are not those of the concat"),
    "tokens one row off": (on("out", lambda t: t.roll(1, 1)), "out: "),
    "a prompt of zeros": (on("out", lambda t: t.clone().index_fill_(1, torch.arange(7), 0)), "out: 1344 numbers"),
    "a column of NaN": (on("out", lambda t: t.clone().index_fill_(2, torch.tensor([3]), torch.nan)), "out: 80 num"),
    "gradient 1 % too large": (on("prompt", lambda t: t * 1.01), "dprompt: "),
    "gradient is the mean": (on("prompt", lambda t: t / 4), "dprompt: gain 0.25"),
    "gradient is zero": (on("prompt", torch.zeros_like), "dprompt: zero everywhere"),
    "gradient in bf16": (on("prompt", lambda t: t.bfloat16().double()), "dprompt: rms error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_prints_no_speed(fault, measured):
    change, words = FAULTS[fault]
    implementation = planted(definition_of(inputs_of(CELL, CPU)), ["prompt"], change)
    document = measured([*named(report.FLOOR), implementation])
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


OURS_WRONG = {
    "other tokens": (lambda inputs, prompt: prompt_embedding(inputs.ids + 1, padded(inputs), prompt), "out: "),
    "the prompt is scaled": (lambda inputs, prompt: prompt_embedding(inputs.ids, inputs.table, prompt * 2), "out: "),
    "the result is in fp32": (
        lambda inputs, prompt: prompt_embedding(inputs.ids, inputs.table.float(), prompt),
        "expected (4, 20, 48) torch.bfloat16",
    ),
    "the prompt is cast first": (
        lambda inputs, prompt: prompt_embedding(inputs.ids, inputs.table, prompt.bfloat16()),
        "dprompt: rms error",
    ),
}


def padded(inputs):
    return torch.cat((inputs.table, inputs.table[:1]))


@pytest.mark.parametrize("mistake", OURS_WRONG)
def test_a_mistake_of_ours_prints_no_speed(mistake, measured):
    op, words = OURS_WRONG[mistake]
    cell = dataclasses.replace(CELL, dtype="bf16")
    assert_refused(measured([*named(report.FLOOR), peers.ours("fastpeft", "ours", op=op)], [cell]), words)


def test_the_floor_looks_up_and_has_no_gradient_to_compute():
    inputs = inputs_of(CELL, CPU)
    (floor,) = named(report.FLOOR)
    call = floor.build(inputs)
    out, (nothing,) = call.run()
    assert torch.equal(out, inputs.table[inputs.ids]) and nothing.shape == (1,) and not nothing.any()
    assert list(call.leaves) == ["anchor"] and measure_memory(call, CPU).saved == 0


def test_ours_keeps_nothing_for_backward():
    inputs = inputs_of(CELL, CPU)
    saved = {name: measure_memory(named(name)[0].build(inputs), CPU).saved for name in ("fastpeft", "peft")}
    assert saved["fastpeft"] == 0 and saved["peft"] >= 7 * 8  # the rows' numbers


def test_the_work_is_that_of_the_cost_model():
    cell = bench.tiers(tiny=False)[0][0]
    assert (cell.name, cell.P, cell.vocabulary) == ("llama3-8b", 30, 128256)
    sizes = {"B": 4, "S": 2048, "hidden": 4096, "itemsize": 2}
    for passed in cost.PASSES:
        assert cell.work(True, passed) == cost.prompt_embedding(passed, **sizes, P=0)
        assert cell.work(False, passed) == cost.prompt_embedding(passed, **sizes, P=30)


def test_it_can_be_predicted():
    found = predictions(BENCH, bench.tiers(tiny=False)[0], "fwd", ["h200"])
    (fused,) = (each for each in found if each["impl"] == "fastpeft:fused")
    assert 0 < fused["predicted_overhead"] < 0.02  # 31 / 2048 / 2 more bytes


def test_the_cells():
    first, others = bench.tiers(tiny=False)
    assert [(c.name, c.B, c.S, c.P, c.hidden, c.dtype) for c in first] == [("llama3-8b", 4, 2048, 30, 4096, "bf16")]
    assert [c.P for c in others] == [10, 100]
    (tiny,) = bench.tiers(tiny=True)[0]
    assert (tiny.hidden, tiny.vocabulary, tiny.P) == (64, 61, 30)

    def asked(**options):
        return [(c.name, c.B, c.S, c.P, c.hidden, c.vocabulary, c.dtype) for c in bench.cells(Request(**options))]

    assert asked() == [("llama3-8b", 4, 2048, 30, 4096, 128256, "bf16")]
    assert asked(tiny=True, prefixes=(3, 5)) == [("tiny", 2, 32, p, 64, 61, "fp32") for p in (3, 5)]
    assert asked(shapes=((2, 9, 5, 80),), tiny=True) == [("given", 2, 9, 5, 80, 32000, "fp32")]
    assert [c[1:3] for c in asked(shapes=("bert-base",), batches=(1, 2), seqs=(7,))] == [(1, 7), (2, 7)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((1, 2, 3),)}, "--shape 1,2,3 is not B,S,P,hidden"),
        ({"shapes": ((1, 2, 3, 4),), "prefixes": (5,)}, "--prefix is for shapes by name: 1,2,3,4 is B,S,P,hidden"),
        ({"shapes": ("lorafusion-grid",)}, "prompt_embedding has none of them"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, words):
    with pytest.raises(FastpeftError, match=words):
        bench.cells(Request(**options))


def test_what_is_not_measured_without_a_gpu_is_named(measured):
    document = measured([*named(report.FLOOR, *HERE, "compile", "fastpeft:fused")])
    assert [row["impl"] for row in document["results"]] == [report.FLOOR, *HERE]
    assert {row["status"] for row in document["results"]} == {"ok"}
    assert document["plan"]["without"]["prompt_embedding"] == {
        "compile": "not compiled on the CPU path", "fastpeft:fused": "its kernels need a GPU",
    }  # fmt: skip


@pytest.mark.cuda
def test_peers_pass_the_check_on_the_gpu():
    inputs = inputs_of(Cell("tiny", 4, 512, 30, 1024, 32000, "bf16"), torch.device("cuda"))
    found = PromptTruth(inputs)
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name != report.FLOOR:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
