"""Another adapter in the place of one: the outputs of a fresh load, no compilation, and a model that stays as it was
where that cannot be."""

import json

import peft
import pytest
import torch
import torch._dynamo.testing
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, quietly, randomise, result

TARGETS = ["q_proj", "down_proj"]
KINDS = {  # what the adapters that come have of their own; the first has r=4, lora_alpha=8
    "same": {},
    "smaller": {"r": 2, "lora_alpha": 4},
    "scaled": {"lora_alpha": 5},
    "smaller-scaled": {"r": 3, "lora_alpha": 7, "use_rslora": True},
}


def config(**settings) -> fastpeft.LoraConfig:
    common = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return fastpeft.LoraConfig(**{**common, **settings})


def adapted(seed: int = 0, base=None, **settings):
    torch.manual_seed(seed)
    model = fastpeft.patch(tiny() if base is None else base, config(**settings))
    randomise(model, seed=seed)
    return model.eval()


def saved(directory, seed: int = 1, **settings):
    """(the directory, the logits) of an adapter."""
    model = adapted(seed, **settings)
    fastpeft.save_adapter(model, directory)
    return directory, result(model, batch()).detach()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("ready", [False, True], ids=["plain", "ready"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_fresh_load_and_what_peft_does(kind, ready, tmp_path):
    first, _ = saved(tmp_path / "first", seed=0)
    second, expected = saved(tmp_path / "second", **KINDS[kind])
    model, hf = adapted(), quietly(peft.PeftModel.from_pretrained, tiny(), first)
    before = result(model, batch())
    if ready:
        fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=6)
        prepare_model_for_compiled_hotswap(hf, target_rank=6, config=hf.peft_config)
        close(result(model, batch()), before, 1e-6)
    held = {name: id(parameter) for name, parameter in model.named_parameters()}
    fastpeft.hotswap_adapter(model, second)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == held
    close(result(model, batch()), expected, 1e-6)
    if "use_rslora" not in KINDS[kind]:  # of which peft wants that both have it
        quietly(hotswap_adapter, hf, str(second), adapter_name="default", torch_device="cpu")
        close(result(model, batch()), result(hf, batch()), 1e-6)
    fastpeft.hotswap_adapter(model, first)
    close(result(model, batch()), before, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_new_adapter(kind, tmp_path):
    second, expected = saved(tmp_path / "second", **KINDS[kind])
    model = adapted()
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=6)
    fastpeft.save_adapter(model, tmp_path / "first")
    assert load_file(tmp_path / "first" / WEIGHTS)[
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    ].shape == (4, 48)
    fastpeft.hotswap_adapter(model, second)
    fastpeft.save_adapter(model, tmp_path / "again")
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("again", "second"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == json.loads(
        (second / "adapter_config.json").read_text()
    )
    close(result(fastpeft.load_adapter(tiny(), tmp_path / "again"), batch()), expected, 1e-6)


@torch.no_grad()
def test_nothing_is_compiled_again(tmp_path):
    others = [saved(tmp_path / kind, base=tiny(layers=1), **settings) for kind, settings in KINDS.items()]
    counter = torch._dynamo.testing.CompileCounter()
    model = adapted(base=tiny(layers=1))
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    result(compiled, batch())
    for directory, expected in others:
        fastpeft.hotswap_adapter(compiled, directory)
        close(result(compiled, batch()), expected, 1e-6)
    assert counter.frame_count == 1


@torch.no_grad()
def test_without_being_made_ready_equal_scalings_are_enough(tmp_path):
    kinds = ("same", "smaller", "scaled")
    others = [saved(tmp_path / kind, base=tiny(layers=1), **KINDS[kind]) for kind in kinds]
    counter = torch._dynamo.testing.CompileCounter()
    model = adapted(base=tiny(layers=1))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    result(compiled, batch())
    for (directory, expected), frames in zip(others, (1, 1, 2), strict=True):
        fastpeft.hotswap_adapter(model, directory)
        close(result(compiled, batch()), expected, 1e-6)
        assert counter.frame_count == frames


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_variants(settings, tmp_path):
    second, expected = saved(tmp_path / "second", r=3, **settings)
    model = adapted(**settings)
    before = result(model, batch())
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=5)
    close(result(model, batch()), before, 1e-6)
    fastpeft.hotswap_adapter(model, second)
    close(result(model, batch()), expected, 1e-6)
    if "lora_bias" not in settings:  # for which there is no bias here to merge it into
        model.merge_adapter()
        close(result(model, batch()), expected, 1e-5)


@torch.no_grad()
def test_convolutions(tmp_path):
    def network(r, alpha, seed):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        model = fastpeft.patch(base, fastpeft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0", "1"]))
        randomise(model, seed=seed)
        return model.eval()

    x = torch.randn(2, 3, 6, 6)
    other = network(2, 6, 1)
    fastpeft.save_adapter(other, tmp_path)
    model = network(4, 4, 0)
    before = model(x)
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=5)
    close(model(x), before, 1e-6)
    fastpeft.hotswap_adapter(model, tmp_path)
    close(model(x), other(x), 1e-6)


def test_zeros_stay_zeros_in_training(tmp_path):
    second, _ = saved(tmp_path / "second", r=2)
    model, alone = adapted(), fastpeft.load_adapter(tiny(), second, trainable=True)
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=6)
    fastpeft.hotswap_adapter(model, second)
    for each in (model.train(), alone.train()):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            each(**batch()).loss.backward()
            optimizer.step()
    found, wanted = fastpeft.adapter_state_dict(model), fastpeft.adapter_state_dict(alone)
    for key, tensor in wanted.items():
        close(found[key], tensor, 1e-5)
    for layer in model.modules():
        if "lora_A" in layer._modules:
            assert not layer.lora_A["default"].weight[2:].any() and not layer.lora_B["default"].weight[:, 2:].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, "rank 8 at .*q_proj.* has room for 4.*target_rank=8"),
        ({"target_modules": ["q_proj"]}, "lacks .*down_proj.*targets of 'default' must be the same"),
        ({"target_modules": [*TARGETS, "k_proj"]}, "has .*k_proj.*targets of 'default' must be the same"),
        ({"use_dora": True}, "use_dora is True, and 'default' has False"),
        ({"lora_dropout": 0.5}, "lora_dropout is 0.5, and 'default' has 0"),
    ],
    ids=["rank", "fewer", "more", "dora", "dropout"],
)
def test_what_cannot_be_swapped_leaves_the_model_as_it_was(settings, words, tmp_path):
    second, _ = saved(tmp_path / "second", **settings)
    model = adapted()
    before = snapshot(model)
    with pytest.raises(fastpeft.FastpeftError, match=words):
        fastpeft.hotswap_adapter(model, second)
    assert differences(before, snapshot(model)) == []


