"""LLaMA-Adapter on families whose attention computes its scores itself, on encoders, on encoder-decoder models, and on
what reads sounds and pictures: HF peft has none of them."""

import inspect

import pytest
import torch

import fastpeft
from fastpeft.attention import interface
from tests.models import batch_for, differences, longer, snapshot, tiny
from tests.peft_pair import close, quietly, randomise, result
from tests.prefix_pair import padded_left, prefixed, real, step_gradients

OWN_SCORES = ("bloom", "falcon", "falcon-alibi", "falcon-mq", "falcon-new", "gptj", "codegen", "gpt_neo", "mpt")
OTHERS = ("gpt_bigcode", "gpt_bigcode-heads", "qwen3_moe", "persimmon", "glm", "m2m_100")
CASES = [
    *((family, "CAUSAL_LM") for family in (*OWN_SCORES, *OTHERS[:-1])),
    *((family, "SEQ_2_SEQ_LM") for family in ("t5", "t5-wide", "mt5", "bart", "mbart", "pegasus", "whisper")),
    *((family, "SEQ_CLS") for family in ("bert", "roberta", "electra-small", "distilbert", "deberta-v2", "modernbert")),
    *((family, "SEQ_CLS") for family in ("albert", "albert-inner", "bloom", "gptj", "t5", "bart", "whisper", "vit")),
    *(
        (family, "TOKEN_CLS")
        for family in ("distilbert", "deberta-v2", "modernbert", "albert", "t5", "bloom", "falcon-mq")
    ),
    *((family, "QUESTION_ANS") for family in ("distilbert", "deberta-v2", "modernbert", "albert", "t5-wide", "mbart")),
    *((family, "QUESTION_ANS") for family in ("falcon", "gpt_neo")),
]


def made(family: str, task: str, base=None, gate: float = 0.7, layers: int = 2, **settings):
    base = tiny(family, task) if base is None else base
    torch.manual_seed(11)
    config = fastpeft.AdaptionPromptConfig(task_type=task, adapter_len=5, adapter_layers=layers, **settings)
    return opened(fastpeft.patch(base, config).eval(), gate)


@torch.no_grad()
def opened(model, gate: float = 0.7):
    for name, parameter in model.named_parameters():
        if "adaption_gate" in name:
            parameter.fill_(gate)
    return model


def read(model, inputs: dict) -> torch.Tensor:
    """The logits, of real tokens where there is a row for each."""
    found = result(model, inputs).detach()
    if "attention_mask" in inputs and found.ndim == 3 and found.shape[0] == 2 and "start_positions" in inputs:
        return found.masked_fill(inputs["attention_mask"][None] == 0, 0)
    return real(found, inputs) if "attention_mask" in inputs else found


@pytest.mark.parametrize(("family", "task"), CASES)
def test_it_trains_saves_loads_and_leaves(family, task, tmp_path):
    base, inputs = tiny(family, task), batch_for(family, task)
    before = snapshot(base)
    with torch.no_grad():
        expected, loss = read(base, inputs), base(**inputs).loss
    model = made(family, task, base, gate=0.0)
    close(read(model, inputs), expected, 2e-6)  # a closed gate is neutral
    if task == "QUESTION_ANS":  # whose loss looks at padding
        close(model(**inputs).loss, loss, 2e-6)
    trained = {
        name: parameter for name, parameter in opened(model).train().named_parameters() if parameter.requires_grad
    }
    assert sum("adaption" in name for name in trained) == 4
    assert any("modules_to_save" in name for name in trained) == (task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))
    optimiser, losses = torch.optim.AdamW(trained.values(), lr=3e-3), []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for name, parameter in trained.items():
            # A bias moves the logits of all places alike, which changes no share of them.
            assert parameter.grad.any() or (task == "QUESTION_ANS" and name.endswith("bias")), name
        optimiser.step()
    losses.append(float(model(**inputs).loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1], losses

    model.eval().save_pretrained(tmp_path)
    loaded = quietly(fastpeft.load_adapter, tiny(family, task), tmp_path)
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    if "input_ids" in inputs and task != "SEQ_2_SEQ_LM":
        size, found = inputs["input_ids"].shape[1], read(model, longer(inputs))
        close(found[..., :size] if task == "QUESTION_ANS" else found, read(model, inputs), 2e-6)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []
    with torch.no_grad():
        assert torch.equal(read(model, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", [*OWN_SCORES, "gpt_bigcode-heads", "whisper", "t5-wide"])
def test_generation_is_the_same_with_and_without_a_cache(family):
    task = "CAUSAL_LM" if family not in ("whisper", "t5-wide") else "SEQ_2_SEQ_LM"
    model = made(family, task, gate=4.0, layers=1)
    inputs = {key: value for key, value in batch_for(family, task).items() if key != "labels"}
    inputs = padded_left(inputs) if task == "CAUSAL_LM" else inputs
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = quietly(model.generate, **inputs, **options)
    assert torch.equal(quietly(model.generate, **inputs, **options, use_cache=False), found)
    with model.disable_adapter():
        assert not torch.equal(quietly(model.generate, **inputs, **options), found)


CHECKPOINTS = [{"use_reentrant": False}, {"use_reentrant": True}]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=["direct", "reentrant"])
@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "CAUSAL_LM") for family in ("bloom", "falcon", "gptj", "codegen", "gpt_neo", "mpt")),
        *(("deberta-v2", "SEQ_CLS"), ("modernbert", "TOKEN_CLS"), ("distilbert", "SEQ_CLS"), ("vit", "SEQ_CLS")),
        *(("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_CLS"), ("whisper", "SEQ_2_SEQ_LM")),
    ],
)
def test_checkpointing_changes_no_gradient(family, task, kwargs):
    inputs = batch_for(family, task)
    expected = step_gradients(made(family, task), inputs)
    model = made(family, task)
    model.gradient_checkpointing_enable(kwargs)
    assert any(module.__dict__.get("gradient_checkpointing") for module in model.modules())
    found = step_gradients(model, inputs)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-6 * grad.norm(), name


