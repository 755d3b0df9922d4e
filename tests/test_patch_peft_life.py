"""The life of a patched PeftModel: peft's documented behaviours, step by step beside a PeftModel that is not patched.

Each scenario is a generator that acts on a model and yields what can be compared; it runs on both models.
"""

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.reporting import LEFT
from tests.models import batch, tiny

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")


def lora(**settings):
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    return peft.LoraConfig(**given)


def made(config=None, *, base=None, seed=11, **options):
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny() if base is None else base, config or lora(), **options)
    stir(model)
    return model


@torch.no_grad()
def stir(model, part="lora_", seed=5):
    """Random values in adapters' parameters, so that none is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if part in name and "magnitude" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model, **more):
    with torch.no_grad():
        return model(**{**batch(), **more}).logits


def gradients(model):
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adds_another():
    model = yield
    model.add_adapter("b", lora(r=2, target_modules=["k_proj", "down_proj", "v_proj"]))
    stir(model)
    yield logits(model)
    model.set_adapter("b")
    yield logits(model)
    yield gradients(model)
    model.base_model.set_adapter(["default", "b"])
    yield logits(model)
    yield gradients(model)


def disables():
    model = yield
    with model.disable_adapter():
        yield logits(model)
        with model.disable_adapter():
            yield logits(model)
    yield logits(model)
    yield [name for name, p in model.named_parameters() if p.requires_grad]


def deletes():
    model = yield
    model.add_adapter("b", lora(r=2))
    stir(model)
    model.delete_adapter("default")
    yield model.active_adapters
    yield logits(model)
    yield sorted(model.peft_config)


def merges():
    model = yield
    model.merge_adapter()
    yield logits(model)
    yield {name: p.clone() for name, p in model.named_parameters()}
    model.unmerge_adapter()
    yield logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    yield logits(merged)
    yield [type(module).__name__ for module in merged.modules()]


def unloads():
    model = yield
    plain = model.unload()
    yield logits(plain)
    yield sorted(plain.state_dict())


def scales():
    model = yield
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.25)
    yield logits(model)
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        yield logits(model)
    yield logits(model)


def weighs():
    model = yield
    model.add_adapter("b", lora(r=4))
    stir(model)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "c", combination_type="cat")
    model.set_adapter("c")
    yield logits(model)
    yield gradients(model)


def mixes():
    model = yield
    model.eval()
    model.add_adapter("b", lora(r=2))
    stir(model)
    yield logits(model, adapter_names=["default", "b"])
    yield logits(model, adapter_names=["__base__", "b"])
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    yield model.generate(input_ids=ids, adapter_names=["b", "default"], **options)
    yield model.generate(input_ids=ids, **options)


def trains_modules():
    model = yield
    model.add_adapter("b", lora(modules_to_save=["lm_head"]))
    stir(model)
    model.set_adapter("b")
    yield logits(model)
    yield gradients(model)
    with model.disable_adapter():
        yield logits(model)


def freezes():
    model = yield
    model.set_adapter("default", inference_mode=True)
    yield [name for name, p in model.named_parameters() if p.requires_grad]
    yield model.get_nb_trainable_parameters()
    yield [str(each) for each in model.get_layer_status()]
    yield str(model.get_model_status())


SCENARIOS = (*(adds_another, disables, deletes, merges, unloads, scales, weighs, mixes, trains_modules, freezes),)


def run(scenario, model):
    """The scenario's results, one by one."""
    acting = scenario()
    next(acting)
    yield acting.send(model)
    yield from acting


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys() and expected
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=3e-5, atol=3e-6, msg=name)
    else:
        assert found == expected


CONFIGS = {
    "plain": lora(),
    "rslora": lora(use_rslora=True, target_modules=["gate_proj"]),
    "lora-bias": lora(lora_bias=True),
    "dora": lora(use_dora=True),
    "all-linear": lora(target_modules="all-linear", bias="lora_only"),
}


# What peft refuses: rows of different adapters and weighted ones with DoRA, a merged bias where there is none, two
# adapters that train biases.
REFUSED = {("dora", mixes), ("dora", weighs), ("lora-bias", merges), ("all-linear", weighs)}
LIVES = [pair for pair in itertools.product(CONFIGS, SCENARIOS) if pair not in REFUSED]


