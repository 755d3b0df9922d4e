"""Each kind of layer that carries a LoRA, alone beside Hugging Face peft's: start, outputs, gradients, merging."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.ops import _lora_linear_torch as torch_path
from fastpeft.ops.lora_linear import dropout_mask
from fastpeft.ops.row_norms import row_norms
from tests.peft_pair import assert_same_gradients, assert_same_start, close, pair_of, quietly, randomise


class Scaled(nn.Linear):
    """A subclass whose forward takes another argument and is not a product."""

    def forward(self, input, gain=2.0):
        return torch.tanh(super().forward(input)) * gain


def gemma_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(17, 12, 0, embed_scale=12**0.5)


KINDS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear-no-bias": lambda: nn.Linear(12, 20, bias=False),
    "linear-subclass": lambda: Scaled(12, 20),
    "conv1d-of-gpt2": lambda: Conv1D(20, 12),
    "embedding": lambda: nn.Embedding(17, 12, padding_idx=3),
    "embedding-by-frequency": lambda: nn.Embedding(17, 12, scale_grad_by_freq=True),
    "embedding-bounded": lambda: nn.Embedding(17, 12, max_norm=1.0),
    "embedding-scaled": gemma_embedding,
    "conv1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
    "conv1d-no-bias": lambda: nn.Conv1d(6, 8, 4, bias=False),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)),
    "conv2d-same": lambda: nn.Conv2d(6, 8, 3, padding="same"),
    "conv2d-pointwise": lambda: nn.Conv2d(6, 8, 1),
    "conv2d-groups": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(6, 8, 2),
}
CONVOLUTIONS = [kind for kind in KINDS if kind.startswith("conv") and kind != "conv1d-of-gpt2"]
EMBEDDINGS = [kind for kind in KINDS if kind.startswith("embedding")]
P = 0.4


def module_of(kind: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(KINDS[kind]()).to(dtype)


def inputs_of(kind: str, dtype=torch.float32, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind in EMBEDDINGS:
        return torch.randint(0, 17, (rows, 7), generator=generator)
    size = {"conv1d": (6, 9), "conv2d": (6, 9, 8), "conv3d": (6, 4, 3, 5)}
    shape = next((size[name] for name in size if kind.startswith(name) and kind in CONVOLUTIONS), (7, 12))
    return torch.randn(rows, *shape, generator=generator).to(dtype)


def pair(kind: str, settings: dict, dtype=torch.float32, **options):
    return pair_of(lambda: module_of(kind, dtype), {"target_modules": ["0"], **settings}, **options)


def assert_same_step(hf, ours, x: torch.Tensor) -> None:
    """Outputs, and gradients of the adapter and of the input."""
    inputs, outputs = [], []
    for model in (hf, ours):
        model.zero_grad()
        inputs.append(x.clone().requires_grad_(x.is_floating_point()))
        torch.manual_seed(4)
        outputs.append(model(inputs[-1]))
        weights = torch.randn(outputs[-1].shape, generator=torch.Generator().manual_seed(5))
        (outputs[-1] * weights).sum().backward()
    close(outputs[1], outputs[0], 1e-5)
    assert_same_gradients(hf, ours, 1e-4)
    if x.is_floating_point():
        close(inputs[1].grad, inputs[0].grad, 1e-5)


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "not-neutral": {"init_lora_weights": False},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora-not-neutral": {"use_dora": True, "init_lora_weights": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_as_in_peft(kind, settings):
    refused = (kind in EMBEDDINGS and settings == "bias") or (kind == "conv2d-groups" and "dora" in settings)
    if refused:  # by peft with a ValueError, or a RuntimeError from inside
        with pytest.raises(fastpeft.ConfigError, match="0"):
            config = fastpeft.LoraConfig(r=4, target_modules=["0"], **SETTINGS[settings])
            quietly(fastpeft.patch, module_of(kind), config)
        return
    hf, ours = pair(kind, SETTINGS[settings])
    assert_same_start(hf, ours)
    randomise(hf, ours)
    x = inputs_of(kind)
    assert_same_step(hf, ours, x)
    if kind == "linear-subclass" or kind == "embedding-bounded" or "groups" in kind:
        return  # not linear in the weight; groups: see below
    if settings == "bias" and "no-bias" in kind:
        with pytest.raises(fastpeft.PatchError, match="0: .*lora_bias"):
            fastpeft.merge(ours)
        return
    before = ours(x)
    close(ours.merge_and_unload()(x), before, 1e-5)
    if (
        settings == "plain" or kind not in CONVOLUTIONS
    ):  # peft's delta of a rectangular or 1-D kernel under DoRA is right too
        close(ours(x), quietly(hf.merge_and_unload)(x), 1e-5)


def with_same_mask(monkeypatch, keep: torch.Tensor | None = None) -> None:
    """torch's dropout drops the elements of `keep`, or some that depend on the shape alone."""

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        mask = keep
        if mask is None:
            mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(6)) >= p
        return x * mask.view(x.shape) / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "conv2d-groups"])
