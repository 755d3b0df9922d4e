"""`param_groups` beside peft's own `create_loraplus_optimizer`: the same parameters in the same groups."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import fastpeft
from tests.models import batch, tiny
from tests.peft_pair import by_base_name, pair_of, quietly, randomise

RATES = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 2e-5}
DECAY = 0.1
LINEAR = {"target_modules": ["q_proj", "v_proj"]}
TASK = "SEQ_CLS"
METHODS = {
    "lora": ("LoraConfig", "llama", LINEAR),
    "embedding": ("LoraConfig", "llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora": ("LoraConfig", "llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "bias": ("LoraConfig", "bert", {"target_modules": ["query"], "bias": "all"}),
    "lora-bias": ("LoraConfig", "llama", {**LINEAR, "lora_bias": True}),
    "norms-saved": ("LoraConfig", "bert", {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}),
    "conv1d": ("LoraConfig", "gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "adalora": ("AdaLoraConfig", "llama", {**LINEAR, "total_step": 9}),
    "prefix": ("PrefixTuningConfig", "llama", {"num_virtual_tokens": 3, "prefix_projection": True}),
    "prompt": ("PromptTuningConfig", "llama", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", "llama", {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"}),
    "adapter": ("AdaptionPromptConfig", "llama", {"adapter_len": 3, "adapter_layers": 2}),
}


def made(method):
    """(peft's model, ours)"""
    kind, family, settings = METHODS[method]
    return pair_of(lambda: tiny(family, task_of(method)), {"task_type": task_of(method), **settings}, kind)


def task_of(method):
    """LLaMA-Adapter's head of classification is trained by us, and not by peft."""
    return "CAUSAL_LM" if method in ("conv1d", "adapter") else TASK


def described(groups, model) -> list[tuple]:
    """(names, learning rate, decay) of each group."""
    names = {id(parameter): name for name, parameter in by_base_name(model).items()}
    return [(sorted(names[id(each)] for each in g["params"]), g["lr"], g["weight_decay"]) for g in groups]


def of_peft(model, **more):
    made = create_loraplus_optimizer(model, torch.optim.AdamW, **RATES, loraplus_weight_decay=DECAY, **more)
    return made, described(made.param_groups, model)


@pytest.mark.parametrize("method", METHODS)
def test_the_groups_are_peft_s(method):
    hf, ours = made(method)
    _, expected = of_peft(hf)
    assert described(fastpeft.param_groups(ours, **RATES, weight_decay=DECAY), ours) == expected
    fastpeft.patch(hf)
    assert described(fastpeft.param_groups(hf, **RATES, weight_decay=DECAY), hf) == expected
    grouped = [id(each) for group in fastpeft.param_groups(ours, **RATES) for each in group["params"]]
    assert sorted(grouped) == sorted(id(each) for each in ours.parameters() if each.requires_grad) and grouped


def test_every_kind_of_group_is_met():
    """The table above has parameters for each of the four."""
    met = set()
    for method in METHODS:
        ours = made(method)[1]
        met |= {place for place, group in enumerate(fastpeft.param_groups(ours, **RATES)) if group["params"]}
    assert met == {0, 1, 2, 3}


def test_a_base_weight_below_a_lora():
    """Trained besides: an embedding's as the embedding, a projection's as all else."""
    hf, ours = made("embedding")
    layers = hf.base_model.model.model.embed_tokens.base_layer, ours.model.embed_tokens
    layers += hf.base_model.model.model.layers[0].self_attn.q_proj.base_layer, ours.model.layers[0].self_attn.q_proj
    for layer in layers:
        layer.weight.requires_grad_(True)
    assert described(fastpeft.param_groups(ours, **RATES, weight_decay=DECAY), ours) == of_peft(hf)[1]


def test_defaults_are_peft_s():
    hf, ours = made("embedding")
    theirs = create_loraplus_optimizer(hf, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    expected = described(theirs.param_groups, hf)
    assert described(fastpeft.param_groups(ours, 1e-3, loraplus_lr_ratio=4), ours) == expected


def test_another_adapter_and_tied_weights():
    """What is frozen is in no group, and what is shared is in one."""
    model = fastpeft.patch(tiny("llama-tied"), fastpeft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    model.add_adapter("b", fastpeft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter("b")
    names = [name for group in described(fastpeft.param_groups(model, **RATES), model) for name in group[0]]
    assert names and all(".b." in name for name in names)
    model.model.embed_tokens.weight.requires_grad_(True)
    grouped = [id(each) for group in fastpeft.param_groups(model, **RATES) for each in group["params"]]
    assert grouped.count(id(model.lm_head.weight)) == 1


def test_training_and_the_optimizer_s_state_are_peft_s():
    """Three steps beside peft's; then each library's state goes into the other's optimizer."""
    hf, ours = made("embedding")
    randomise(hf, ours)
    optimizers = of_peft(hf)[0], torch.optim.AdamW(fastpeft.param_groups(ours, **RATES, weight_decay=DECAY))
    losses = ([], [])
    for _ in range(3):
        for model, optimizer, trace in zip((hf, ours), optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss = model(**batch(TASK)).loss
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][2] < losses[0][0]
    states = [optimizer.state_dict() for optimizer in optimizers]
    for optimizer, state in zip(optimizers, reversed(states), strict=True):
        optimizer.load_state_dict(state)
        assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def test_a_learning_rate_that_is_a_tensor():
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    groups = fastpeft.param_groups(model, torch.tensor(1e-3), loraplus_lr_ratio=4)
    assert groups[2]["lr"] == torch.tensor(4e-3)
    torch.optim.AdamW(groups, foreach=False)


@pytest.mark.parametrize("name", ["lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1e-3", None, True, torch.zeros(2)], ids=repr)
def test_numbers_that_are_none(name, value):
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(fastpeft.PatchError, match=f"param_groups: {name}=.* must be a finite number, 0 or more"):
        fastpeft.param_groups(model, **{**RATES, name: value})


def test_models_that_train_nothing():
    with pytest.raises(fastpeft.PatchError, match="param_groups: a str has no parameters"):
        fastpeft.param_groups("model", **RATES)
    model = quietly(peft.get_peft_model, tiny(), peft.LoraConfig(r=2, **LINEAR, inference_mode=True))
    with pytest.raises(fastpeft.PatchError, match="param_groups: nothing in this PeftModel is trained"):
        fastpeft.param_groups(model, **RATES)
