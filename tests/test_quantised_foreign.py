"""Quantised layers of libraries that cannot run here, by stand-ins with their classes' names and interfaces; classes
that a user registers; and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft import AdaLoraConfig, LoraConfig, quantised
from fastpeft.errors import ConfigError, PatchError, TargetError
from fastpeft.quantised import Entry
from tests.peft_pair import quietly, randomise
from tests.test_quantised import K, N, error, linear_4bit, linear_8bit, linear_torchao, rows
from tests.traffic import count_traffic


class Packed(nn.Module):
    """Rows of int8 numbers and their scales; what each library calls them its class says."""

    def __init__(self, **names):
        super().__init__()
        self.bias = torch.linspace(-1, 1, N)
        self.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.1)

    def quantize(self, weight, **settings):
        self.scales = weight.abs().amax(1, keepdim=True) / 127
        self.pack((weight / self.scales).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.unpacked() * self.scales, self.bias)


class GPTQ(Packed):
    def pack(self, numbers):
        self.in_features, self.out_features = K, N
        self.register_buffer("qweight", numbers.t().contiguous())

    def unpacked(self):
        return self.qweight.t().float()


class HQQ(Packed):
    quant_config = {"weight_quant_params": {"nbits": 8}}
    compute_dtype, device, offload_meta = torch.float32, "cpu", False

    def __init__(self, linear=None, quant_config=None, compute_dtype=None, device=None):
        super().__init__()

    def quantize(self, weight, weight_quant_params=None):
        super().quantize(weight)
        self.meta = {"scale": self.scales, "weight_quant_params": weight_quant_params}

    def pack(self, numbers):
        self.in_features, self.out_features = K, N
        self.W_q = nn.Parameter(numbers, requires_grad=False)

    def unpacked(self):
        return self.W_q.float()

    def forward(self, x):
        return F.linear(x, self.dequantize(), self.bias)

    def dequantize(self):
        return self.unpacked() * self.meta["scale"]


class EETQ(Packed):
    def pack(self, numbers):
        self.weight = nn.Parameter(numbers.t().contiguous(), requires_grad=False)

    def unpacked(self):
        return self.weight.t().float()


class AQLM(Packed):
    def pack(self, numbers):
        self.in_features, self.out_features = K, N
        self.codes = nn.Parameter(numbers, requires_grad=False)
        self.codebooks = nn.Parameter(torch.zeros(1))

    def unpacked(self):
        return self.codes.float()


def stand_in(base: type, library: str, *names: str) -> type:
    """`base` as another library's class; of several names the first is the class that the others derive from."""
    for name in names:
        base = type(name, (base,), {"__module__": f"{library}.layers", "__qualname__": name})
    return base


FOREIGN = {
    "gptq": stand_in(GPTQ, "gptqmodel", "BaseQuantLinear", "TorchQuantLinear"),
    "awq": stand_in(GPTQ, "gptqmodel", "BaseQuantLinear", "AWQuantLinear", "AwqTorchLinear"),
    "hqq": stand_in(HQQ, "hqq", "HQQLinear"),
    "eetq": stand_in(EETQ, "transformers", "EetqLinear"),
    "aqlm": stand_in(AQLM, "aqlm", "QuantizedLinear"),
}
FORWARD_ONLY = sorted(FOREIGN.keys() - {"hqq"})


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(N, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))


def foreign(kind: str) -> Model:
    torch.manual_seed(0)
    return Model(FOREIGN[kind]())


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **settings})


