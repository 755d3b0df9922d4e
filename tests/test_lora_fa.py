"""LoRA-FA: with A frozen no layer keeps its input or reads it again, and peft's own optimizer takes our models."""

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer

import fastpeft
from fastpeft.ops import lora_linear
from tests.memory import saved_for_backward
from tests.models import batch, tiny
from tests.ops.lora_linear_cases import on
from tests.peft_pair import close, pair_of, quietly, randomise
from tests.traffic import count_traffic

SETTINGS = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
M, K, N, R = 24, 40, 32, 4


def pair(**more):
    """(peft's model, ours)"""
    models = pair_of(tiny, {**SETTINGS, **more})
    randomise(*models)
    return models


def trained(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_frozen_is_what_peft_s_optimizer_freezes():
    more = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True}
    hf, ours = pair(**more)
    create_lorafa_optimizer(hf, r=4, lora_alpha=12, lr=1e-3)
    assert fastpeft.freeze_lora_A(ours) is ours
    assert trained(ours) == trained(hf) and any("lora_embedding_A" in name for name in trained(ours))
    patched = fastpeft.patch(pair(**more)[0])
    assert trained(fastpeft.freeze_lora_A(patched)) == trained(hf)


def test_every_adapter_and_until_the_next_choice():
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(**SETTINGS))
    model.add_adapter("b", fastpeft.LoraConfig(**SETTINGS))
    fastpeft.freeze_lora_A(model)
    assert trained(model) and not any("lora_A" in name for name in trained(model))
    model.set_adapter("b")
    assert any("lora_A.b" in name for name in trained(model))


def problem(frozen):
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (torch.randn(*s, generator=generator) for s in ((M, K), (N, K), (R, K), (N, R)))
    return x.requires_grad_(), weight, a.requires_grad_(not frozen), b.requires_grad_()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_an_op_keeps_s_and_a_seed(name, dropout):
    x, weight, a, b = problem(frozen=True)
    with on(name), saved_for_backward(besides=(weight, a, b)) as saved:
        lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
    assert sorted(saved.values()) == sorted([M * R * 4] + [8] * (dropout > 0))


@pytest.mark.interpreter
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strategy", ["fused", "prewrite"])
def test_no_kernel_reads_x_again(strategy, dropout):
    """Beside the step that trains A: no pass that makes dA, and not a byte of x in backward."""
    read, launched = {}, {}
    for frozen in (False, True):
        x, weight, a, b = problem(frozen)
        wanted = [each for each in (x, a, b) if each.requires_grad]
        with on("triton", strategy):
            y = lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
            with count_traffic() as traffic:
                torch.autograd.grad(y, wanted, torch.ones_like(y))
        read[frozen], launched[frozen] = traffic.loaded(x), traffic.kernels().count("_grad_columns_kernel")
    assert launched == {False: 1, True: 0}
    assert read == {False: M * K * 4, True: 0}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_keeps_less(dropout):
    """By the inputs of its layers, but for those that others keep too, beside the same model with A trained."""
    kept = {}
    for frozen in (False, True):
        settings = {**SETTINGS, "target_modules": ["down_proj"], "lora_dropout": dropout}
        model = fastpeft.patch(tiny(), fastpeft.LoraConfig(**settings))
        if frozen:
            fastpeft.freeze_lora_A(model)
        with saved_for_backward(besides=tuple(model.parameters())) as saved:
            model.train()(**batch())
        kept[frozen] = sum(saved.values())
    tokens, width = batch()["input_ids"].numel(), tiny().config.intermediate_size
    layers = tiny().config.num_hidden_layers
    assert kept[False] - kept[True] >= layers * tokens * width * 4  # the product that only down_proj needs


def lorafa(model):
    """peft's own optimizer, without what it says about its own deprecated keys."""
    return quietly(create_lorafa_optimizer, model, r=SETTINGS["r"], lora_alpha=SETTINGS["lora_alpha"], lr=1e-2)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}}], ids=["", "rs", "alphas"])
def test_peft_s_optimizer_on_our_models(more):
    """Native, and of peft with our arithmetic, beside plain peft: losses and B after four steps."""
    hf, ours = pair(**more)
    patched = fastpeft.patch(pair(**more)[0])
    losses = []
    for model in (hf, ours, patched):
        optimizer, trace = lorafa(model), []
        scales = [each for each in optimizer.param_groups[0]["scaling_factors"] if each is not None]
        assert len(scales) == 12 and (len(set(scales)) > 1) == ("alpha_pattern" in more)
        for _ in range(4):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[0][-1] < losses[0][0]
    for found, model in zip(losses[1:], (ours, patched), strict=True):
        assert found == pytest.approx(losses[0], rel=1e-3)
        for name, expected in hf.named_parameters():
            if "lora_B" in name:
                name = name if model is patched else name.removeprefix("base_model.model.")
                close(model.get_parameter(name), expected, 1e-2)


def test_any_optimizer_trains_what_is_left():
    """Frozen A: the same losses as peft's model with A frozen by hand, with LoRA+'s groups for B."""
    hf, ours = pair()
    for name, parameter in hf.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    fastpeft.freeze_lora_A(ours)
    traces = []
    for model in (hf, ours):
        optimizer, trace = torch.optim.AdamW(fastpeft.param_groups(model, 1e-3, loraplus_lr_ratio=8)), []
        for _ in range(3):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.append(loss.item())
        traces.append(trace)
    assert traces[1] == pytest.approx(traces[0], rel=1e-5)


def test_scaling_is_named_as_in_peft():
    hf, ours = pair(target_modules=["q_proj", "embed_tokens"])
    modules = {"q_proj": lambda m: m.model.layers[0].self_attn.q_proj, "embed": lambda m: m.model.embed_tokens}
    for get in modules.values():
        assert get(ours).scaling == get(hf.base_model.model).scaling == {"default": 3.0}
    ready = fastpeft.patch(tiny(), fastpeft.LoraConfig(**SETTINGS))
    fastpeft.prepare_model_for_compiled_hotswap(ready)
    assert modules["q_proj"](ready).scaling == {"default": torch.tensor(3.0)}


@pytest.mark.parametrize("library", [peft, fastpeft], ids=["peft", "native"])
def test_adalora_is_refused(library):
    config = library.AdaLoraConfig(total_step=9, target_modules=["q_proj"])
    if library is peft:
        model = fastpeft.patch(quietly(peft.get_peft_model, tiny(), config))
    else:
        model = fastpeft.patch(tiny(), config)
    before = trained(model)
    with pytest.raises(fastpeft.PatchError, match="has AdaLoRA, whose ranks go by the gradient of A"):
        fastpeft.freeze_lora_A(model)
    assert trained(model) == before and any("lora_A" in name for name in before)


def test_what_has_no_a():
    with pytest.raises(fastpeft.PatchError, match="freeze_lora_A: a str has no parameters"):
        fastpeft.freeze_lora_A("model")
    with pytest.raises(fastpeft.PatchError, match="no layer of this LlamaForCausalLM has a lora_A; add a LoRA first"):
        fastpeft.freeze_lora_A(tiny())
