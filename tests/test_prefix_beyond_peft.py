"""What a prefix inside attention can do and one in the cache cannot: checkpointing, dropout, packed sequences, windows
that leave it alone, torch.compile; and what it must leave as it was."""

import pytest
import torch

import fastpeft
from fastpeft.attention.interface import plain_mask
from fastpeft.attention.masks import Mask
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import close, result
from tests.prefix_pair import prefixed, real, step_gradients, task_of

FAMILIES = (
    *("llama", "gpt2", "bloom", "gemma3", "opt", "t5", "bert", "mistral", "mpt", "gptj", "falcon", "gpt_neo"),
    "bart",
)
TABLE = "prompt_encoder.default.embedding.weight"


# Checkpointing. peft refuses it, or trains without the prefix.

CHECKPOINTS = [{"use_reentrant": False}, {"use_reentrant": True}]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=["direct", "reentrant"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family, before, kwargs):
    task = task_of(family)
    for projection in (False, True):
        expected = step_gradients(prefixed(family, prefix_projection=projection), batch(task))
        base = tiny(family, task).train()
        if before:
            base.gradient_checkpointing_enable(kwargs)
        model = prefixed(family, base=base, prefix_projection=projection)
        if not before:
            model.gradient_checkpointing_enable(kwargs)
        assert any(module.__dict__.get("gradient_checkpointing") for module in model.modules())
        found = step_gradients(model, batch(task))
        for name, grad in expected.items():
            if family == "t5" or projection:  # the layers' shares are summed in another order
                assert (found[name] - grad).norm() <= 1e-6 * grad.norm(), name
            else:
                assert torch.equal(found[name], grad), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=["direct", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5"])
def test_dropout_of_attention_is_drawn_again_in_a_checkpoint(family, kwargs):
    task = task_of(family)

    def seeded(model):
        torch.manual_seed(5)
        return step_gradients(model, batch(task))

    def build():
        base = tiny(family, task)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.3)
        return prefixed(family, base=base)

    model = build()
    expected = seeded(model)
    assert not torch.equal(expected[TABLE], step_gradients(prefixed(family), batch(task))[TABLE])
    again = seeded(model)
    assert torch.equal(again[TABLE], expected[TABLE])
    torch.manual_seed(6)
    assert not torch.equal(step_gradients(model, batch(task))[TABLE], expected[TABLE])
    model.gradient_checkpointing_enable(kwargs)
    close(seeded(model)[TABLE], expected[TABLE], 1e-6)


def test_dropout_has_the_mean_of_none():
    """Of 400 passes with half of the weights left out, in a model of one layer, where the mean goes through."""
    base = tiny("gpt2")
    del base.transformer.h[1:]
    base.config.n_layer = base.config.num_hidden_layers = 1
    base.transformer.h[0].mlp = torch.nn.Identity()
    for module in base.modules():
        if type(module).__name__ == "GPT2Attention":
            module.attn_dropout.p = 0.5
    model = prefixed("gpt2", base=base)
    kept = {}
    base.transformer.h[0].attn.register_forward_hook(
        lambda module, args, out: kept.setdefault("out", []).append(out[0])
    )
    inputs = {"input_ids": batch()["input_ids"][:1]}
    with torch.no_grad():
        model(**inputs)
        exact = kept.pop("out")[0]
        torch.manual_seed(0)
        model.train()
        for _ in range(400):
            model(**inputs)
    found = torch.stack(kept["out"])
    error = (found.mean(0) - exact) / (found.std(0) / 20)
    assert found.std(0).mean() > 0.01 and error.square().mean() < 2 and error.abs().max() < 6


# Packed sequences.

# In transformers OPT, BLOOM, MPT, Falcon and gpt-oss do not know packed sequences, prefix or not: their masks are made
# without position_ids.
PACKING = ("llama", "gpt2", "gemma3", "mistral", "qwen3", "phi", "gpt_neox", "gemma2", "cohere2", "gptj", "codegen")
SIZES = (5, 6, 1, 3)


def packed(sizes=SIZES, rows: int = 1):
    ids = batch(rows=rows, length=sum(sizes))["input_ids"].clamp(min=3)
    positions = torch.cat([torch.arange(size) for size in sizes]).expand(rows, -1)
    return ids, positions


def separate(model, ids, sizes=SIZES) -> torch.Tensor:
    return torch.cat([model(input_ids=part).logits for part in ids.split(sizes, 1)], 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKING)
def test_packed_sequences_each_see_the_prefix_and_themselves(family, implementation):
    base = tiny(family)
    base.config._attn_implementation_internal = implementation
    model = prefixed(family, base=base)
    ids, positions = packed()
    weight = torch.randn(ids.shape[1], 97, generator=torch.Generator().manual_seed(1))
    results = []
    for logits in (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits,
        separate(model, ids),
    ):
        model.zero_grad()
        (logits * weight).sum().backward()
        results.append((logits.detach(), model.get_parameter(TABLE).grad.clone()))
    (found, slope), (expected, expected_slope) = results
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (slope - expected_slope).norm() <= 1e-5 * expected_slope.norm()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows_of_a_batch_and_checkpointing(family):
    model = prefixed(family)
    ids, positions = packed(rows=3)
    expected = separate(model, ids)
    assert (model(input_ids=ids, position_ids=positions, use_cache=False).logits - expected).abs().max() < 1e-5
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}
    plain = step_gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(step_gradients(model, inputs)[TABLE], plain[TABLE])