@pytest.mark.parametrize(("which", "scenario"), LIVES, ids=[f"{which}-{each.__name__}" for which, each in LIVES])
def test_a_life_beside_peft_s(which, scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (made(copy.deepcopy(CONFIGS[which])) for _ in range(2))
        fastpeft.patch(ours)
        count = 0
        for found, expected in itertools.zip_longest(run(scenario, ours), run(scenario, theirs)):
            assert_equal(found, expected)
            count += 1
    assert count >= 2


@pytest.mark.parametrize("which", CONFIGS)
def test_files_are_the_same_bytes(which, tmp_path):
    theirs, ours = (made(copy.deepcopy(CONFIGS[which])) for _ in range(2))
    fastpeft.patch(ours)
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "theirs").iterdir()
    )
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[0] == weights[1]
    loaded = fastpeft.patch(peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours"))
    assert_equal(logits(loaded), logits(theirs.eval()))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_what_is_loaded_later_is_fast_too(tmp_path):
    made(lora(target_modules=["o_proj"])).save_pretrained(tmp_path)
    model = fastpeft.patch(made())
    model.load_adapter(tmp_path, "more")
    served = {row.path.rpartition(".")[2] for row in fastpeft.report(model).layers if row.op == "lora_linear"}
    assert served == {"q_proj", "v_proj", "o_proj"}


def trained(model, patch_at=None):
    """What four steps make of the trained parameters, with the patch before one of them; one optimizer for all."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        if step == patch_at:
            fastpeft.patch(model)
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_an_optimizer_that_was_there_goes_on():
    assert_equal(trained(made(), patch_at=2), trained(made()))


def test_dropout_is_drawn_and_drawn_again_in_backward():
    model = fastpeft.patch(made(lora(lora_dropout=0.5))).train()
    torch.manual_seed(3)
    first, again = logits(model), logits(model)
    assert not torch.equal(first, again)
    torch.manual_seed(3)
    assert torch.equal(logits(model), first)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    assert_equal(logits(model), logits(made(lora(lora_dropout=0.5)).eval()))


def test_copies_and_pickles_are_patched_and_apart():
    model = fastpeft.patch(made())
    expected = logits(model)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for each in (other, torch.load(buffer, weights_only=False)):
        assert isinstance(each, peft.PeftModel) and torch.equal(logits(each), expected)
        assert fastpeft.report(each).layers == fastpeft.report(model).layers
        fastpeft.unpatch(each)
        with pytest.raises(fastpeft.PatchError, match="not patched"):
            fastpeft.report(each)
    assert len(fastpeft.report(model).layers) == 4


def test_transformers_own_adapters():
    theirs, ours = (tiny() for _ in range(2))
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter(lora(), "one")
        stir(model)
    fastpeft.patch(ours)
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter(lora(target_modules=["up_proj"]), "two")
        stir(model)
    assert_equal(logits(ours), logits(theirs))
    ours.set_adapter("one")
    theirs.set_adapter("one")
    assert_equal(logits(ours), logits(theirs))
    ours.disable_adapters()
    assert_equal(logits(ours), logits(tiny()))
    ours.enable_adapters()
    assert {row.path.rpartition(".")[2] for row in fastpeft.report(ours).layers} == {"q_proj", "v_proj", "up_proj"}
    fastpeft.unpatch(ours)
    assert not any(type(each).__module__.startswith("fastpeft") for each in ours.modules())
    assert type(ours) is type(tiny())


def test_what_is_left_to_peft_is_named_with_the_reason():
    config = lora(target_modules=["q_proj", "embed_tokens"])
    theirs, ours = made(copy.deepcopy(config)), fastpeft.patch(made(config))
    assert_equal(logits(ours), logits(theirs))
    rows = {row.path.rpartition(".")[2]: row for row in fastpeft.report(ours).layers}
    assert rows["embed_tokens"].op == LEFT and "no kernel" in rows["embed_tokens"].reason
    assert rows["q_proj"].op == "lora_linear"
    assert "2 layers patched" in str(fastpeft.report(ours))


def test_hooks_on_an_adapter_s_modules_run():
    theirs, ours = made(), fastpeft.patch(made())
    for model in (theirs, ours):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)
        layer.base_layer.register_forward_hook(lambda module, args, out: out + 1)
    assert_equal(logits(ours), logits(theirs))
    (row,) = [row for row in fastpeft.report(ours).layers if row.op == LEFT]
    assert "layers.0.self_attn.q_proj" in row.path and "hooks" in row.reason


def test_a_forward_that_somebody_put_on_a_layer_stays():
    model = made()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x, *args, **kwargs: layer.base_layer(x) + 1
    before = logits(model)
    fastpeft.patch(model)
    assert_equal(logits(model), before)
    (row,) = [row for row in fastpeft.report(model).layers if row.op == LEFT]
    assert "replaced" in row.reason


@pytest.mark.parametrize("first", [True, False], ids=["dispatched first", "patched first"])
def test_accelerate_s_hooks(first):
    accelerate = pytest.importorskip("accelerate", reason="a test requirement")
    expected, model = logits(made()), made()
    if first:
        accelerate.cpu_offload(model)
        fastpeft.patch(model)
    else:
        fastpeft.patch(model)
        accelerate.cpu_offload(model)
    assert_equal(logits(model), expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_equal(logits(model), expected)
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)


def test_several_methods_in_one_peft_mixed_model():
    theirs, ours = (peft.get_peft_model(tiny(), lora(task_type=None), mixed=True) for _ in range(2))
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.add_adapter("hada", peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]))
        model.set_adapter(["default", "hada"])
        stir(model)
        stir(model, "hada_")
    fastpeft.patch(ours)
    assert_equal(logits(ours), logits(theirs))


def test_adalora_goes_on_with_peft_s_schedule():
    results = []
    for patched in (False, True):
        config = peft.AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=6, task_type="CAUSAL_LM", lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
        )  # fmt: skip
        model = made(config)
        if patched:
            fastpeft.patch(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for number in range(1, 7):
            model(**batch()).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
        results.append((model.peft_config["default"].rank_pattern, logits(model)))
    assert results[0][0] == results[1][0] and any(not all(each) for each in results[0][0].values())
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-5)


def test_bad_calls_are_refused_and_change_nothing():
    model = made()
    kinds = [type(each) for each in model.modules()]
    calls = {
        "add_adapter": lambda: fastpeft.patch(model, fastpeft.LoraConfig()),
        "adapter_name": lambda: fastpeft.patch(model, adapter_name="x"),
        "hf_quirks": lambda: fastpeft.patch(model, hf_quirks=True),
        "unknown backend": lambda: fastpeft.patch(model, backend="cuda"),
        "patch the model inside it": lambda: fastpeft.patch(nn.DataParallel(model)),
        "peft's own as it is": lambda: fastpeft.unpatch(model),
        "is not patched": lambda: fastpeft.report(model),
    }
    for words, call in calls.items():
        with pytest.raises(fastpeft.FastpeftError, match=words):
            call()
        assert [type(each) for each in model.modules()] == kinds
    fastpeft.patch(model)
    with pytest.raises(fastpeft.PatchError, match="patched already"):
        fastpeft.patch(model)


@pytest.mark.interpreter
def test_the_kernels_serve_it_where_triton_is_demanded():
    model = made(lora(target_modules=["q_proj"]))
    expected = gradients(model)
    fastpeft.patch(model, backend="triton")
    assert {row.backend for row in fastpeft.report(model).layers} == {"triton"}
    assert_equal(gradients(model), expected)


def test_functions_of_others_that_pass_an_adapter_by_are_refused():
    from tests.test_neighbours import of, with_liger

    model = made()
    mlp = model.base_model.model.model.layers[1].mlp
    mlp.forward = of("unsloth").__get__(mlp)
    with pytest.raises(fastpeft.PatchError, match="layers.1.mlp.forward is unsloth's"):
        fastpeft.patch(model)
    head = {"target_modules": ["q_proj", "lm_head"]}
    model = made(lora(**head))
    with_liger(model.base_model.model)
    with pytest.raises(fastpeft.PatchError, match="the adapter changes the model's head, and Liger"):
        fastpeft.patch(model)
    model = fastpeft.patch(made(lora(**head)))
    with_liger(model.base_model.model)
    with pytest.raises(fastpeft.PatchError, match="the adapter changes the model's head, and Liger"):
        model(**batch())
