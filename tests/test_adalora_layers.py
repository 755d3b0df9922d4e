"""Each kind of layer that carries an AdaLoRA: as Hugging Face peft's, beside other adapters, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.ops import _lora_linear_torch as torch_path
from fastpeft.ops.lora_linear import dropout_mask
from fastpeft.tuners.adalora import AdaLoraLayer
from fastpeft.tuners.orthogonality import mean_distance
from tests.adalora_pair import SCHEDULE, TARGETS, adam, ours_alone, train, unlabelled
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import assert_same_gradients, assert_same_start, close, pair_of, quietly, randomise, result
from tests.two_adapters import config as lora_config

KINDS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear-no-bias": lambda: nn.Linear(12, 20, bias=False),
    "conv1d-of-gpt2": lambda: Conv1D(20, 12),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)),
    "conv2d-dilated": lambda: nn.Conv2d(6, 8, 3, dilation=2),
    "conv2d-same": lambda: nn.Conv2d(6, 8, 3, padding="same"),
    "conv2d-pointwise": lambda: nn.Conv2d(6, 8, 1, bias=False),
}
P = 0.4


def module_of(kind: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(KINDS[kind]()).to(dtype)


def inputs_of(kind: str) -> torch.Tensor:
    shape = (5, 6, 9, 8) if kind.startswith("conv2d") else (5, 7, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def pair(kind: str, **settings):
    return pair_of(lambda: module_of(kind), {"target_modules": ["0"], **SCHEDULE, **settings}, "AdaLoraConfig")


def assert_same_step(hf, ours, x: torch.Tensor) -> None:
    inputs, outputs = [], []
    for model in (hf, ours):
        inputs.append(x.clone().requires_grad_())
        torch.manual_seed(4)
        outputs.append(model(inputs[-1]))
        weights = torch.randn(outputs[-1].shape, generator=torch.Generator().manual_seed(5))
        (outputs[-1] * weights).sum().backward()
    close(outputs[1], outputs[0], 1e-5)
    assert_same_gradients(hf, ours, 1e-4)
    close(inputs[1].grad, inputs[0].grad, 1e-5)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 30}, {"init_lora_weights": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_as_in_peft(kind, settings):
    hf, ours = pair(kind, **settings)
    assert_same_start(hf, ours)
    randomise(hf, ours)
    x = inputs_of(kind)
    assert_same_step(hf, ours, x)
    before = ours(x)
    fastpeft.merge(ours)
    close(ours(x), before, 1e-5)
    fastpeft.unmerge(ours)
    assert torch.equal(ours(x), before)
    close(ours.merge_and_unload()(x), quietly(hf.merge_and_unload)(x), 1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d-of-gpt2", "conv2d"])
def test_dropout_is_as_in_peft(kind, monkeypatch):
    hf, ours = pair(kind, lora_dropout=P)
    randomise(hf, ours)
    x = inputs_of(kind)
    hf.train(), ours.train()
    if kind == "conv2d":
        keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(6)) >= P
    else:  # drawn by the op, from a seed
        torch.manual_seed(4)
        keep = dropout_mask(torch_path.draw_seed(x), P, x[..., 0].numel(), x.shape[-1], "cpu", "torch").view(x.shape)
    monkeypatch.setattr(F, "dropout", lambda x, p, training=True, inplace=False: x * keep / (1 - p) if training else x)
    assert_same_step(hf, ours, x)
    assert not torch.allclose(ours(x), ours.eval()(x))


def test_a_convolution_pads_as_its_base_does():
    """peft's update pads with zeros, whatever the base does, and then differs from the merged weight."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"))
    config = fastpeft.AdaLoraConfig(target_modules=["0"], init_lora_weights=False, **SCHEDULE)
    ours = fastpeft.patch(model, config)
    x = inputs_of("conv2d")
    before = ours(x)
    close(ours.merge_and_unload()(x), before, 1e-5)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Embedding(7, 5), "is a Embedding, which AdaLoRA does not serve; it serves Linear, Conv2d"),
        (nn.Conv1d(4, 4, 3), "is a Conv1d, which AdaLoRA does not serve"),
        (nn.Conv2d(4, 4, 3, groups=2), "is a convolution with 2 groups"),
    ],
)
def test_what_is_not_served_is_refused(module, words):
    model = nn.Sequential(module, nn.Linear(3, 3))
    before = snapshot(model)
    with pytest.raises(fastpeft.TargetError, match=f"0 {words}"):
        fastpeft.patch(model, fastpeft.AdaLoraConfig(target_modules=["0", "1"], **SCHEDULE))
    assert differences(before, snapshot(model)) == []


