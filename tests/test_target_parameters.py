"""LoRA on parameters (`target_parameters`): the experts of transformers' mixtures and other matrices, with HF peft's
wrappers beside ours: names, values, logits, gradients, files, merging, training."""

import copy
import importlib
import pickle
import types
import warnings

import pytest
import torch
from torch import nn

import fastpeft
from tests.memory import Allocations
from tests.models import batch, differences, snapshot, tiny
from tests.parameters_pair import (
    EXPERTS,
    FAMILIES,
    Outer,
    assert_same_tensors,
    experts,
    own,
    patched,
    peft_pair,
    settings_for,
)
from tests.peft_pair import (
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_merged,
    close,
    pair_of,
    quietly,
    result,
)

CELLS = [(family, how) for family in FAMILIES for how in ("grouped_mm", "eager")] + [("qwen3_moe", "batched_mm")]


@pytest.mark.parametrize(("family", "how"), CELLS, ids=lambda each: each)
def test_everything_is_as_in_peft(family, how, tmp_path):
    patterns = {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {r"layers.1.mlp.experts.down_proj": 5}}
    build, inputs = (lambda: experts(family, how)), batch()
    hf, ours = peft_pair(build, **patterns)
    assert_same_tensors(own(ours), own(hf))
    assert own(ours)["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"].shape == (9, 32)
    assert_same_line(hf, ours)
    outputs = [model(**inputs) for model in (hf, ours)]
    close(outputs[1].logits, outputs[0].logits, 1e-5)
    for output in outputs:
        output.loss.backward()
    assert_same_tensors(own(ours, "grad"), own(hf, "grad"), 2e-5)
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, build, inputs, tmp_path)
    assert_same_merged(hf, ours, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_training_are_as_in_peft(family):
    traces, inputs = [], batch()
    for model in peft_pair(lambda: experts(family), init_lora_weights=True):
        trained = [parameter for _, parameter in sorted(own(model, "requires_grad_").items())]
        optimiser = torch.optim.AdamW([each() for each in trained], lr=1e-2)
        losses = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        traces.append(torch.stack(losses))
    close(traces[1], traces[0], 1e-4)
    assert traces[1][-1] < 0.9 * traces[1][0]


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_start_is_peft_s_on_half_precision(init, autocast):
    settings = settings_for(init_lora_weights=init, use_rslora=True)
    build = lambda: experts("gpt_oss", dtype=torch.bfloat16)  # noqa: E731
    hf, ours = pair_of(build, settings, autocast_adapter_dtype=autocast)
    assert_same_tensors(own(ours), own(hf))
    layer = ours.model.layers[0].mlp.experts
    assert layer._fastpeft.adapters["default"].each["down_proj"].scaling == 8 / 2
    exact = copy.deepcopy(hf).double()  # torch multiplies in groups, but not in float64
    exact.set_experts_implementation("eager")
    truth, theirs, mine = (result(model, batch()).double() for model in (exact, hf, ours))
    assert (mine - truth).abs().max() <= 1.2 * (theirs - truth).abs().max()


def test_without_target_modules_as_in_peft():
    for family in (*FAMILIES, "llama"):
        named = ["mlp.gate_proj.weight"] if family == "llama" else EXPERTS
        hf, ours = pair_of(
            lambda family=family: tiny(family), settings_for(target_modules=None, target_parameters=named)
        )
        assert_same_tensors(own(ours), own(hf))
        assert any("q_proj" in name for name in own(ours)) == (family == "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_several_adapters_as_in_peft(family):
    import peft

    hf, ours = peft_pair(lambda: experts(family))
    for model, library in ((hf, peft), (ours, fastpeft)):
        torch.manual_seed(3)
        model.add_adapter("other", library.LoraConfig(r=2, **settings_for(target_parameters=EXPERTS[::-1])))
    inputs, seen = batch(), []
    for names in (["default"], ["other"], ["default", "other"]):
        hf.base_model.set_adapter(names)
        fastpeft.set_adapter(ours, names)
        seen.append(result(ours, inputs))
        close(seen[-1], result(hf, inputs), 1e-5)
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
    with hf.disable_adapter(), fastpeft.disable_adapter(ours):
        assert torch.equal(result(ours, inputs), result(hf, inputs))
    with fastpeft.use_adapter(ours, "other"):
        assert torch.equal(result(ours, inputs), seen[1])
    fastpeft.merge(ours)
    close(result(ours, inputs), seen[2], 1e-5)
    fastpeft.unmerge(ours)
    assert torch.equal(result(ours, inputs), seen[2])
    with fastpeft.status.rescale_adapter_scale(ours, 0.0):
        close(result(ours, inputs), result(tiny(family), inputs), 1e-5)
    quietly(fastpeft.delete_adapter, ours, "default")
    assert torch.equal(result(ours, inputs), seen[1])


def test_unpatching_leaves_nothing():
    for family in FAMILIES:
        model = experts(family)
        before = snapshot(model)
        fastpeft.patch(model, fastpeft.LoraConfig(**settings_for()))
        model(**batch()).loss.backward()
        fastpeft.merge(model)
        fastpeft.unpatch(model)
        assert differences(before, snapshot(model)) == []


def test_copies_and_pickles_compute_the_same():
    for model in (patched("gpt_oss"), patched("llama", target_parameters=["k_proj.weight"])):
        expected = result(model, batch())
        assert torch.equal(result(copy.deepcopy(model), batch()), expected)
        assert torch.equal(result(pickle.loads(pickle.dumps(model)), batch()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = patched("gpt_oss").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        quietly(lambda model=model: model(**batch()).loss.backward())
        gradients.append(own(model, "grad"))
    assert_same_tensors(gradients[1], gradients[0])


def many_experts() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 97}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def test_nothing_of_the_experts_size_is_made():
    inputs, greatest = batch(), {}
    for library, model in zip(("peft", "ours"), peft_pair(many_experts), strict=True):
        with Allocations() as made:
            model(**inputs).loss.backward()
        greatest[library] = max(made.sizes)
    whole = 32 * 32 * 48 * 4
    assert greatest["ours"] < whole / 2 and greatest["peft"] >= 2 * whole


class Routed(nn.Module):
    """Experts of transformers, and the routing that they are called with."""

    def __init__(self, kind, config):
        super().__init__()
        self.experts = kind(config).eval()
        generator = torch.Generator().manual_seed(2)
        for parameter in self.experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2

    def forward(self, x, chosen):
        return self.experts(x, chosen, torch.softmax(chosen.float(), -1))


VARIANTS = {
    "nemotron_h.NemotronHExperts": "up_proj",  # no gate
    "muse_spark.MuseSparkExperts": "gate_up_proj",  # a norm behind
    "aria.AriaExperts": "gate_up_proj",  # (E, K, N)
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "gate_up_proj",  # the same with biases
    "olmoe.OlmoeExperts": "gate_up_proj",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_transformers_experts_as_in_peft(variant):
    family, _, name = variant.partition(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    counts = dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"), 4)
    widths = dict.fromkeys(("moe_intermediate_size", "intermediate_size"), 6)
    config = types.SimpleNamespace(
        **counts, **widths, hidden_size=8, moe_hidden_size=8, moe_latent_size=None, mlp_hidden_act="relu2",
        hidden_act="silu", post_norm_eps=1e-5, swiglu_alpha=1.7, swiglu_limit=7.0, _experts_implementation="eager",
    )  # fmt: skip
    named = [f"experts.{VARIANTS[variant]}", "experts.down_proj"]
    settings = settings_for(target_modules=[], target_parameters=named, task_type=None)
    hf, ours = pair_of(lambda: Routed(getattr(module, name), config), settings)
    assert fastpeft.report(ours).layers[0].op == "expert_lora_linear"
    assert_same_tensors(own(ours), own(hf))
    chosen = torch.tensor([[0, 3], [3, 2], [0, 2], [2, 3], [3, 0]])  # never expert 1
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [model(each, chosen) for model, each in zip((hf, ours), inputs, strict=True)]
    close(results[1], results[0], 1e-5)
    for each in results:
        each.square().sum().backward()
    close(inputs[1].grad, inputs[0].grad, 2e-5)
    assert_same_tensors(own(ours, "grad"), own(hf, "grad"), 2e-5)


def test_compiled_as_one_graph_and_for_other_sizes():
    layer = patched("gpt_oss").model.layers[0].mlp
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    weights = layer.experts.parameters_of("default")
    for rows in (7, 12, 15):
        x = torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(rows), requires_grad=True)
        found = []
        for each in (layer, compiled):
            y = each(x)[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *weights.values()])])
        for ours, expected in zip(*found, strict=True):
            close(ours, expected, 1e-5)


def test_verbs_of_a_patched_model(tmp_path):
    from fastpeft.restoring import restore_adapter
    from fastpeft.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict

    model, other, third = patched("gpt_oss"), patched("gpt_oss", init_lora_weights=True), patched("gpt_oss")
    expected, held = result(model, batch()), get_peft_model_state_dict(model)
    whole = get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert whole.keys() == held.keys() and all(torch.equal(whole[name], held[name]) for name in held)
    assert not torch.equal(result(other, batch()), expected)
    set_peft_model_state_dict(other, {name: each.clone() for name, each in held.items()})
    assert torch.equal(result(other, batch()), expected)
    fastpeft.save_adapter(model, tmp_path)
    with torch.no_grad():
        for each in own(third, "data").values():
            each.zero_()
    restore_adapter(third, tmp_path)
    assert torch.equal(result(third, batch()), expected)
    prompt = batch()["input_ids"][:1, :5]
    generated = [each.generate(input_ids=prompt, max_new_tokens=6, do_sample=False) for each in (model, third)]
    last = model(input_ids=generated[0][:, :-1]).logits[:, 4:].argmax(-1)
    assert torch.equal(generated[0], generated[1]) and torch.equal(generated[0][:, 5:], last)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_and_saved_as_in_peft(bias, tmp_path):
    hf, ours = peft_pair(lambda: experts("gpt_oss"), bias=bias)
    assert sum(p.requires_grad for p in ours.parameters()) == sum(p.requires_grad for p in hf.parameters()) > 10
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, lambda: experts("gpt_oss"), batch(), tmp_path)