def test_other_methods_names_and_states_are_refused(tmp_path):
    second, _ = saved(tmp_path / "second")
    prefix = fastpeft.patch(tiny(), fastpeft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    fastpeft.save_adapter(prefix, tmp_path / "prefix")
    model = adapted()
    before = snapshot(model)
    for call, words in (
        (lambda: fastpeft.hotswap_adapter(model, tmp_path / "prefix"), "PREFIX_TUNING; only LORA"),
        (lambda: fastpeft.hotswap_adapter(prefix, second), "'default' is PREFIX_TUNING; only LORA"),
        (lambda: fastpeft.prepare_model_for_compiled_hotswap(prefix), "'default' is PREFIX_TUNING; only LORA"),
        (lambda: fastpeft.hotswap_adapter(model, second, "b"), "no adapter 'b'"),
        (lambda: fastpeft.hotswap_adapter(tiny(), second), "not patched"),
        (lambda: fastpeft.hotswap_adapter(model, tmp_path / "nowhere"), "nowhere"),
        (lambda: fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=3), "less than 4, the rank of"),
        (lambda: fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=True), "target_rank is True"),
    ):
        with pytest.raises(fastpeft.FastpeftError, match=words):
            call()
    assert differences(before, snapshot(model)) == []
    model.merge_adapter()
    for call in (
        lambda: fastpeft.hotswap_adapter(model, second),
        lambda: fastpeft.prepare_model_for_compiled_hotswap(model),
    ):
        with pytest.raises(fastpeft.PatchError, match="merged.*unmerge first"):
            call()


def test_unpatching_leaves_nothing_of_it(tmp_path):
    second, _ = saved(tmp_path / "second", r=2)
    base = tiny()
    before = snapshot(base)
    model = adapted(base=base)
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=8)
    fastpeft.hotswap_adapter(model, second)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(base)) == []


@torch.no_grad()
def test_a_scaling_is_not_rounded_with_the_model(tmp_path):
    """A buffer of floats would be: 2.333… is 2.328… in bf16."""
    second, _ = saved(tmp_path / "second", r=3, lora_alpha=7)
    ready, plain = adapted(), adapted()
    fastpeft.prepare_model_for_compiled_hotswap(ready)
    for model in (ready, plain):
        fastpeft.hotswap_adapter(model, second)
    ready, plain = (model.to(torch.bfloat16).float() for model in (ready, plain))
    close(result(ready, batch()), result(plain, batch()), 1e-5)
