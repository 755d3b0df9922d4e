"""What adapters on quantised bases must do that peft is no measure of: the dense weight after an evaluation, gradients
after one, memory, foreign classes, refusals, the kernels."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft import LoraConfig, quantised
from fastpeft.tuners import lora_quantised
from tests.memory import Allocations, saved_for_backward
from tests.models import batch, differences, snapshot
from tests.peft_pair import quietly, randomise
from tests.quantised import KINDS, TORCHAO, load, torchao_config

N, K = 96, 128


def linear_4bit(double: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantised layer in eval mode, the only child of a module."""
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        K, N, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=double
    )
    return nn.ModuleDict({"layer": layer.requires_grad_(False).to(dtype).to("cpu")}).eval()


def linear_8bit() -> nn.Module:
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    return nn.ModuleDict({"layer": layer.requires_grad_(False).to("cpu")}).eval()


def linear_torchao(kind: str = "ao-int8", config=None) -> nn.Module:
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(K, N)})
    quietly(quantize_, model, config or torchao_config(kind))
    return model.eval()


LAYERS = {
    "nf4": linear_4bit,
    "nf4-double": partial(linear_4bit, double=True),
    "nf4-bfloat16": partial(linear_4bit, dtype=torch.bfloat16),
    "int8": linear_8bit,
    **{kind: partial(linear_torchao, kind) for kind in TORCHAO},
}


def config(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **settings})