def test_unpatching_leaves_no_trace():
    model = tiny()
    before = snapshot(model)
    ours = fastpeft.patch(model, fastpeft.AdaLoraConfig(task_type="CAUSAL_LM", **SCHEDULE, **TARGETS))
    train(ours.train(), adam(ours), range(1, 4))
    fastpeft.unpatch(ours)
    assert differences(before, snapshot(model)) == []


# The orthogonal term.


def reference(rows, columns):
    grams = [x @ x.T for x in rows] + [x.T @ x for x in columns]
    return sum(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype)) for gram in grams) / len(grams)


def test_the_orthogonal_term_is_the_mean_distance():
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 8), (3, 8), (3, 10), (2, 8), (0, 8)], [(9, 3), (9, 3), (8, 3), (8, 2), (9, 0)]
    rows, columns = ([torch.randn(s, generator=generator).double().requires_grad_() for s in part] for part in shapes)
    found, expected = mean_distance(rows, columns, torch.device("cpu")), reference(rows, columns)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, rows + columns) for value in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert mean_distance([], [], torch.device("cpu")) == 0


def test_the_gradient_at_orthonormal_vectors_is_zero():
    x = torch.eye(3, 7, requires_grad=True)
    distance = mean_distance([x], [x.T], torch.device("cpu"))
    distance.backward()
    assert distance == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_the_orthogonal_term_is_in_the_loss_always(tmp_path):
    ours = ours_alone(**TARGETS)
    randomise(ours)
    inputs = batch()
    layers = [layer for layer in ours.modules() if isinstance(layer, AdaLoraLayer)]
    with torch.no_grad():
        term = reference([x.lora_A["default"] for x in layers], [x.lora_B["default"] for x in layers])
        logits = ours(**inputs).logits
        plain = ours.loss_function(logits=logits, labels=inputs["labels"], vocab_size=97)
    expected = plain + 0.5 * term
    for model in (ours.train(), ours.eval()):
        close(model(**inputs).loss.detach(), expected, 1e-5)
    ours.save_pretrained(tmp_path)
    frozen = fastpeft.load_adapter(tiny(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    close(frozen(**inputs).loss, expected, 1e-5)
    found = frozen(**inputs, return_dict=False)  # which peft leaves out
    close(found[0], expected, 1e-5)
    assert torch.equal(found[1], frozen(**inputs).logits)
    assert frozen(**unlabelled(inputs)).loss is None
    assert torch.equal(frozen(**unlabelled(inputs), return_dict=False)[0], found[1])
    with fastpeft.disable_adapter(frozen):
        close(frozen(**inputs).loss, tiny()(**inputs).loss, 1e-6)


def test_the_orthogonal_term_is_exact_under_autocast():
    ours = ours_alone(**TARGETS)
    randomise(ours)
    layers = [layer for layer in ours.modules() if isinstance(layer, AdaLoraLayer)]
    rows, columns = [x.lora_A["default"] for x in layers], [x.lora_B["default"] for x in layers]
    expected = mean_distance(rows, columns, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_distance(rows, columns, torch.device("cpu")), expected)


# Beside other adapters, and in other settings.


def test_one_adapter_trains(tmp_path):
    ours = ours_alone(**TARGETS)
    ours.save_pretrained(tmp_path)
    with pytest.raises(fastpeft.PatchError, match="AdaLoRA trains one adapter of a model, and 'default' is one"):
        ours.add_adapter("other", fastpeft.AdaLoraConfig(**SCHEDULE, **TARGETS))
    with pytest.raises(fastpeft.PatchError, match="AdaLoRA trains one adapter"):
        fastpeft.load_adapter(ours, tmp_path, adapter_name="other", trainable=True)
    assert list(ours.peft_config) == ["default"]
    fastpeft.load_adapter(ours, tmp_path, adapter_name="other")
    assert torch.equal(result(ours, batch()), result(tiny(), batch()))


def test_several_adapters_each_do_their_own(tmp_path):
    one, other = ours_alone(**TARGETS), ours_alone(init_r=4, target_r=2, target_modules=["q_proj", "up_proj"])
    randomise(one, seed=1)
    randomise(other, seed=2)
    inputs = unlabelled(batch())
    expected = result(other, inputs)
    other.save_pretrained(tmp_path)
    alone = result(one, inputs)
    fastpeft.load_adapter(one, tmp_path, adapter_name="other")
    assert torch.equal(result(one, inputs), alone)
    with fastpeft.use_adapter(one, "other"):
        close(result(one, inputs), expected, 1e-6)
    with fastpeft.use_adapter(one, ["default", "other"]):
        both = result(one, inputs)
    fastpeft.merge(one, ["default", "other"])
    close(result(one, inputs), both, 1e-5)
    fastpeft.unmerge(one)
    one.delete_adapter("default")
    close(result(one, inputs), expected, 1e-6)


def test_lora_and_adalora_live_in_one_model_in_different_modules(tmp_path):
    ours = ours_alone(target_modules=["q_proj", "v_proj"])
    randomise(ours, seed=1)
    alone = result(ours, batch())
    before = snapshot(ours)
    for targets in (["q_proj", "up_proj"], "all-linear"):
        with pytest.raises(
            fastpeft.TargetError, match="q_proj already carries an adapter of another method .AdaLoraLi"
        ):
            ours.add_adapter("lora", lora_config(target_modules=targets))
    assert differences(before, snapshot(ours)) == []
    ours.add_adapter("lora", lora_config(target_modules=["up_proj", "o_proj"]))
    assert torch.equal(result(ours, batch()), alone)
    ours.set_adapter(["default", "lora"])
    randomise(ours, seed=2)
    train(ours, adam(ours), range(1, 3))
    both = result(ours, batch())
    for name in ("default", "lora"):
        fastpeft.save_adapter(ours, tmp_path, adapter_name=name)
    loaded = fastpeft.load_adapter(tiny(), tmp_path / "lora", adapter_name="lora")
    with pytest.raises(fastpeft.TargetError, match="up_proj already carries an adapter of another method .LoraLinear"):
        loaded.add_adapter("rank", fastpeft.AdaLoraConfig(target_modules=["up_proj"], **SCHEDULE))
    fastpeft.load_adapter(loaded, tmp_path)
    loaded.set_adapter(["default", "lora"])
    close(result(loaded, batch()), both, 1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["linear", "conv1d-of-gpt2"])
def test_the_kernels_serve_it(kind):
    """The same on both backends, with a rank that is no power of two."""
    found = []
    for backend in ("torch", "triton"):
        config = fastpeft.AdaLoraConfig(target_modules=["0"], **SCHEDULE)
        ours = fastpeft.patch(module_of(kind), config, backend=backend)
        randomise(ours)
        x = inputs_of(kind).requires_grad_()
        output = ours(x)
        output.square().sum().backward()
        found.append([output, x.grad, *(p.grad for p in ours.parameters() if p.requires_grad)])
    for mine, expected in zip(*reversed(found), strict=True):
        close(mine, expected, 1e-4)
    assert "AdaLora" in str(fastpeft.report(ours)) and "on triton" in str(fastpeft.report(ours))


def test_an_offloaded_adapter_says_what_to_do_with_labels():
    from accelerate import cpu_offload

    ours = ours_alone(**TARGETS).eval()
    randomise(ours)
    inputs = unlabelled(batch())
    expected = result(ours, inputs)
    cpu_offload(ours, torch.device("cpu"))
    close(result(ours, inputs), expected, 1e-6)
    with pytest.raises(
        fastpeft.PatchError, match="its adapter is offloaded by accelerate, and the loss has a term of it"
    ):
        ours(**batch())
    model = tiny()
    cpu_offload(model, torch.device("cpu"))
    torch.manual_seed(11)
    patched = fastpeft.patch(model, fastpeft.AdaLoraConfig(task_type="CAUSAL_LM", **SCHEDULE, **TARGETS))
    close(patched(**batch()).loss, ours_alone(**TARGETS)(**batch()).loss, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        ours = ours_alone(**TARGETS).train()
        randomise(ours)
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ours(**batch()).loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_a_compiled_layer_is_one_graph():
    ours = fastpeft.patch(module_of("linear"), fastpeft.AdaLoraConfig(target_modules=["0"], **SCHEDULE))
    randomise(ours)
    x = inputs_of("linear")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    close(compiled(x), ours(x), 1e-6)


def test_copies_and_pickles_are_whole():
    ours = ours_alone(**TARGETS)
    train(ours, adam(ours), range(1, 9))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(result(other, batch()), result(ours, batch()))
        optimizers = adam(ours), adam(other)
        torch.manual_seed(0)
        assert train(other, optimizers[1], [9]) == train(copy.deepcopy(ours), adam(copy.deepcopy(ours)), [9])


def test_a_report_says_what_serves_it():
    text = str(fastpeft.report(ours_alone(**TARGETS)))
    assert "6 x AdaLoraLinear: lora_linear on torch" in text


def test_a_decoder_generates_with_it():
    ours = ours_alone(**TARGETS)
    randomise(ours)
    inputs = unlabelled(batch())
    generated = ours.generate(**inputs, max_new_tokens=3, do_sample=False)
    first = result(ours, inputs)[0, -1].argmax()  # its row has no padding
    assert generated[0, inputs["input_ids"].shape[1]] == first
