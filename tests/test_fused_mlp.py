"""`fuse(model, "mlp")`: gated MLPs are one op, on models of fastpeft's and of HF peft's, wherever that is what the
model computes; whatever is otherwise in a call, the layers compute it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft.tuners import mlp
from tests.compiled import adapted as of_one_layer
from tests.compiled import stepped
from tests.fused import adapted, assert_alike, outcome
from tests.memory import saved_for_backward
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import assert_same_step, patched_pair, quietly, randomise

WAYS = pytest.mark.parametrize("way", ["native", "peft"])
FAMILIES = ("llama", "gemma", "qwen2", "gemma2", "llama-bias")
LAYERS = 2


@pytest.fixture
def ops(monkeypatch) -> list[str]:
    """The activation of every op that was made since."""
    found, shipped = [], mlp.apply_lora_mlp

    def spy(x, gate, up, down, activation, **more):
        found.append(activation)
        return shipped(x, gate, up, down, activation, **more)

    monkeypatch.setattr(mlp, "apply_lora_mlp", spy)
    return found


def pair(way: str = "native", **settings) -> tuple[nn.Module, nn.Module]:
    """(a model whose MLPs are fused, the same model without), training."""
    alone = adapted(way, **settings).train()
    return fastpeft.fuse(copy.deepcopy(alone), "mlp"), alone


def mlps(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if mlp.KEY in each.__dict__]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_as_in_peft(family, ops):
    hf, model = patched_pair(family, {"target_modules": "all-linear"})
    randomise(hf, model)
    assert fastpeft.fuse(model, "mlp") is model
    assert_same_step(hf, model, batch())
    assert ops == ["gelu_tanh" if family.startswith("gemma") else "silu"] * 2 * LAYERS


SETTINGS = {
    "dropout": {"lora_dropout": 0.3},
    "ranks": {"rank_pattern": {"gate_proj": 2, "up_proj": 7, "down_proj": 1}, "alpha_pattern": {"up_proj": 3}},
    "down alone": {"target_modules": ["down_proj"], "lora_dropout": 0.3},
    "up and attention": {"target_modules": ["up_proj", "q_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["gate_proj", "down_proj"]},
}


@WAYS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_is_as_without(settings, way, ops):
    """With the very masks of dropout."""
    model, alone = pair(way, **settings)
    for seed in range(2):
        assert_alike(outcome(model, seed), outcome(alone, seed))
    assert len(ops) == 2 * LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_losses_of_twenty_steps_are_peft_s(family, ops):
    hf, model = patched_pair(family, {"target_modules": "all-linear"})
    randomise(hf, model)
    fastpeft.fuse(model)
    found = []
    for each in (hf, model):
        learned = [parameter for _, parameter in sorted(each.named_parameters()) if parameter.requires_grad]
        optimiser, losses = torch.optim.AdamW(learned, lr=1e-3), []
        for _ in range(20):
            optimiser.zero_grad()
            loss = each(**batch()).loss
            loss.backward()
            losses.append(loss.detach())
            optimiser.step()
        found.append(torch.stack(losses))
    assert len(ops) == 20 * LAYERS
    assert (found[1] - found[0]).abs().max() <= 1e-4 * found[0].abs().max()
    assert found[1][-1] < found[1][0]


def test_what_is_kept_for_backward_is_less(ops):
    """Of a layer's MLP: x, gate, up and the small S; without the op the activation, the product, and h as well."""
    kept = []
    for model in pair():
        part = model.model.layers[0].mlp
        x = torch.randn(4, 16, part.config.hidden_size, requires_grad=True)
        with saved_for_backward(besides=list(part.parameters())) as saved:
            part(x)
        kept.append(sum(saved.values()))
    rows, hidden, inner = 64, part.config.hidden_size, part.config.intermediate_size
    assert kept[0] == 4 * rows * (hidden + 2 * inner + 3 * 4) and ops
    assert kept[1] >= kept[0] + 4 * rows * 2 * inner