@pytest.mark.parametrize("transposed", [None, False, True])
def test_parameters_of_any_module_as_in_peft(transposed, tmp_path):
    named = ["experts.up", "down", "experts.gain", "first.weight", "table.weight"]
    settings = settings_for(target_modules=[], target_parameters=named, task_type=None)
    hf, ours = pair_of(lambda: Outer(transposed), settings)
    assert_same_tensors(own(ours), own(hf))
    ids = torch.tensor([3, 1, 6])
    results = [model(ids) for model in (hf, ours)]
    close(results[1], results[0], 1e-5)
    for each in results:
        each.square().sum().backward()
    assert_same_tensors(own(ours, "grad"), own(hf, "grad"), 1e-5)
    assert_same_files(hf, ours, tmp_path)
    loaded = fastpeft.load_adapter(Outer(transposed), tmp_path / "hf")
    assert torch.equal(loaded(ids), results[1])
    weight = ours.experts.up.detach().clone()
    assert torch.equal(weight, Outer(transposed).experts.up)  # outside of the forward it is the base's
    fastpeft.merge(ours)
    close(ours(ids), results[1], 1e-5)
    fastpeft.unmerge(ours)
    assert torch.equal(ours.experts.up, weight) and torch.equal(ours(ids), results[1])


def test_a_tied_weight_is_untied_by_merging():
    model = patched("llama-tied", target_modules=[], target_parameters=["embed_tokens.weight"])
    expected = result(model, batch())
    head = model.lm_head.weight.detach().clone()
    merged = quietly(fastpeft.merge_and_unload, model)
    close(result(merged, batch()), expected, 1e-5)
    assert torch.equal(merged.lm_head.weight, head) and not torch.equal(merged.model.embed_tokens.weight, head)


