"""`quantise_base_fp8` and `dequantise_base_fp8`: which layers, what adapters on them compute and learn, what is given
back, memory. Beside other things they are in test_fp8_in_use.py, refusals in test_fp8_refused.py, and the arithmetic by
itself in tests/ops/test_fp8_linear.py."""

import copy

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig, quantised
from fastpeft.errors import OpError, PatchError
from fastpeft.fp8_layer import Fp8Linear
from tests.memory import saved_for_backward
from tests.models import batch, differences, snapshot, tiny
from tests.ops.test_fp8_linear import emulated_rows
from tests.peft_pair import quietly, randomise

FP8 = torch.float8_e4m3fn
N, K, R = 24, 33, 4
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ALL = [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(K, N, bias=bias), nn.Linear(N, 5)
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": R, "lora_alpha": 8, "target_modules": ["layer"], **settings})


def patched(dtype=torch.float32, bias=True, **settings) -> Model:
    model = Model(dtype, bias)
    torch.manual_seed(1)
    fastpeft.patch(model, lora(**settings))
    randomise(model)
    return model


def rows(count: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(2)).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def in_fp8(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Fp8Linear)]


def frozen(*arguments, **options) -> nn.Module:
    return tiny(*arguments, **options).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_are_those_of_the_emulation(dtype, bias):
    """In float64: the base of rounded rows, the low-rank term of x as it is, gradients through both."""
    model = patched(dtype, bias)
    layer, dense = model.layer, model.layer.weight.detach().clone()
    fastpeft.quantise_base_fp8(model, ["layer"])
    a, b = (each.detach().double().requires_grad_() for each in layer.factors("default"))
    x, dy = rows(dtype=dtype).requires_grad_(), torch.randn(6, N).to(dtype)
    y = layer(x)
    y.backward(dy)
    z = x.detach().double().requires_grad_()
    weight = emulated_rows(dense)
    base = (emulated_rows(x.detach()) - z.detach() + z) @ weight.t()
    truth = base + 2.0 * (z @ a.t()) @ b.t() + (layer.bias.detach().double() if bias else 0)
    truth.backward(dy.double())
    assert y.dtype == dtype and layer.lora_A["default"].weight.dtype == torch.float32
    bound = 4 * torch.finfo(dtype).eps
    assert error(y, truth) < bound and error(x.grad, z.grad) < bound
    assert error(layer.lora_A["default"].weight.grad, a.grad) < bound
    assert error(layer.lora_B["default"].weight.grad, b.grad) < bound
    assert layer.weight.grad is None
    assert torch.allclose(quantised.dense_weight(layer).double(), weight, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_all_linear_is_the_backbone_s_layers():
    for model in (frozen(), fastpeft.patch(tiny(), lora(target_modules=["q_proj"]))):
        assert fastpeft.quantise_base_fp8(model) is model
        assert in_fp8(model) == ALL
        assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    classifier = fastpeft.quantise_base_fp8(frozen(task="SEQ_CLS"))
    assert in_fp8(classifier) == ALL and type(classifier.score) is nn.Linear
    masked = fastpeft.quantise_base_fp8(frozen("bert", "TOKEN_CLS"))
    assert in_fp8(masked) and all(path.startswith("bert.") for path in in_fp8(masked))
    plain = fastpeft.quantise_base_fp8(Model().requires_grad_(False))
    assert in_fp8(plain) == ["layer", "head"]


def test_names_expressions_and_exclusions():
    model = frozen()
    fastpeft.quantise_base_fp8(model, ["q_proj", "layers.0.mlp.up_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    assert in_fp8(model) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    fastpeft.quantise_base_fp8(model, r".*\.1\..*(gate|up)_proj")
    assert len(in_fp8(model)) == 4
    fastpeft.quantise_base_fp8(model, exclude_modules=r".*self_attn.*")
    assert set(in_fp8(model)) == {path for path in ALL if "mlp" in path} | {"model.layers.0.self_attn.q_proj"}
    fastpeft.quantise_base_fp8(model, ["lm_head"])
    assert "lm_head" in in_fp8(model)


def test_what_transformers_keeps_in_fp32_is_left_out():
    """T5 casts the input of `wo` to the dtype of its weight."""
    model = fastpeft.quantise_base_fp8(frozen("t5", "SEQ_2_SEQ_LM"))
    found = {path.rpartition(".")[2] for path in in_fp8(model)}
    assert found == {"q", "k", "v", "o", "wi"}
    assert model(**batch("SEQ_2_SEQ_LM")).loss.isfinite()
    other = fastpeft.quantise_base_fp8(frozen("t5", "SEQ_2_SEQ_LM"), ["wo"])
    with pytest.raises(OpError, match="x is torch.float8_e4m3fn"):
        other(**batch("SEQ_2_SEQ_LM"))


def test_before_and_after_the_patch_are_the_same(tmp_path):
    """And so is a saved adapter, loaded into a base in float8."""
    config = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    models = []
    for first in (True, False):
        model = fastpeft.quantise_base_fp8(frozen()) if first else tiny()
        torch.manual_seed(1)
        fastpeft.patch(model, config)
        randomise(model)
        models.append(model if first else fastpeft.quantise_base_fp8(model))
    expected = models[0](**batch())
    assert torch.equal(models[1](**batch()).logits, expected.logits)
    kinds = [(row.path, row.kind, row.op, row.reason) for row in fastpeft.report(models[0]).layers]
    assert kinds == [(row.path, row.kind, row.op, row.reason) for row in fastpeft.report(models[1]).layers]
    assert kinds[0][1:3] == ("LoraFp8Linear", "lora_linear") and "its own class's" in kinds[0][3]
    statuses = [fastpeft.get_layer_status(model)[0].quantization_backend for model in models]
    assert statuses == ["fastpeft", "fastpeft"]
    gradients = []
    for model in models:
        model.train()(**batch()).loss.backward()
        gradients.append([each.grad for each in model.parameters() if each.requires_grad])
    assert len(gradients[0]) == 28 and all(map(torch.equal, *gradients))
    models[1].save_pretrained(tmp_path)
    loaded = fastpeft.load_adapter(fastpeft.quantise_base_fp8(frozen()), tmp_path)
    assert torch.equal(loaded(**batch()).logits, expected.logits)
    on_dense = fastpeft.load_adapter(tiny(), tmp_path)
    assert 0.001 < error(on_dense(**batch()).logits, expected.logits) < 0.3


@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_kept_comes_back_bit_for_bit(adapted):
    model = tiny()
    fastpeft.patch(model, lora(target_modules=["q_proj"])) if adapted else model.requires_grad_(False)
    before = snapshot(model)
    weights = {name: each.clone() for name, each in model.named_parameters()}
    fastpeft.quantise_base_fp8(model, keep=True)
    assert any("class differs" in each for each in differences(before, snapshot(model)))
    assert fastpeft.dequantise_base_fp8(model) is model
    changed = differences(before, snapshot(model))
    assert all(each.startswith("tensor model.layers") and "storage" in each or "object" in each for each in changed)
    assert all(torch.equal(each, weights[name]) for name, each in model.named_parameters())
    if adapted:
        fastpeft.unpatch(model)
        assert all(each.requires_grad for each in model.parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("order", ["unpatched between", "patched all along", "patched between"])
def test_what_was_not_kept_is_what_float8_stands_for(order):
    """And what was to be trained before the patch is so again after it."""
    model = Model(torch.bfloat16)
    dense, x = model.layer.weight.detach().clone(), rows(dtype=torch.bfloat16)
    if order == "patched between":
        fastpeft.quantise_base_fp8(model.requires_grad_(False), ["layer"])
    fastpeft.patch(model, lora())
    if order != "patched between":
        fastpeft.quantise_base_fp8(model, ["layer"])
    if order == "unpatched between":
        fastpeft.unpatch(model)
        assert type(model.layer) is Fp8Linear
        assert not model.layer.weight.requires_grad and model.head.weight.requires_grad
    y = model(x)
    fastpeft.dequantise_base_fp8(model)
    if order != "unpatched between":
        fastpeft.unpatch(model)
    assert type(model.layer) is nn.Linear and set(model.layer.state_dict()) == {"weight", "bias"}
    assert model.layer.weight.requires_grad == (order != "patched between")
    assert model.layer.weight.dtype == torch.bfloat16 and 0.01 < error(model.layer.weight, dense) < 0.04
    assert 0 < error(model(x), y) < 0.05


def test_merging_quantises_again_and_is_undone():
    model = patched(torch.bfloat16)
    fastpeft.quantise_base_fp8(model, ["layer"], keep=True)
    x, before = rows(dtype=torch.bfloat16), snapshot(model)
    y = model(x)
    with pytest.warns(UserWarning, match="merging rounds fastpeft's quantised weights once more"):
        fastpeft.merge(model)
    assert model.layer.weight.dtype == FP8 and model.layer.original is None
    assert 0 < error(model(x), y) < 0.1
    for function in (fastpeft.quantise_base_fp8, fastpeft.dequantise_base_fp8):
        with pytest.raises(PatchError, match="the model has default merged into its weights; unmerge first"):
            function(model)
    fastpeft.unmerge(model)
    assert differences(before, snapshot(model)) == [] and torch.equal(model(x), y)
    quietly(fastpeft.merge_and_unload, model)
    assert type(model.layer) is Fp8Linear and 0 < error(model(x), y) < 0.1
    fastpeft.dequantise_base_fp8(model)
    assert 0 < error(model(x), y) < 0.1  # the merged weight, and not the one that was kept without it


@pytest.mark.parametrize(
    "settings", [{"use_dora": True, "lora_dropout": 0.3}, {"lora_bias": True}, {"init_lora_weights": "olora"}], ids=str
)
def test_variants_of_lora(settings):
    """Beside the same adapter on the dense weight that float8 stands for."""
    model = fastpeft.quantise_base_fp8(Model().requires_grad_(False), ["layer"])
    twin = fastpeft.dequantise_base_fp8(copy.deepcopy(model))
    results = []
    for each in (model, twin):
        torch.manual_seed(1)
        fastpeft.patch(each, lora(**settings))
        randomise(each)
        x = rows().requires_grad_()
        y = each.eval()(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert len(results[0]) >= 4
    assert all(0 < error(mine, dense) < 0.12 for mine, dense in zip(*results, strict=True))
    if "init_lora_weights" in settings:
        for function in (fastpeft.dequantise_base_fp8, lambda model: fastpeft.quantise_base_fp8(model, ["layer"])):
            with pytest.raises(PatchError, match="initialisation has changed the weight of layer|quantised already"):
                function(model) if function is fastpeft.dequantise_base_fp8 else function(twin)
    fastpeft.unpatch(model)
    assert torch.equal(quantised.dense_weight(model.layer), twin.layer.weight) or "init_lora_weights" in settings


def test_adalora_on_float8():
    outcomes = []
    for first in (True, False):
        model = Model().requires_grad_(False)
        fastpeft.quantise_base_fp8(model, ["layer"]) if first else None
        torch.manual_seed(1)
        fastpeft.patch(model, fastpeft.AdaLoraConfig(init_r=6, target_r=3, total_step=9, target_modules=["layer"]))
        randomise(model)
        fastpeft.quantise_base_fp8(model, ["layer"]) if not first else None
        y = model(rows())
        y.square().sum().backward()
        outcomes.append([y, *(each.grad for each in model.parameters() if each.requires_grad)])
    assert len(outcomes[0]) == 4 and all(map(torch.equal, *outcomes))
    fastpeft.dequantise_base_fp8(model)
    assert type(model.layer).__name__ == "AdaLoraLinear" and 0 < error(model(rows()), outcomes[0][0]) < 0.1


def test_bytes_are_half_of_bf16_s():
    model = frozen(dtype=torch.bfloat16)
    linear = [model.get_submodule(path) for path in ALL]
    numbers, outputs = (sum(size(each.weight) for each in linear) for size in (torch.numel, len))
    other = sum(each.nbytes for each in model.parameters()) - 2 * numbers
    fastpeft.quantise_base_fp8(model)
    assert sum(each.nbytes for each in model.parameters()) == other + numbers
    held = {id(each): each.nbytes for layer in linear for each in (*layer.parameters(), *layer.buffers())}
    assert sum(held.values()) == numbers + 4 * outputs
    assert fastpeft.count_parameters(model)[1] == sum(each.numel() for each in model.parameters())
    x = torch.randn(512, 32, dtype=torch.bfloat16).requires_grad_()
    with saved_for_backward() as saved:
        linear[0](x)
    assert sum(saved.values()) == linear[0].weight.nbytes + linear[0].weight_scale.nbytes


def test_training_goes_as_with_the_base_in_bf16():
    """Twenty steps: the loss falls as far, and nothing but the adapter moves."""
    traces = []
    for float8 in (False, True):
        torch.manual_seed(1)
        model = fastpeft.patch(tiny(dtype=torch.bfloat16), lora(r=8, lora_alpha=16, target_modules="all-linear"))
        fastpeft.quantise_base_fp8(model) if float8 else None
        codes = model.model.layers[0].mlp.up_proj.weight.clone()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model.train()(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        traces.append(losses)
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight.float(), codes.float())
    bf16, fp8 = traces
    assert bf16[-1] < 0.6 * bf16[0] and fp8[-1] < 0.6 * fp8[0]
    assert fp8[0] == pytest.approx(bf16[0], rel=0.03) and abs(fp8[-1] - bf16[-1]) < 0.15 * (bf16[0] - bf16[-1])