def test_dropout_is_as_in_peft(kind, use_dora, monkeypatch):
    hf, ours = pair(kind, {"lora_dropout": P, "use_dora": use_dora})
    randomise(hf, ours)
    x = inputs_of(kind)
    assert_same_step(hf, ours, x)
    hf.train(), ours.train()
    keep = None
    own = use_dora and kind == "linear-subclass"  # whose forward no op of DoRA computes
    if kind.startswith(("linear", "conv1d-of")) and not own:  # drawn by the op, from a seed
        torch.manual_seed(4)
        keep = dropout_mask(torch_path.draw_seed(x), P, x[..., 0].numel(), x.shape[-1], "cpu", "torch")
        assert 0.3 < keep.float().mean() < 0.9
    with_same_mask(monkeypatch, keep)
    evaluated = copy.deepcopy(ours).eval()(x)
    assert_same_step(hf, ours, x)
    assert (kind in EMBEDDINGS) == torch.allclose(ours(x), evaluated)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv1d-of-gpt2", "conv2d"])
def test_the_mean_of_dropout_is_the_output_without(kind):
    _, ours = pair(kind, {"lora_dropout": P})
    randomise(ours)
    x = inputs_of(kind)
    expected = ours(x)
    ours.train()
    torch.manual_seed(7)
    draws = torch.stack([ours(x) for _ in range(400)])
    error = (draws.mean(0) - expected) / (draws.std(0) / 20)
    assert 0.5 < error.square().mean() < 1.6 and error.abs().max() < 5


SHAPED = {
    "dilation-1d": lambda: nn.Conv1d(6, 8, 3, dilation=2),
    "dilation-2d": lambda: nn.Conv2d(6, 8, 3, dilation=(2, 1), stride=2),
    "circular": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="reflect"),
    "replicate-same": lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2, padding_mode="replicate"),
}


@torch.no_grad()
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", SHAPED)
def test_a_convolution_is_that_with_the_merged_weight(kind, use_dora):
    # peft fails under dilation, and ignores the padding mode
    torch.manual_seed(2)
    model = nn.Sequential(SHAPED[kind]()).eval()
    x = inputs_of("conv1d" if isinstance(model[0], nn.Conv1d) else "conv2d")
    base = model(x)
    fastpeft.patch(model, fastpeft.LoraConfig(r=4, target_modules=["0"], use_dora=use_dora))
    close(model(x), base, 1e-5)
    randomise(model)
    before = model(x)
    assert (before - base).abs().max() > 0.1
    close(model.merge_and_unload()(x), before, 1e-5)


def test_groups_are_not_merged_and_must_divide_the_rank():
    _, ours = pair("conv2d-groups", {})
    weights = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    with pytest.raises(fastpeft.PatchError, match=r"0: .*2 groups"):
        fastpeft.merge(ours)
    assert all(torch.equal(weights[name], parameter) for name, parameter in ours.named_parameters())
    with pytest.raises(fastpeft.ConfigError, match="2 groups.*r is 3"):
        fastpeft.patch(module_of("conv2d-groups"), fastpeft.LoraConfig(r=3, target_modules=["0"]))


def several(kind: str, dtype, **first):
    """peft's and our model with adapters a and b, both active; the first has the given settings besides."""
    import peft

    models = []
    for library, wrap in ((peft, peft.get_peft_model), (fastpeft, fastpeft.patch)):
        model = quietly(
            wrap, module_of(kind, dtype), library.LoraConfig(r=4, target_modules=["0"], **first), adapter_name="a"
        )
        quietly(model.add_adapter, "b", library.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **first))
        for name in ("a", "b"):
            model.set_adapter(name)
            randomise(model, seed=ord(name))
        (model.base_model if library is peft else model).set_adapter(["a", "b"])
        models.append(model.eval())
    return models