def plain_twin(model: Model) -> Model:
    """The same model with the dense weight in a linear layer."""
    twin = Model(nn.Linear(K, N))
    with torch.no_grad():
        twin.layer.weight.copy_(model.layer.unpacked() * model.layer.scales)
        twin.layer.bias.copy_(model.layer.bias)
        twin.head.load_state_dict(model.head.state_dict())
    return twin


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_layer_carries_an_adapter(kind, method, tmp_path):
    settings = lora() if method == "lora" else AdaLoraConfig(target_modules=["layer"], total_step=20)
    models = [foreign(kind)]
    models.append(plain_twin(models[0]))
    original, gradients = type(models[0].layer), []
    for model in models:
        torch.manual_seed(1)
        fastpeft.patch(model, settings)
        randomise(model)
        x = rows().requires_grad_()
        y = model.train()(x)
        y.square().sum().backward()
        named = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        gradients.append({**named, "x": x.grad, "y": y})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == (4 if method == "lora" else 5)
    assert all(error(gradients[0][name], gradients[1][name]) < 1e-5 for name in gradients[0])
    assert isinstance(models[0].layer, original)
    models[0].save_pretrained(tmp_path)
    again = fastpeft.load_adapter(foreign(kind), tmp_path)
    assert torch.equal(again(rows()), models[0].eval()(rows()))
    row = fastpeft.report(models[0]).layers[0]
    assert row.op == "lora_linear" and "the base product is its own class's" in row.reason


def test_all_linear_means_foreign_layers_too():
    for kind in FOREIGN:
        model = foreign(kind)
        fastpeft.patch(model, lora(target_modules="all-linear"))
        assert [row.path for row in fastpeft.report(model).layers] == ["layer", "head"]


@pytest.mark.parametrize("kind", FORWARD_ONLY)
def test_where_only_the_forward_is_known_nothing_is_merged(kind):
    model = foreign(kind)
    with pytest.raises(TargetError, match=r"use_dora=True needs the dense weight of layer, and \w+ does not say"):
        fastpeft.patch(model, lora(use_dora=True))
    with pytest.raises(TargetError, match="init_lora_weights='olora' changes the weight of layer"):
        fastpeft.patch(model, lora(init_lora_weights="olora"))
    fastpeft.patch(model, lora())
    randomise(model)
    before = model(rows())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(PatchError, match=r"merge: layer: nothing can be merged into a \w+: \w+ does not say how"):
            merge()
    assert torch.equal(model(rows()), before)
    with pytest.raises(PatchError, match="does not say how to make the dense weight"):
        quantised.dense_weight(model.layer)


def test_hqq_is_merged_and_unmerged():
    model = foreign("hqq")
    fastpeft.patch(model, lora(use_dora=True))
    randomise(model)
    layer = model.layer
    held, before = (layer.W_q, layer.meta), model(rows())
    quietly(model.merge_adapter)
    assert layer.W_q is not held[0] and layer.meta["weight_quant_params"] == {"nbits": 8}
    assert 0 < error(model(rows()), before) < 0.1
    model.unmerge_adapter()
    assert layer.W_q is held[0] and layer.meta is held[1] and torch.equal(model(rows()), before)


def test_hqq_begins_with_olora():
    """Whose weight is no attribute of this name."""
    model, twin = foreign("hqq"), plain_twin(foreign("hqq"))
    held, before = (model.layer.W_q, model.layer.meta), model(rows())
    for each in (model, twin):
        torch.manual_seed(1)
        fastpeft.patch(each, lora(init_lora_weights="olora"))
    assert model.layer.W_q is not held[0]
    assert torch.equal(model.layer.lora_A["default"].weight, twin.layer.lora_A["default"].weight)
    assert 0 < error(model(rows()), twin(rows())) < 0.1
    fastpeft.unpatch(model)
    assert model.layer.W_q is held[0] and model.layer.meta is held[1] and torch.equal(model(rows()), before)


class Halves(nn.Linear):
    """A user's own: a weight in halves of its numbers, whose product has no gradient."""

    def __init__(self):
        super().__init__(K, N)
        self.weight = nn.Parameter((self.weight.detach() * 512).round().to(torch.int16), requires_grad=False)

    def forward(self, x):
        return F.linear(x.detach(), self.weight.float() / 512, self.bias.detach())