def test_the_router_and_biases_of_experts_as_in_peft():
    named = [*EXPERTS, "experts.gate_up_proj_bias", "router.weight"]
    hf, ours = peft_pair(lambda: experts("gpt_oss"), target_parameters=named)
    assert_same_tensors(own(ours), own(hf))
    outputs = [model(**batch()) for model in (hf, ours)]
    close(outputs[1].logits, outputs[0].logits, 1e-5)
    for output in outputs:
        output.loss.backward()
    assert_same_tensors(own(ours, "grad"), own(hf, "grad"), 2e-5)


def test_the_report_says_how_they_are_served():
    model = patched("qwen3_moe", target_parameters=[*EXPERTS, "gate.weight"])
    served = {each.path: each for each in fastpeft.report(model).layers}
    assert served["model.layers.0.mlp.experts"].op == "expert_lora_linear"
    assert "its forward is not known" in served["model.layers.0.mlp.gate"].reason
    assert {each.name for each in fastpeft.status.get_layer_status(model)} == set(served)


@pytest.mark.interpreter
def test_on_triton_where_that_is_demanded():
    inputs, found = batch(), []
    for on in ("torch", "triton"):
        torch.manual_seed(1)
        model = fastpeft.patch(experts("gpt_oss"), fastpeft.LoraConfig(**settings_for()), backend=on)
        output = model(**inputs)
        output.loss.backward()
        assert {each.backend for each in fastpeft.report(model).layers} == {on}
        found.append((output.logits, own(model, "grad")))
    close(found[1][0], found[0][0], 1e-5)
    assert_same_tensors(found[1][1], found[0][1], 2e-5)
    assert not torch.equal(found[1][0], found[0][0])


def test_triton_is_refused_by_patch_where_it_cannot_serve():
    model, config = experts("gpt_oss"), fastpeft.LoraConfig(**settings_for(rank_pattern={"down_proj": 500}))
    before = snapshot(model)
    with pytest.raises(fastpeft.BackendError, match="demanded but cannot serve this call: rank 500 is above"):
        fastpeft.patch(model, config, backend="triton")
    assert differences(before, snapshot(model)) == []


def test_what_has_no_effect_is_said():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        named = [*EXPERTS, "experts.nothing"]
        model = patched("mixtral", target_parameters=named, layers_to_transform=[0], rank_pattern={"up_proj_": 3})
    texts = [str(each.message) for each in said]
    for words in ("target_parameters has 'experts.nothing'", "layers_to_transform does not reach", "'up_proj_'"):
        assert sum(words in text for text in texts) == 1, texts
    assert len(own(model)) == 2 * 4 + 2  # both layers' experts, and q_proj of the first