def rows(count: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_dense_weight_is_right_after_an_evaluation(kind):
    """bitsandbytes rearranges a 4-bit weight in an evaluation forward on CPUs with AVX512-BF16, and narrows its scales
    to bf16."""
    layer = LAYERS[kind]()["layer"]
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    before = quantised.dense_weight(layer)
    assert before.shape == (N, K) == quantised.features(layer) and before.dtype == dtype
    x = rows(dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    after = quantised.dense_weight(layer)
    assert after.shape == (N, K) and error(after, before) < 5e-3
    assert error(y - layer.bias, x.double() @ after.double().t()) < 2e-2


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_an_evaluation_changes_no_gradient(kind, settings):
    """Before the patch, and between steps."""
    gradients = []
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    for evaluated in ((), ("before",), ("between",)):
        model = LAYERS[kind]()
        x = rows(dtype=dtype).requires_grad_()
        with torch.no_grad():
            _ = model["layer"](x.detach()) if "before" in evaluated else None
        torch.manual_seed(2)
        fastpeft.patch(model, config(**settings))
        randomise(model)
        with torch.no_grad():
            _ = model["layer"](x.detach()) if "between" in evaluated else None
        model.train()
        model["layer"](x).float().square().sum().backward()
        found = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        gradients.append({**found, "x": x.grad})
    assert len(gradients[0]) == 3 + bool(settings)
    for found in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert error(found[name], gradient) < 2e-2, name


def test_a_bias_is_trained_after_an_evaluation():
    gradients = []
    for evaluated in (False, True):
        model = linear_4bit()
        fastpeft.patch(model, config(bias="all"))
        with torch.no_grad():
            _ = model["layer"](rows()) if evaluated else None
        y = model.train()["layer"](rows())
        (y * torch.arange(N)).sum().backward()
        gradients.append(model["layer"].bias.grad)
    assert torch.equal(gradients[1], 5.0 * torch.arange(N)) and torch.equal(*gradients)


def test_activations_quantised_on_the_way_have_the_dense_weight_s_gradient():
    """Of a product that quantises x on its way, which nothing else gives a gradient."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = linear_torchao(config=Int8DynamicActivationInt8WeightConfig())
    fastpeft.patch(model, config())
    x = rows().requires_grad_()
    y = model["layer"](x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert error(x.grad, dy @ quantised.dense_weight(model["layer"])) < 1e-6
    assert error(y, F.linear(x, quantised.dense_weight(model["layer"]), model["layer"].bias)) < 2e-2


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8", "ao-int8", "ao-float8"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "lora_dropout": 0.5}], ids=["lora", "dora"])
def test_no_dense_weight_is_kept(kind, settings):
    """Neither for backward nor behind it, nor by a merge."""
    model = LAYERS[kind]().train()
    fastpeft.patch(model, config(**settings))
    randomise(model)
    layer, x = model["layer"], rows().requires_grad_()
    layer(x).sum().backward()  # what the library prepares at its first call
    dense = N * K * 4
    with Allocations() as seen, saved_for_backward() as saved:
        y = layer(x)
        kept = seen.live
        y.sum().backward()
        after = seen.live
    # bitsandbytes' backward of 4 bits holds its packed weight, an eighth of the dense one
    assert max(saved.values()) < dense / 6 and sum(saved.values()) < dense / 2
    assert kept < dense / 2 and after < dense / 2
    assert seen.peak > dense or kind.startswith("ao") or not settings  # that the instrument sees what DoRA makes
    with Allocations() as seen:
        quietly(model.merge_adapter)
        merged = seen.live
        model.unmerge_adapter()
    assert seen.peak >= dense and merged < 0.45 * dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "olora"}], ids=["dora", "olora"])
def test_unpatching_restores_everything(kind, settings):
    model = load(kind)
    quietly(model.train(), **batch())  # what bitsandbytes notes in its layers' first call
    model.eval()
    before = snapshot(model)
    fastpeft.patch(model, LoraConfig(target_modules="all-linear", **settings))
    assert differences(before, snapshot(model))
    randomise(model)
    model.train()(**batch()).loss.backward()
    quietly(model.merge_adapter)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model.eval())) == []


def test_a_failed_second_olora_leaves_the_weights_of_the_first():
    model = load("nf4")
    fastpeft.patch(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights="olora"))
    before = snapshot(model)
    broken = model.model.layers[1].self_attn.o_proj
    broken.__dict__["leave"] = lambda rest: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights="olora"))
    del broken.__dict__["leave"]
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8"])
def test_under_autocast_the_gradients_are_as_near_to_exact_as_peft_s(kind):
    from tests.peft_pair import by_base_name, pair_of

    hf, ours = pair_of(partial(load, kind), {"task_type": "CAUSAL_LM", "target_modules": "all-linear"})
    randomise(hf, ours)
    gradients = []
    for model, enabled in ((hf, False), (hf, True), (ours, True)):
        model.train()
        embedded = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(inputs_embeds=embedded, labels=batch()["labels"]).loss
        loss.backward()
        named = by_base_name(model)
        found = [named[name].grad for name in sorted(named) if named[name].grad is not None]
        gradients.append(torch.cat([embedded.grad.flatten(), *(each.flatten() for each in found)]))
    exact, theirs, mine = gradients
    assert 0 < error(mine, exact) <= 1.1 * error(theirs, exact)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_after_an_evaluation_merges_the_same_weight(kind):
    weights = []
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    for evaluated in (False, True):
        model = LAYERS[kind]()
        fastpeft.patch(model, config())
        randomise(model)
        with torch.no_grad():
            before = model["layer"](rows(dtype=dtype)) if evaluated else None
            quietly(model.merge_adapter)
            weights.append(quantised.dense_weight(model["layer"]))
            if evaluated:
                model["layer"](rows(dtype=dtype))
                model.unmerge_adapter()
                assert torch.equal(model["layer"](rows(dtype=dtype)), before)
    assert error(weights[1], weights[0]) < (3e-2 if "nf4" in kind else 1e-6)


def test_what_a_merge_has_put_aside_comes_back_where_the_layer_is():
    """A merged layer may be moved; its former weight, that is no part of it then, stays behind."""
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    layer, weight = model["layer"], model["layer"].weight
    swap = lora_quantised.Swap(layer, {"weight": nn.Parameter(torch.zeros(8, 8), requires_grad=False)})
    swap.undo()
    assert layer.weight is weight
    swap = lora_quantised.Swap(layer, {"weight": nn.Parameter(torch.zeros(8, 8), requires_grad=False)})
    model.to("meta")
    swap.undo()
    assert layer.weight.is_meta and isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad


def test_several_adapters_share_a_quantised_layer():
    """Added up, switched, disabled, merged together, deleted."""
    model = linear_4bit()
    base = model["layer"](rows())
    fastpeft.patch(model, config(use_dora=True), adapter_name="first")
    model.add_adapter("second", config(r=2, lora_bias=True))
    randomise(model)
    model.set_adapter("second")
    randomise(model, seed=4)
    layer = model["layer"]
    alone = {}
    for name in ("first", "second"):
        with fastpeft.use_adapter(model, name):
            alone[name] = layer(rows())
        assert error(alone[name], base) > 0.05
    model.set_adapter(["first", "second"])
    both = layer(rows())
    assert error(both, alone["first"] + alone["second"] - base) < 5e-3  # bitsandbytes' evaluation products are of bf16
    with model.disable_adapter():
        assert error(layer(rows()), base) < 5e-3
    bias = layer.bias.clone()
    quietly(model.merge_adapter)
    assert 0 < error(layer(rows()), both) < 0.2 and not torch.equal(layer.bias, bias)
    model.unmerge_adapter()
    assert torch.equal(layer.bias, bias)
    model.delete_adapter("second")
    assert error(layer(rows()), alone["first"]) < 5e-3


@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8"])
def test_compiled_layers_are_one_graph_with_the_same_gradients(kind):
    model = LAYERS[kind]().train()
    fastpeft.patch(model, config(use_dora=True, lora_dropout=0.5))
    randomise(model)
    torch._dynamo.reset()
    results = []
    for layer in (model["layer"], torch.compile(lambda x: model["layer"](x), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        x = rows().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and error(results[1][1], results[0][1]) < 1e-6