def test_packed_sequences_of_the_padding_free_collators():
    """Which say where the sequences end."""
    model = prefixed("llama")
    ids, positions = packed()
    ends = torch.tensor([0, *SIZES], dtype=torch.int32).cumsum(0).to(torch.int32)
    lengths = {"max_length_q": max(SIZES), "max_length_k": max(SIZES)}
    found = model(
        input_ids=ids, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False, **lengths
    )
    close(found.logits, separate(model, ids), 2e-6)


# What is left alone.


OWN_SCORES = ("bloom", "mpt", "gptj", "falcon", "gpt_neo")  # whose implementation is none of transformers' names
IMPLEMENTED = [
    *((family, None) for family in (*FAMILIES, "gemma2", "gpt_oss", "m2m_100", "pegasus_x", "gpt_bigcode")),
    *((family, "eager") for family in (*FAMILIES, "m2m_100", "gpt_bigcode") if family not in OWN_SCORES),
]


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTED)
def test_disabled_and_unpatched_it_is_the_base_model(family, implementation):
    task = task_of(family)
    inputs = batch(task)
    base = tiny(family, task)
    if implementation is not None:
        base.set_attn_implementation(implementation)
    named = base.config._attn_implementation
    with torch.no_grad():  # in which torch chooses one kernel, whether or not the base wants gradients
        expected = result(base, inputs)
        before, settings = snapshot(base), dict(base.config.to_dict())
        model = prefixed(family, base=base)
        assert not torch.allclose(result(model, inputs), expected)
        with fastpeft.disable_adapter(model):
            found = result(model, inputs)
        if family == "falcon":  # asks its configuration, which names us, and takes its eager way
            close(found, expected, 1e-6)
        else:
            assert torch.equal(found, expected)
    step_gradients(model, inputs)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []
    assert model.config.to_dict() == settings and model.config._attn_implementation == named
    with torch.no_grad():
        assert torch.equal(result(model, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart", "m2m_100"])
def test_encoder_and_cross_attention_keep_their_implementation(family, implementation):
    base = tiny(family, "SEQ_2_SEQ_LM")
    base.set_attn_implementation(implementation)
    encoder, inputs = base.get_encoder(), batch("SEQ_2_SEQ_LM")
    words = {key: value for key, value in inputs.items() if key != "labels"}
    expected = encoder(**words).last_hidden_state
    name = "EncDecAttention" if family == "t5" else "encoder_attn"
    crossing = [module for path, module in base.named_modules() if path.endswith(name)]
    seen = []
    model = prefixed(family, base=base)
    assert torch.equal(encoder(**words).last_hidden_state, expected)
    handles = [module.register_forward_hook(lambda *given: seen.append(given), with_kwargs=True) for module in crossing]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    fastpeft.unpatch(model)
    assert base.config._attn_implementation == implementation and len(seen) == 2
    for module, args, kwargs, out in seen:
        plain = {
            key: plain_mask(value, implementation, torch.float32) if isinstance(value, Mask) else value
            for key, value in kwargs.items()
        }
        assert any(isinstance(value, Mask) for value in kwargs.values())
        assert torch.equal(module(*args, **plain)[0], out[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_base_gets_no_gradients(family):
    model = prefixed(family)
    step_gradients(model, batch(task_of(family)))  # which asserts it
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained[-1] == TABLE and all("prompt_encoder" in n or "modules_to_save" in n for n in trained)


def test_a_prefix_cannot_be_merged():
    model = prefixed()
    before, expected = snapshot(model), result(model, batch())
    for call in (lambda: fastpeft.merge(model), model.merge_and_unload, model.merge_adapter):
        with pytest.raises(fastpeft.PatchError, match="'default' is a prefix, which no weight can hold"):
            call()
        assert differences(before, snapshot(model)) == []
    assert torch.equal(result(model, batch()), expected)


# The prefix beside a window.


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_neo"])
def test_a_pinned_prefix_never_leaves_the_window(family):
    ids = batch(rows=1, length=12)["input_ids"]
    reach = {}
    for window in ("slide", "pin"):
        model = prefixed(family, prefix_window=window)
        logits = model(input_ids=ids).logits[0, -1]
        (slope,) = torch.autograd.grad(logits.square().sum(), model.get_parameter(TABLE))
        reach[window] = slope.view(5, 4, -1).abs().sum((0, 2))
        full = model(input_ids=ids).logits.detach()
        cache, parts = None, []
        for part in ids.split([5, 1, 4, 2], 1):
            with torch.no_grad():
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        close(torch.cat(parts, 1), full, 2e-6)
    assert (reach["pin"] > 0).all()
    # The last token does not hear of one that slides, but through a layer that sees everything.
    assert (reach["slide"] > 0).tolist() == ([True, True, False, False] if family == "gpt_neo" else [False] * 4)


# torch.compile


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_compiled_model_gives_the_same(family):
    torch._dynamo.reset()
    model = prefixed(family)
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        logits = real(run(**inputs, use_cache=False).logits, inputs)
        logits.logsumexp(-1).square().mean().backward()
        results.append((logits.detach(), model.get_parameter(TABLE).grad.clone()))
    close(results[1][0], results[0][0], 1e-6)
    close(results[1][1], results[0][1], 1e-5)
    torch._dynamo.reset()
