"""Adapters on quantised bases beside Hugging Face peft, on the very same quantised weights."""

from functools import partial

import pytest
import torch

import fastpeft
from fastpeft import quantised
from tests.models import batch
from tests.peft_pair import (
    assert_interchangeable,
    assert_same_files,
    assert_same_gradients,
    assert_same_line,
    base_name,
    by_base_name,
    close,
    pair_of,
    quietly,
    randomise,
)
from tests.quantised import KINDS, TORCHAO, checkpoint, load

TARGETS = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
ADALORA = {**TARGETS, "init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2, "deltaT": 1}
STEPS = 3


def pair(kind: str, dtype: torch.dtype = torch.float32, **settings):
    """(peft's model, ours) in training mode, each on its own copy of the quantised model."""
    options = {key: settings.pop(key) for key in ("autocast_adapter_dtype",) if key in settings}
    method = "AdaLoraConfig" if "init_r" in settings else "LoraConfig"
    models = pair_of(partial(load, kind, dtype), {**TARGETS, **settings}, kind=method, **options)
    return [model.train() for model in models]


def loss_of(model, inputs) -> torch.Tensor:
    torch.manual_seed(3)  # of dropout
    return model(**inputs).loss


METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "bias": {"init_lora_weights": True, "lora_bias": True},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.5},
    "olora": {"init_lora_weights": "olora"},
    "adalora": ADALORA,
}
CASES = [
    *[(kind, "lora") for kind in KINDS + TORCHAO],
    *[("nf4-double", method) for method in ("rslora", "bias", "dora", "dora-dropout", "olora", "adalora")],
    *[("int8", method) for method in ("bias", "olora", "adalora")],
    *[("ao-int8", method) for method in ("dora", "adalora")],
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_training_is_as_in_peft(kind, method):
    """Losses, the first gradients and the adapters in the end. (peft's 8-bit layer has no second forward with DoRA.)"""
    models = pair(kind, **METHODS[method])
    randomise(*models)
    optimizers = [
        torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-3) for model in models
    ]
    inputs = batch()
    for step in range(STEPS):
        losses = [loss_of(model, inputs) for model in models]
        close(losses[1], losses[0], 1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            assert_same_gradients(*models, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
        if method == "adalora":
            models[0].base_model.update_and_allocate(step)
            models[1].update_and_allocate(step)
    expected, found = (by_base_name(model) for model in models)
    for name, parameter in expected.items():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-4)
    assert method != "adalora" or any((each == 0).any() for name, each in found.items() if "lora_E" in name)


def test_dora_on_8_bits_begins_as_in_peft():
    hf, ours = pair("int8", use_dora=True)
    assert any("magnitude" in name for name in by_base_name(ours))
    losses = [loss_of(model, batch()) for model in (hf, ours)]
    close(losses[1], losses[0], 1e-5)
    for loss in losses:
        loss.backward()
    assert_same_gradients(hf, ours, 1e-4)


DTYPES = [
    ("nf4", torch.bfloat16, True), ("nf4", torch.bfloat16, False), ("nf4", torch.float16, False),
    ("nf4-storage", torch.bfloat16, False), ("int8", torch.bfloat16, False), ("ao-int8", torch.bfloat16, True),
    ("ao-int8", torch.bfloat16, False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "autocast"), DTYPES)
def test_adapters_begin_as_in_peft(kind, dtype, autocast):
    """Names, values, dtypes, devices and flags of all that was added, and what is printed of it."""
    hf, ours = pair(kind, dtype, use_dora=True, autocast_adapter_dtype=autocast)
    expected, found = by_base_name(hf), by_base_name(ours)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        mine = found[name]
        assert (mine.dtype, mine.device) == (parameter.dtype, parameter.device), name
        assert mine.requires_grad == parameter.requires_grad, name
        if ".lora_" in name:
            assert torch.equal(mine, parameter), name
    assert not any("lm_head" in name for name in found if ".lora_" in name)
    assert_same_line(hf, ours)


@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8"])
def test_half_precision_is_as_near_to_exact_as_peft(kind):
    """The error of logits and gradients against the same quantised weights in fp64, in multiples of peft's."""
    models = pair(kind, torch.bfloat16)
    randomise(*models)
    exact = exact_copy(models[1])
    inputs = batch()
    for model in (*models, exact):
        model(**inputs).loss.backward()
    errors = []
    wanted = by_base_name(exact)
    for model in models:
        named = by_base_name(model)
        names = [name for name in wanted if wanted[name].grad is not None]
        assert len(names) == 28 and all(named[name].grad.dtype == torch.float32 for name in names)
        errors.append(sum(float((named[name].grad - wanted[name].grad).norm()) ** 2 for name in names) ** 0.5)
    assert 0 < errors[1] <= 1.1 * errors[0]


def exact_copy(model):
    """Our adapters on a plain model in fp64, whose weights are the dequantised ones."""
    from transformers import AutoModelForCausalLM

    plain = quietly(AutoModelForCausalLM.from_pretrained, checkpoint()).double()
    fastpeft.patch(plain, fastpeft.LoraConfig(r=4, lora_alpha=8, **TARGETS))
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            dense = name.endswith(".weight") and quantised.entry_of(module) is not None
            parameter.copy_(quantised.dense_weight(module) if dense else held[name])
    return plain


def test_files_go_both_ways(tmp_path):
    for kind, settings in (("nf4-double", {}), ("nf4", METHODS["olora"]), ("int8", {}), ("ao-int8", METHODS["dora"])):
        hf, ours = pair(kind, **settings)
        randomise(hf, ours)
        hf.eval(), ours.eval()
        directory = tmp_path / kind
        directory.mkdir()
        assert_same_files(hf, ours, directory)
        assert_interchangeable(hf, ours, partial(load, kind), batch(), directory)


def stored(module) -> dict[str, torch.Tensor]:
    """The tensors of which a quantised weight consists."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        found = {"data": weight.data, "absmax": weight.quant_state.absmax}
        return {**found, "nested": weight.quant_state.state2.absmax} if weight.quant_state.nested else found
    if hasattr(weight, "SCB"):
        return {"data": weight.data, "scales": module.state.SCB if weight.SCB is None else weight.SCB}
    return {name: getattr(weight, name) for name in ("qdata", "scale")}


@pytest.mark.parametrize("kind", KINDS + TORCHAO)
def test_merging_gives_peft_s_bits_and_unmerging_the_very_object(kind):
    hf, ours = pair(kind)
    randomise(hf, ours)
    plain = quietly(ours, **batch()).logits
    layers = {name: module for name, module in ours.named_modules() if quantised.entry_of(module) is not None}
    assert len(layers) == 14
    before = {name: (each.weight, {**vars(each)}, stored(each)) for name, each in layers.items()}
    copies = {name: {key: value.clone() for key, value in found[2].items()} for name, found in before.items()}
    quietly(hf.merge_adapter)
    with pytest.warns(UserWarning, match="rounds (bitsandbytes|torchao)'s quantised weights once more"):
        ours.merge_adapter()
    theirs = {base_name(name): module for name, module in hf.named_modules()}
    for name, module in layers.items():
        expected, found = stored(theirs[name]), stored(module)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert any(not torch.equal(found[key], copies[name][key]) for key in found), name
        assert type(module.weight) is type(before[name][0]) and module.weight is not before[name][0]
        assert getattr(module, "quant_state", None) is getattr(module.weight, "quant_state", None)
    ours.unmerge_adapter()
    for name, module in layers.items():
        weight, attributes, tensors = before[name]
        assert module.weight is weight and {**vars(module)} == attributes
        assert all(torch.equal(tensors[key], value) for key, value in copies[name].items())
        assert all(stored(module)[key] is value or key == "data" for key, value in tensors.items())
    assert torch.equal(quietly(ours, **batch()).logits, plain)


@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8"])
def test_the_merged_model_is_plain_and_peft_s(kind):
    hf, ours = pair(kind)
    randomise(hf, ours)
    classes = [type(module) for module in load(kind).modules()]
    merged = quietly(ours.merge_and_unload)
    assert [type(module) for module in merged.modules()] == classes
    with torch.no_grad():
        close(merged(**batch()).logits, quietly(hf.merge_and_unload)(**batch()).logits, 1e-6)


def test_a_merged_dora_is_near_the_unmerged_one():
    """Of peft's torchao layer a merged DoRA is a plain LoRA, so there is nothing to be equal to."""
    for kind, bound in (("ao-int8", 0.03), ("int8", 0.03), ("nf4", 0.3)):
        hf, ours = pair(kind, use_dora=True)
        randomise(hf, ours)
        with torch.no_grad():
            before = ours(**batch()).logits
            quietly(ours.merge_adapter)
            assert float((ours(**batch()).logits - before).norm()) <= bound * float(before.norm()), kind
