"""benchmarks/memory.py against what autograd saves and what a step allocates, storage by storage."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
from benchmarks import memory
from tests.memory import Allocations, saved_for_backward

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")

SIZES = memory.Sizes(hidden=256, queries=128, keys=64, heads=4, mlp=704, layers=1, vocabulary=500)
RANK, TOKENS = 8, 96


def made(implementation: str, layers: int, dropout: float):
    torch.manual_seed(0)
    depth = SIZES.queries // SIZES.heads
    config = LlamaConfig(
        hidden_size=SIZES.hidden, num_hidden_layers=layers, num_attention_heads=SIZES.heads, head_dim=depth,
        num_key_value_heads=SIZES.keys // depth, intermediate_size=SIZES.mlp, vocab_size=SIZES.vocabulary,
        use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    numbers = dict(r=RANK, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    if implementation == "peft":
        return peft.get_peft_model(base, peft.LoraConfig(**numbers)).train()
    model = fastpeft.patch(base, fastpeft.LoraConfig(**numbers)).train()
    again = implementation == "fastpeft, recompute"
    return model if implementation == "fastpeft" else fastpeft.fuse(model, "mlp", recompute=again)


def counted(implementation: str, layers: int, dropout: float) -> int:
    model = made(implementation, layers, dropout)
    ids = torch.randint(0, SIZES.vocabulary, (1, TOKENS))
    with saved_for_backward(besides=model.parameters()) as saved:
        model(input_ids=ids, labels=ids)
    return sum(saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("implementation", memory.IMPLEMENTATIONS)
def test_a_layer_keeps_what_the_model_says(implementation, dropout):
    one, two = (counted(implementation, layers, dropout) for layers in (1, 2))
    layer = TOKENS * memory.per_token(SIZES, implementation, RANK, bool(dropout), mask_bytes=4)
    seeds = 7 * 8 if dropout and implementation != "peft" else 0
    assert two - one == layer + seeds


def test_beside_the_layers_it_keeps_what_the_model_says():
    layer = memory.per_token(SIZES, "fastpeft", RANK, False)
    rest = counted("fastpeft", 1, 0.0) - TOKENS * layer
    assert rest - TOKENS * memory.outside(SIZES) == 8 + 4  # one label more, and a number of the mean


def test_dropout_costs_a_seed_a_layer():
    assert counted("fastpeft", 2, 0.1) - counted("fastpeft", 2, 0.0) == 2 * 7 * 8


@pytest.mark.parametrize("implementation", memory.IMPLEMENTATIONS)
def test_a_whole_step_peaks_at_what_the_model_says(implementation, monkeypatch):
    """Of so many words that the peak is in the loss's backward, as it is of 128,000: of what is kept the labels are
    gone there, and a number more than the seeds is alive."""
    monkeypatch.setitem(globals(), "SIZES", dataclasses.replace(SIZES, vocabulary=8000))
    model = made(implementation, 2, 0.1)
    ids = torch.randint(0, SIZES.vocabulary, (1, TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()  # what a process keeps is there now
    model.zero_grad()
    with Allocations() as allocated:
        out = model(input_ids=ids, labels=ids)
        forward = allocated.peak
        out.loss.backward()
    each = 2 * memory.per_token(SIZES, implementation, RANK, True, mask_bytes=4)
    expected = TOKENS * (each + memory.outside(SIZES) + memory.logits(SIZES) - 8) + 8
    if implementation == "peft":  # the first q, k and v, whose input wants no gradient, have no masks
        expected -= TOKENS * 3 * SIZES.hidden * 4
    else:
        expected += 2 * 7 * 8
    assert allocated.peak == expected
    assert expected - forward > 3 * TOKENS * SIZES.vocabulary  # of the 4 bytes that the second gradient adds


def test_the_weights_are_counted():
    model = made("fastpeft", 1, 0.0)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    norms = 3 * SIZES.hidden
    assert memory.weights(SIZES) == 2 * (frozen - norms)


def test_sixteen_thousand_tokens_of_an_eight_billion_model_fit(capsys):
    """Without checkpointing, on one GPU of 139 GiB; peft's own need more than that with dropout."""
    sizes = memory.sizes_of(memory.GEOMETRIES["llama3-8b"])
    most = {each: memory.most_tokens(sizes, each, 16, True, 139 << 30) for each in memory.IMPLEMENTATIONS}
    assert most["fastpeft, recompute"] > most["fastpeft, MLP fused"] > most["fastpeft"] > 16384 > most["peft"]
    assert memory.main(["--tokens", "16384"]) == 0
    out = capsys.readouterr().out
    assert "llama3-8b" in out and f"{most['peft']:,}" in out
