"""LLaMA-Adapter beside Hugging Face peft on the families that it serves, and the same on those that it refuses."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import (
    WEIGHTS,
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_start,
    by_base_name,
    close,
    pair_of,
    quietly,
    randomise,
    result,
)
from tests.prefix_pair import (
    assert_same_prefix_step,
    padded_left,
    real,
    step_gradients,
    tokens,
    trained_gradients,
    with_positions,
)

KIND = "AdaptionPromptConfig"
SETTINGS = {"task_type": "CAUSAL_LM", "adapter_len": 5, "adapter_layers": 2}
SERVED = ("llama", "mistral", "gpt2", "llama-bias", "llama-tied")  # by peft
ALSO = ("qwen2", "qwen3", "phi", "phi3", "gpt_neox", "gemma2", "gemma3", "mixtral", "olmo2", "granite", "cohere2")
ALSO += ("gpt_oss", "opt", "gemma", "nemotron", "biogpt", "starcoder2", "stablelm", "mistral-wide")


@functools.cache
def base_of(family: str, task: str = "CAUSAL_LM"):
    return tiny(family, task)


def build(family: str, task: str = "CAUSAL_LM"):
    return copy.deepcopy(base_of(family, task))


def pair(family: str, **settings):
    return pair_of(lambda: build(family), {**SETTINGS, **settings}, KIND)


def patched(family: str, task: str = "CAUSAL_LM", gate: float = 0.7, **settings):
    torch.manual_seed(11)
    config = fastpeft.AdaptionPromptConfig(**{**SETTINGS, "task_type": task, **settings})
    model = fastpeft.patch(build(family, task), config).eval()
    open_gates(gate, model)
    return model


@torch.no_grad()
def open_gates(value: float, *models) -> None:
    """They begin at zero, where the prompts do nothing."""
    for model in models:
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:
                parameter.fill_(value)


@torch.no_grad()
def generate(model, **options) -> torch.Tensor:
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, **options}
    torch.manual_seed(3)
    return quietly(model.generate, **{"do_sample": False, **options})


# Beside peft.


def test_gradients_of_gates_are_as_exact_as_in_peft():
    """A gate's is one number whose terms cancel, and the error of one is luck: of many, against float64."""
    hf, ours = pair("llama", adapter_layers=2)
    open_gates(0.7, hf, ours)
    inputs, errors = batch(), [0.0, 0.0]
    for seed in range(24):
        randomise(hf, ours, seed=seed)
        oracle = copy.deepcopy(hf).double()
        gradients = []
        for model in (hf, ours, oracle):
            model.zero_grad()
            model(**inputs).loss.backward()
            gradients.append(trained_gradients(model))
        greatest = max(float(grad.norm()) for grad in gradients[2].values())
        for name, exact in gradients[2].items():
            for i in (0, 1) if "gate" in name else ():
                errors[i] += float((gradients[i][name] - exact).square().sum()) / greatest**2
    assert 0 < errors[1] <= 1.5**2 * errors[0], errors


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", SERVED)
def test_a_family_is_as_in_peft(family, layers, tmp_path):
    hf, ours = pair(family, adapter_layers=layers)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    inputs = batch()
    if family == "gpt2":  # elsewhere the projection's bias is added twice from the start, as in peft
        close(result(ours, inputs), result(base_of(family), inputs), 1e-6)
    # At closed gates only these have a gradient.
    for model in (hf, ours):
        model(**inputs).loss.backward()
    slopes = [{n: p.grad for n, p in by_base_name(model).items() if "adaption" in n} for model in (hf, ours)]
    assert slopes[0].keys() == slopes[1].keys() and len(slopes[0]) == 2 * layers
    for name, grad in slopes[0].items():
        assert (slopes[1][name] - grad).norm() <= 1e-5 * grad.norm()
        assert bool(grad.any()) == ("gate" in name)
    randomise(hf, ours)
    open_gates(0.7, hf, ours)
    for each in (inputs, padded_left(inputs), with_positions(inputs)):
        assert_same_prefix_step(hf, ours, each)
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, lambda: build(family), inputs, tmp_path)