def hooked(name: str, kind: str):
    def change(model):
        for layer in model.model.layers:
            child = getattr(layer.mlp, name)
            if kind == "forward":
                child.register_forward_hook(lambda module, args, output: output * 1.5)
            elif kind == "before":
                child.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
            else:
                child.register_full_backward_hook(lambda module, into, out: (into[0] * 1.5,))

    return change


def forward_of_its_own(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.forward = lambda x, plain=layer.mlp.up_proj.forward: plain(x) * 1.5


def trained_weights(model):
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_()


def other_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()


def two_adapters(model):
    quietly(model.add_adapter, "more", fastpeft.LoraConfig(r=2, target_modules="all-linear"))
    randomise(model)
    fastpeft.set_adapter(model, ["default", "more"])


def on_another_layer(model):
    """The adapter in use has no part in the MLPs, whose projections have another's."""
    quietly(model.add_adapter, "more", fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    fastpeft.set_adapter(model, "more")


OTHERWISE = {
    "a hook on gate": hooked("gate_proj", "forward"),
    "a hook before down": hooked("down_proj", "before"),
    "a hook on the activation": hooked("act_fn", "forward"),
    "a backward hook on up": hooked("up_proj", "backward"),
    "a forward of its own": forward_of_its_own,
    "trained weights": trained_weights,
    "another activation": other_activation,
    "two adapters": two_adapters,
    "an adapter on other layers": on_another_layer,
}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_otherwise_goes_layer_by_layer(change, ops):
    model, alone = pair()
    found = []
    for each in (model, alone):
        torch.manual_seed(3)
        change(each)
        found.append(outcome(each))
    assert_alike(*found)
    assert ops == []


def test_dora_goes_layer_by_layer(ops):
    model, alone = pair(use_dora=True)
    assert_alike(outcome(model), outcome(alone))
    assert ops == []


@pytest.mark.parametrize("around", [fastpeft.disable_adapter, fastpeft.merge], ids=["disabled", "merged"])
def test_the_base_alone_goes_layer_by_layer(around, ops):
    found = []
    for model in pair():
        if around is fastpeft.merge:
            fastpeft.merge(model)
            found.append(model(**batch()).logits.detach())
        else:
            with fastpeft.disable_adapter(model):
                found.append(model(**batch()).logits.detach())
    assert torch.equal(*found) and ops == []


def test_rows_of_several_adapters_go_layer_by_layer(ops):
    found = []
    for model in pair():
        torch.manual_seed(3)
        quietly(model.add_adapter, "more", fastpeft.LoraConfig(r=2, target_modules="all-linear"))
        randomise(model)
        found.append(model.eval()(**batch(), adapter_names=["more", "__base__"]).logits.detach())
    torch.testing.assert_close(*found)
    assert ops == []


def test_another_known_activation_is_used(ops):
    model, alone = pair()
    for each in (model, alone):
        for layer in each.model.layers:
            layer.mlp.act_fn = nn.GELU()
    assert_alike(outcome(model), outcome(alone))
    assert ops == ["gelu"] * LAYERS


def test_a_class_whose_forward_is_replaced_later_is_read_again(ops, monkeypatch):
    model, alone = pair()
    cls = type(alone.model.layers[0].mlp)
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * self.down_proj(self.act_fn(self.gate_proj(x))))
    assert_alike(outcome(model), outcome(alone))
    assert ops == []


def test_a_hook_on_all_modules_sees_every_projection(ops):
    model, _ = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(**batch())
    finally:
        handle.remove()
    assert ops == [] and model.model.layers[1].mlp.up_proj in seen


def test_inputs_that_the_op_does_not_take_are_refused_as_before(ops):
    model, alone = (each.model.layers[0].mlp for each in pair())
    for x in (torch.zeros(3, 5), torch.zeros(3, 32, dtype=torch.float16), torch.zeros(())):
        errors = []
        for each in (model, alone):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                each(x)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    with pytest.raises(TypeError):
        model(torch.zeros(2, 32), torch.zeros(2))
    assert ops == []


@WAYS
@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing(way, kwargs, ops):
    model, alone = pair(way, lora_dropout=0.3)
    for each in (model, alone):
        each.gradient_checkpointing_enable(kwargs)
        each.enable_input_require_grads()
    assert_alike(outcome(model), outcome(alone))
    assert len(ops) == 2 * LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@WAYS
def test_half_precision_and_autocast(way, dtype, ops):
    model, alone = pair(way)
    with torch.autocast("cpu", dtype):
        assert_alike(outcome(model), outcome(alone), rtol=0.05)
    found = outcome(model.to(dtype)), outcome(alone.to(dtype))
    assert len(ops) == 2 * LAYERS and found[0]["logits"].dtype == dtype
    assert_alike(*found, rtol=0.05)


@WAYS
def test_generation(way, ops):
    model, alone = pair(way)
    inputs = {"input_ids": batch()["input_ids"][:1], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(quietly(model.eval().generate, **inputs), quietly(alone.eval().generate, **inputs))
    assert len(ops) == 6 * LAYERS


def test_compiled_as_one_graph(ops):
    alone = of_one_layer("lora", target_modules="all-linear")
    model = fastpeft.fuse(copy.deepcopy(alone), "mlp")
    model(**batch())
    torch._dynamo.reset()
    ops.clear()
    found = (
        stepped(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch()),
        stepped(alone, alone, batch()),
    )
    assert_alike(*({"loss": loss.detach(), **gradients} for loss, gradients in found))
    assert ops == ["silu"]


@WAYS
def test_unfuse_and_unpatch_leave_nothing(way):
    model = adapted(way)
    before = snapshot(model)
    fastpeft.fuse(model, "mlp")
    assert len(mlps(model)) == LAYERS and differences(before, snapshot(model)) != []
    kind = type(mlps(model)[0])
    assert kind.__name__ == "FusedLlamaMLP" and kind.__mro__[2].__name__ == "LlamaMLP"
    fastpeft.fuse(model)
    assert type(mlps(model)[0]) is kind
    fastpeft.unfuse(model)
    assert differences(before, snapshot(model)) == []
    fastpeft.fuse(model)
    fastpeft.unpatch(model)
    assert mlps(model) == [] and not any(isinstance(each, mlp.FusedMlp) for each in model.modules())


def test_a_base_that_is_unpatched_is_what_it_was():
    base = tiny()
    before = snapshot(base)
    fastpeft.unpatch(fastpeft.fuse(fastpeft.patch(base, fastpeft.LoraConfig(r=2, target_modules="all-linear"))))
    assert differences(before, snapshot(base)) == []


def test_copies_and_pickles_are_fused_too(ops):
    model, alone = pair()
    expected = outcome(alone)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_alike(outcome(each), expected)
    assert len(ops) == 2 * LAYERS


def test_an_offloaded_model_goes_layer_by_layer(ops):
    accelerate = pytest.importorskip("accelerate")
    model, alone = pair()
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, alone(**batch()).logits)
    assert ops == []


class Gated(nn.Module):
    """Of names of its own, an activation without a module, and a projection that is no Linear."""

    def __init__(self, up: nn.Module):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 12), up, nn.Linear(12, 8)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Sloped(nn.Linear):
    """Not what a linear layer computes."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("up", "fused"), [(nn.Linear(8, 12), True), (Sloped(8, 12), False)], ids=["linear", "other"])
def test_modules_that_are_nobody_s(up, fused, ops):
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=2, target_modules=["w1", "w2"], lora_dropout=0.2)
    alone = fastpeft.patch(nn.Sequential(Gated(copy.deepcopy(up))), config).train()
    randomise(alone)
    model, x, found = fastpeft.fuse(copy.deepcopy(alone)), torch.randn(3, 5, 8), []
    for each in (model, alone):
        torch.manual_seed(1)
        y = each(x)
        y.square().sum().backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert_alike(*found)
    assert ops == ["silu"] * fused


def test_layers_that_stay_as_they_are():
    for model in (adapted(target_modules=["q_proj"]), adapted(family="gpt2", target_modules=["c_fc", "c_proj"])):
        before = snapshot(model)
        fastpeft.fuse(model, "mlp")
        assert differences(before, snapshot(model)) == []