# The formula.


class Seen(Exception):
    """Ends a call of a module as soon as its keys and values are known."""


class Cache:
    def update(self, key, value, *_):
        raise Seen(key, value)


def keys_of_tokens(module, given: dict, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, P, D) each: what the module itself makes of P states, each the first token of a sequence, for its cache;
    at the first place a rotation changes nothing."""
    cache = next(name for name in ("layer_past", "past_key_values") if name in given)
    given = {**given, "hidden_states": states[:, None], cache: Cache(), "attention_mask": None}
    if given.get("position_ids") is not None:
        given["position_ids"] = torch.zeros(len(states), 1, dtype=torch.long)
    if given.get("position_embeddings") is not None:
        cos = given["position_embeddings"][0][:1, :1]
        given["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(cos)
    with pytest.raises(Seen) as seen:
        module.forward(**{**given.pop("kwargs", {}), **given})
    return tuple(t[:, :, 0].transpose(0, 1) for t in seen.value.args)


def by_name(module, states: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of modules that have no cache."""
    if hasattr(module, "Wqkv"):
        pair = module.Wqkv(states).chunk(3, -1)[1:]
    else:
        names = [("key_proj", "value_proj"), ("k_lin", "v_lin"), ("k", "v"), ("key", "value"), ("k_proj", "v_proj")]
        names = next(pair for pair in names if hasattr(module, pair[0]))
        pair = [getattr(module, name)(states) for name in names]
    return tuple(t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in pair)


PROJECTIONS = ("dense", "out_proj", "out_lin", "Wo", "o", "c_proj", "o_proj")
UNCACHED = ("deberta-v2", "modernbert", "distilbert", "bert", "vit", "t5", "t5-wide", "whisper")