@pytest.mark.parametrize("first", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "conv2d-groups"])
def test_several_adapters_are_added_up_as_in_peft(kind, first):
    hf, ours = several(kind, torch.float32, **first)
    assert ours.active_adapters == ["a", "b"]
    x = inputs_of(kind)
    assert_same_step(hf, ours, x)
    ours.set_adapter("b")
    hf.set_adapter("b")
    assert_same_step(hf, ours, x)
    ours.set_adapter(["b", "a"])
    if "use_dora" not in first:
        hf.base_model.set_adapter(["a", "b"])
        close(ours(x), hf(x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["linear", "linear-no-bias", "conv1d-of-gpt2", "embedding", "embedding-scaled", "conv2d"]
)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_half_precision_is_as_exact_as_in_peft(kind, dtype, use_dora, count):
    if count == 1:
        hf, ours = pair(kind, {"use_dora": use_dora}, dtype=dtype)
        randomise(hf, ours)
    else:
        hf, ours = several(kind, dtype, use_dora=use_dora)
    x = inputs_of(kind, dtype, rows=40)
    exact = copy.deepcopy(hf).double()(x.double() if x.is_floating_point() else x)
    found = [model(x) for model in (hf, ours)]
    assert found[1].dtype == found[0].dtype == dtype
    errors = [float((each.double() - exact).square().mean().sqrt()) for each in found]
    assert 0 < errors[1] <= 1.1 * errors[0]


class Sizes(TorchDispatchMode):
    """The number of elements of the greatest tensor that any operation returns in memory of its own."""

    greatest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.greatest = max(self.greatest, tensor.numel())
        return result


def test_dora_builds_no_tensor_as_large_as_the_weight():
    torch.manual_seed(0)
    N, K = 640, 512
    found = []
    for settings in ({"use_dora": True}, {"use_dora": True, "lora_dropout": P}):
        model = nn.Sequential(nn.Linear(K, N))
        fastpeft.patch(model, fastpeft.LoraConfig(r=4, target_modules=["0"], **settings))
        x = torch.randn(16, K, requires_grad=True)
        with Sizes() as sizes:
            model(x).sum().backward()
        found.append(sizes.greatest)
    assert all(16 * N <= greatest <= N * K // 4 for greatest in found)
    with Sizes() as sizes:
        torch.linalg.norm(
            model[0].weight + model[0].lora_B["default"].weight @ model[0].lora_A["default"].weight, dim=1
        )
    assert sizes.greatest == N * K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-3])
def test_the_norm_of_dora_is_as_exact_as_that_of_the_sum(left, dtype):
    # with `left` of W + s·B A left, of numbers of about 10
    torch.manual_seed(0)
    N, K, r, s = 300, 128, 8, 2.0
    a, b = torch.randn(r, K, dtype=torch.float64), torch.randn(N, r, dtype=torch.float64)
    weight = (left * torch.randn(N, K, dtype=torch.float64) - s * b @ a).to(dtype)
    a, b = a.float(), b.float()
    exact = torch.linalg.norm(weight.double() + s * b.double() @ a.double(), dim=1)
    sum_first = torch.linalg.norm(weight.float() + s * (b @ a), dim=1)
    error = ((row_norms(weight, a, b, s) - exact) / exact).abs()
    assert error.max() <= 2 * ((sum_first - exact) / exact).abs().max() + torch.finfo(torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16):
        inside = row_norms(weight, a, b, s)
    assert torch.equal(inside, row_norms(weight, a, b, s))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_a_parametrised_weight_is_computed_once_and_not_merged(settings):
    class Doubled(nn.Module):
        calls = 0

        def forward(self, weight):
            Doubled.calls += 1
            return 2 * weight

    def build():
        model = nn.ModuleDict({"lin": nn.Linear(12, 20)})
        torch.manual_seed(2)
        nn.init.normal_(model["lin"].weight)
        nn.init.zeros_(model["lin"].bias)
        model.forward = lambda x: model["lin"](x)
        return model

    x = torch.randn(3, 12)
    config = fastpeft.LoraConfig(r=4, target_modules=["lin"], **settings)
    plain, model = build(), build()
    with torch.no_grad():
        plain["lin"].weight.mul_(2)
    nn.utils.parametrize.register_parametrization(model["lin"], "weight", Doubled())
    for each in (plain, model):
        torch.manual_seed(1)
        fastpeft.patch(each, config)
    randomise_adapters(plain, model)
    close(model["lin"](x), plain["lin"](x), 1e-6)
    Doubled.calls = 0
    model["lin"](x)
    assert settings or Doubled.calls == 1
    with pytest.raises(fastpeft.PatchError, match="lin: .*computed"):
        fastpeft.merge(model)
    fastpeft.unpatch(model)
    close(model["lin"](x), fastpeft.unpatch(plain)["lin"](x), 1e-6)


def randomise_adapters(*models) -> None:
    with torch.no_grad():
        for model in models:
            generator = torch.Generator().manual_seed(8)
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("call", [lambda layer, x: layer(input=x), lambda layer, x: layer(x, gain=3.0)])
def test_other_ways_to_call_a_layer_reach_its_class(call):
    torch.manual_seed(2)
    layer = Scaled(12, 20)
    x = inputs_of("linear")
    expected = call(layer, x)
    model = fastpeft.patch(nn.Sequential(layer), fastpeft.LoraConfig(r=4, target_modules=["0"]))
    close(call(layer, x), expected, 1e-6)
    randomise(model)
    assert not torch.allclose(call(layer, x), expected)
    with fastpeft.disable_adapter(model):
        assert torch.equal(call(layer, x), expected)