def test_a_user_registers_a_class(monkeypatch):
    model = Model(Halves())
    with pytest.raises(TargetError) as refused:
        fastpeft.patch(model, lora())
    assert "layer is a Halves with a weight of Parameter, dtype torch.int16" in str(refused.value)
    assert "fastpeft.quantised.register('tests.Halves', ...)" in str(refused.value)
    monkeypatch.setattr(quantised, "_ENTRIES", {})
    quantised.register(
        "tests.Halves",
        Entry(
            "mine",
            dense=lambda module: module.weight.float() / 512,
            requantised=lambda module, dense: {"weight": nn.Parameter((dense * 512).round().to(torch.int16), False)},
            differentiable=lambda module: False,
        ),
    )
    try:
        fastpeft.patch(model, lora(use_dora=True, lora_dropout=0.3))
        randomise(model)
        x = rows().requires_grad_()
        model.eval()(x).square().sum().backward()
        twin = Model(nn.Linear(K, N))
        with torch.no_grad():
            twin.layer.weight.copy_(quantised.dense_weight(model.layer))
            twin.layer.bias.copy_(model.layer.bias)
            twin.head.load_state_dict(model.head.state_dict())
        fastpeft.patch(twin, lora(use_dora=True, lora_dropout=0.3))
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(model.get_parameter(name))
        z = rows().requires_grad_()
        twin.eval()(z).square().sum().backward()
        assert error(x.grad, z.grad) < 1e-5
        before = model(rows())
        quietly(model.merge_and_unload)
        assert type(model.layer) is Halves and error(model(rows()), before) < 0.05
    finally:
        quantised._found.cache_clear()


def embedding_4bit() -> nn.Module:
    import bitsandbytes

    return bitsandbytes.nn.Embedding4bit(64, 64).to("cpu")


def unquantised_4bit() -> nn.Module:
    import bitsandbytes

    return bitsandbytes.nn.Linear4bit(K, N)


def unquantised_8bit() -> nn.Module:
    import bitsandbytes

    return bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)


def meta_4bit() -> nn.Module:
    import bitsandbytes

    with torch.device("meta"):
        return bitsandbytes.nn.Linear4bit(K, N)


def torchao_embedding() -> nn.Module:
    embedding = nn.Embedding(N, K)
    embedding.weight = linear_torchao()["layer"].weight
    return embedding


REFUSED = [
    (embedding_4bit, "layer is a Embedding4bit with a weight of Params4bit.*of quantised modules only linear"),
    (torchao_embedding, "layer is a Embedding with a weight of Int8Tensor.*only linear layers carry an adapter"),
    (unquantised_4bit, "layer, a Linear4bit of bitsandbytes, is not quantised yet; move the model to its device"),
    (unquantised_8bit, "layer, a Linear8bitLt of bitsandbytes, is not quantised yet; move the model to its device"),
    (meta_4bit, "layer is on the meta device; load the model's weights before patching it"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[build.__name__ for build, _ in REFUSED])
def test_what_cannot_carry_an_adapter_is_refused(build, message):
    model = Model(build())
    kind = type(model.layer)
    with pytest.raises(TargetError, match=message):
        fastpeft.patch(model, lora())
    assert type(model.layer) is kind and not hasattr(model, "_fastpeft")


@pytest.mark.parametrize("build", [linear_4bit, linear_8bit, linear_torchao])
def test_pissa_wants_a_weight_that_is_not_quantised(build):
    with pytest.raises(TargetError, match="'pissa' decomposes a floating-point weight, and layer is a quantised"):
        fastpeft.patch(build(), lora(init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="loftq"):
        fastpeft.patch(build(), lora(init_lora_weights="loftq"))


@pytest.mark.interpreter
@pytest.mark.parametrize("build", [linear_4bit, linear_torchao, partial(foreign, "gptq")], ids=["4", "ao", "gptq"])
def test_the_low_rank_part_runs_in_the_kernels(build):
    results = []
    for backend in ("torch", "triton"):
        model = build().train()
        torch.manual_seed(1)
        fastpeft.patch(model, lora(), backend=backend)
        randomise(model)
        layer = model.layer if isinstance(model, Model) else model["layer"]
        x = rows().requires_grad_()
        with count_traffic() as traffic:
            layer(x).square().sum().backward()
        ran = {name for name in traffic.kernels() if "lora" in name or "_kernel" in name}
        assert bool(ran) == (backend == "triton")
        results.append([x.grad, *(each.grad for each in layer.parameters() if each.grad is not None)])
        row = fastpeft.report(model).layers[0]
        assert row.backend == backend and "the base product is its own class's" in row.reason
    assert len(results[0]) == 3
    assert all(error(mine, theirs) < 1e-5 for mine, theirs in zip(*results, strict=True))