@torch.no_grad()
@pytest.mark.parametrize("family", [*OWN_SCORES, *OTHERS[:2], "phi3", *UNCACHED])
def test_the_formula(family, monkeypatch):
    """A module's result is its own and, through its projection, the gate times attention over the prompt alone, whose
    keys and values are what the module makes of the prompt itself."""
    task = "CAUSAL_LM" if family not in UNCACHED else "SEQ_2_SEQ_LM" if family[:2] in ("t5", "wh") else "SEQ_CLS"
    inputs, plain = batch_for(family, task), tiny(family, task)
    inputs.pop("attention_mask", None)  # what is at padding is not looked at
    if task == "CAUSAL_LM":
        inputs["use_cache"] = False
    model = made(family, task, gate=0.6, layers=1)
    path, module = next((n, m) for n, m in model.named_modules() if "default" in getattr(m, "adaption_prompt", ()))
    seen, op = {}, interface.gated_prompt_attention

    def spy(query, *args, **kwargs):
        seen.update(query=query, scale=kwargs["scale"])
        return op(query, *args, **kwargs)

    monkeypatch.setattr(interface, "gated_prompt_attention", spy)
    original = plain.get_submodule(path)
    outputs = []
    for each, target in ((model, module), (plain, original)):

        def note(module, args, kwargs, out):
            bound = inspect.signature(type(original).forward).bind(module, *args, **kwargs)
            bound.apply_defaults()
            seen["given"] = {k: v for k, v in bound.arguments.items() if k != "self"}
            outputs.append(out[0])

        handle = target.register_forward_hook(note, with_kwargs=True)
        each(**inputs)
        handle.remove()
    query, prompt = seen["query"].float(), module.adaption_prompt["default"][0]
    if family in UNCACHED:
        key, value = by_name(original, prompt, query.shape[1])
    else:
        key, value = keys_of_tokens(original, seen["given"], prompt)
    key, value = (t.repeat_interleave(query.shape[1] // len(t), 0) for t in (key, value))
    weights = torch.softmax(seen["scale"] * query @ key.transpose(1, 2), -1)
    term = 0.6 * (weights @ value).transpose(1, 2).flatten(2)
    project = next((getattr(original, name) for name in PROJECTIONS if hasattr(original, name)), None)
    term = term if project is None else project(term) - project(torch.zeros_like(term))
    assert term.abs().max() > 1e-3
    close(outputs[0] - outputs[1], term, 2e-5, floor=2e-6 * float(outputs[1].abs().max()))


# Beside other adapters, and what cannot be.


@pytest.mark.parametrize(
    ("family", "task"), [("bloom", "CAUSAL_LM"), ("gptj", "CAUSAL_LM"), ("deberta-v2", "TOKEN_CLS")]
)
def test_a_gated_prompt_beside_a_prefix_and_lora(family, task):
    model = prefixed(family, task)
    model.add_adapter("gated", fastpeft.AdaptionPromptConfig(task_type=task, adapter_len=3, adapter_layers=1))
    model.add_adapter("lora", fastpeft.LoraConfig(task_type=task, r=2))
    names = ["default", "gated", "lora"]
    model.set_adapter(names)
    randomise(opened(model))
    inputs = batch_for(family, task)
    together = result(model, inputs).detach()
    for left in names:
        model.set_adapter([name for name in names if name != left])
        assert not torch.allclose(result(model, inputs), together)
    model.set_adapter(names)
    model(**inputs).loss.backward()
    for part in ("adaption_prompt.gated", "adaption_gate.gated", "prompt_encoder.default", "lora_B.lora"):
        grads = [p.grad for n, p in model.named_parameters() if part in n]
        assert grads and all(grad.any() for grad in grads), part
    model.delete_adapter("default")
    model.set_adapter("gated")
    alone = result(model, inputs)
    model.delete_adapter("lora")
    assert torch.equal(result(model, inputs), alone)
    with model.disable_adapter():
        assert not torch.allclose(result(model, inputs), alone)


def test_a_layer_below_the_gated_prompts_is_as_before():
    """BLOOM's is a patched one all the same, as its own forward knows none of our masks."""
    inputs, plain, outputs = batch_for("bloom", "CAUSAL_LM"), tiny("bloom"), []
    model = made("bloom", "CAUSAL_LM", layers=1)
    for each in (plain, model):
        first = each.transformer.h[0].self_attention
        first.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        with torch.no_grad():
            each(**inputs, use_cache=False)
    assert torch.equal(*outputs)
    ops = {layer.path: layer.op for layer in fastpeft.report(model).layers}
    assert ops == {
        "transformer.h.0.self_attention": "torch modules",
        "transformer.h.1.self_attention": "gated_prompt_attention",
    }


def test_layers_that_share_a_module_share_its_prompt():
    model = made("albert-one", "SEQ_CLS", layers=1)
    assert sum("adaption_prompt" in name for name, _ in model.named_parameters()) == 1
    with pytest.raises(fastpeft.TargetError, match="has 1 attention modules called 'attention', which 3 layers share"):
        made("albert-one", "SEQ_CLS", layers=2)


def test_projections_that_are_not_known_are_named():
    import transformers

    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    settings |= {"intermediate_size": 48, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    settings |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2}
    config = transformers.AutoConfig.for_model("deepseek_v3", **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = snapshot(model)
    with pytest.raises(fastpeft.TargetError) as caught:
        fastpeft.patch(model, fastpeft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1))
    for word in ("DeepseekV3Attention", "cannot carry a gated prompt", "own projections", "kv_b_proj", "LoRA"):
        assert word in str(caught.value)
    assert differences(before, snapshot(model)) == []