@pytest.mark.parametrize("family", SERVED)
def test_generation_is_that_of_peft(family):
    hf, ours = pair(family)
    open_gates(1.5, hf, ours)
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}):
        assert torch.equal(generate(ours, **options), generate(hf, **options)), options
    expected = generate(ours)
    assert torch.equal(generate(ours, cache_implementation="static"), expected)
    assert not torch.equal(generate(base_of(family)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_starts_as_in_peft_and_is_as_exact(family, dtype, tmp_path):
    hf, ours = pair_of(lambda: tiny(family, dtype=dtype), SETTINGS, KIND)
    assert_same_start(hf, ours)  # prompts and gates in the base's dtype
    open_gates(0.7, hf, ours)
    assert_same_files(hf, ours, tmp_path)
    oracle = copy.deepcopy(hf).double()
    errors = [0.0, 0.0]
    with torch.no_grad():
        for rows in (9, 12, 20):
            inputs = batch(rows=rows)
            exact = real(result(oracle, inputs), inputs)
            for i, model in enumerate((hf, ours)):
                found = real(result(model, inputs), inputs)
                assert found.dtype == dtype
                errors[i] += float((found.double() - exact).square().sum())
    assert 0 < errors[1] <= 1.1**2 * errors[0]


# Where peft refuses.


@pytest.mark.parametrize("family", ALSO)
def test_families_that_peft_refuses_train_save_load_and_generate(family, tmp_path):
    if family != "mistral-wide":
        import peft

        with pytest.raises(ValueError, match="Unsupported model type"):
            quietly(peft.get_peft_model, build(family), peft.AdaptionPromptConfig(**SETTINGS))
    model = patched(family, gate=0.0)
    inputs = batch()
    biased = any(n.endswith("self_attn.o_proj.bias") for n, _ in base_of(family).named_parameters())
    if not biased:
        close(tokens(model, inputs), tokens(base_of(family), inputs), 1e-6)
    open_gates(0.7, model)
    slopes = step_gradients(model, inputs)
    assert len(slopes) == 4 and all(grad.any() for grad in slopes.values())
    model.eval()
    before = float(model(**inputs).loss.detach())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model(**inputs).loss.backward()
        optimiser.step()
    assert float(model(**inputs).loss.detach()) < before
    model.save_pretrained(tmp_path)
    assert {name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)} == {"adaption_prompt", "adaption_gate"}
    loaded = quietly(fastpeft.load_adapter, build(family), tmp_path)
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    found = generate(model)
    assert torch.equal(generate(loaded), found) and torch.equal(generate(model, use_cache=False), found)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi3", "gemma2", "mistral-wide"])
def test_the_formula(family):
    """A module's result is its own and, through its projection, the gate times attention over the prompt alone."""
    inputs = {"input_ids": batch()["input_ids"][:1], "use_cache": False}
    model = patched(family, gate=0.6, adapter_layers=1)
    name, module = next((n, m) for n, m in model.named_modules() if hasattr(m, "adaption_prompt"))
    seen = {}

    def note(module, args, kwargs, out):
        seen.update(out=out[0], args=args, kwargs=kwargs)

    handle = module.register_forward_hook(note, with_kwargs=True)
    outer = {}
    from fastpeft.attention import interface

    original = interface.attend

    def spy(*args, **kwargs):
        outer.update(query=args[1], scaling=kwargs["scaling"])
        return original(*args, **kwargs)

    interface.attend = spy
    try:
        with torch.no_grad():
            model(**inputs)
            handle.remove()
            with_prompt = seen["out"]
            with model.disable_adapter():
                handle = module.register_forward_hook(note, with_kwargs=True)
                model(**inputs)
                without = seen["out"]
    finally:
        interface.attend = original
        handle.remove()
    assert name.endswith(("attn", "attention"))
    query = outer["query"]
    prompt = module.adaption_prompt["default"][0]
    heads, depth = query.shape[1], query.shape[3]
    if hasattr(module, "query_key_value"):
        fused = module.query_key_value(prompt).unflatten(-1, (heads, 3, depth))
        key, value, project = fused[:, :, 1], fused[:, :, 2], module.dense
    elif hasattr(module, "qkv_proj"):
        fused = module.qkv_proj(prompt)[:, heads * depth :].chunk(2, -1)
        (key, value), project = (t.unflatten(-1, (-1, depth)) for t in fused), module.o_proj
    else:
        key, value = (p(prompt).unflatten(-1, (-1, depth)) for p in (module.k_proj, module.v_proj))
        project = module.o_proj
    key, value = (t.transpose(0, 1).repeat_interleave(heads // t.shape[1], 0) for t in (key, value))
    weights = torch.softmax(outer["scaling"] * query @ key.transpose(-1, -2), -1)
    term = (0.6 * weights @ value).transpose(1, 2).flatten(2)
    close(with_prompt - without, term @ project.weight.T, 1e-5)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "SEQ_CLS") for family in ("llama", "mistral", "gpt2", "qwen2", "bert", "roberta")),
        *((family, "TOKEN_CLS") for family in ("llama", "gpt2", "bert")),
        *((family, "QUESTION_ANS") for family in ("llama", "bert")),
    ],
)
def test_heads_are_trained_and_saved(family, task, tmp_path):
    """peft leaves them as they were drawn."""
    model = patched(family, task)
    inputs = batch(task)
    slopes = step_gradients(model, inputs)
    model.eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("modules_to_save" in name for name in trained) and len(trained) == len(slopes)
    randomise(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert sum("adaption" in name for name in saved) == 4 and len(saved) > 4
    loaded = quietly(fastpeft.load_adapter, build(family, task), tmp_path)
    assert torch.equal(result(loaded, inputs), result(model, inputs))


# Beyond peft.


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["direct", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-bias", "gemma2", "phi3"])
def test_checkpointing_changes_no_gradient(family, kwargs):
    expected = step_gradients(patched(family), batch())
    model = patched(family)
    model.gradient_checkpointing_enable(kwargs)
    found = step_gradients(model, batch())
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_packed_sequences_are_as_separate_ones(family):
    model = patched(family)
    ids = batch(rows=1, length=15)["input_ids"].clamp(min=3)
    positions = torch.cat([torch.arange(size) for size in (5, 6, 1, 3)])[None]
    found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    close(found, torch.cat([model(input_ids=part).logits for part in ids.split((5, 6, 1, 3), 1)], 1), 2e-6)


@pytest.mark.parametrize("family", [*SERVED, "gemma2", "phi3", "opt", "gpt_neox"])
def test_unpatched_and_disabled_it_is_the_base_model(family):
    base, inputs = build(family), batch()
    before = snapshot(base)
    with torch.no_grad():
        expected = result(base, inputs)
        torch.manual_seed(0)
        model = fastpeft.patch(base, fastpeft.AdaptionPromptConfig(**SETTINGS))
        open_gates(0.7, model)
        assert not torch.allclose(result(model, inputs), expected)
        with model.disable_adapter():
            assert torch.equal(result(model, inputs), expected)
        for call in (lambda: fastpeft.merge(model), model.merge_and_unload):
            with pytest.raises(fastpeft.PatchError, match="gated prompt"):
                call()
        fastpeft.unpatch(model)
        assert differences(before, snapshot(model)) == []
        assert torch.equal(result(model, inputs), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-bias"])
def test_a_gated_prompt_beside_lora_and_a_prefix(family, tmp_path):
    model = patched(family)
    model.add_adapter("lora", fastpeft.LoraConfig(task_type="CAUSAL_LM", r=4))
    model.add_adapter("prefix", fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    names = ["default", "lora", "prefix"]
    model.set_adapter(names)
    randomise(model)
    inputs = batch()
    slopes = step_gradients(model, inputs)
    model.eval()
    assert all(
        any(part in name for name in slopes) for part in ("adaption_prompt", "adaption_gate", "lora_A", "prefix")
    )
    together = result(model, inputs).detach()
    model.save_pretrained(tmp_path)
    loaded = quietly(fastpeft.load_adapter, build(family), tmp_path)
    for name in names[1:]:
        quietly(loaded.load_adapter, tmp_path / name, adapter_name=name)
    loaded.set_adapter(names)
    close(result(loaded, inputs), together, 1e-6)
    for name in names:
        loaded.set_adapter(name)
        assert not torch.allclose(result(loaded, inputs), together)
        folder = tmp_path if name == "default" else tmp_path / name
        alone = quietly(fastpeft.load_adapter, build(family), folder)
        assert torch.equal(result(loaded, inputs), result(alone, inputs))


def test_two_gated_prompts_add_up():
    model = patched("llama")
    model.add_adapter("other", fastpeft.AdaptionPromptConfig(**{**SETTINGS, "adapter_len": 3}))
    open_gates(0.5, model)
    inputs, outputs = {"input_ids": batch()["input_ids"][:1]}, []
    first = model.model.layers[0].self_attn  # whose input is the same with all of them
    first.register_forward_hook(lambda module, args, out: outputs.append(out[0].detach()))
    with torch.no_grad():
        for names in (["default"], ["other"], ["default", "other"]):
            model.set_adapter(names)
            model(**inputs)
        with model.disable_adapter():
            model(**inputs)
    one, other, both, none = outputs
    close(both - none, one + other - 2 * none, 1e-5)


def test_a_deepcopy_is_a_model_of_its_own():
    model = patched("gpt2")
    expected = result(model, batch()).detach()
    other = copy.deepcopy(model)
    randomise(other)
    assert torch.equal(result(model, batch()), expected)
    assert not torch.allclose(result(other, batch()), expected)
