"""From a checkpoint to a trained adapter: `prepare_model_for_kbit_training` beside peft's, and QLoRA end to end."""

import copy
import math

import pytest
import torch

import fastpeft
from fastpeft import ConfigError, LoraConfig, PatchError, prepare_model_for_kbit_training
from tests.models import batch
from tests.peft_pair import close, quietly, randomise
from tests.quantised import checkpoint, load

TARGETS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def plain(dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return quietly(AutoModelForCausalLM.from_pretrained, checkpoint(), dtype=dtype)


def effects(model) -> dict:
    """What preparing may change: each parameter, its class, dtype and flag; checkpointing; the embeddings' hooks."""
    layers = [module for module in model.modules() if "gradient_checkpointing" in vars(module)]
    return {
        "parameters": {
            name: (type(each), each.dtype, each.requires_grad, str(each)) for name, each in model.named_parameters()
        },
        "checkpointing": [(type(each), each.gradient_checkpointing) for each in layers],
        "how": [vars(each)["_gradient_checkpointing_func"].keywords for each in layers if each.gradient_checkpointing],
        "hooks": len(model.get_input_embeddings()._forward_hooks),
    }


PREPARED = [
    ("nf4", torch.bfloat16, {}),
    ("int8", torch.float16, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ("nf4-double", torch.float16, {"use_gradient_checkpointing": False}),
    ("ao-int8", torch.bfloat16, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    (None, torch.bfloat16, {"auto_clear_cache": False}),
]


@pytest.mark.parametrize(("kind", "dtype", "options"), PREPARED, ids=["nf4", "int8", "double", "torchao", "plain"])
def test_preparing_has_peft_s_effects(kind, dtype, options):
    import peft

    found = []
    for function in (peft.prepare_model_for_kbit_training, prepare_model_for_kbit_training):
        model = plain(dtype) if kind is None else load(kind, dtype)
        before = effects(model)
        prepared = quietly(function, model, **copy.deepcopy(options))
        assert prepared is model
        found.append(effects(model))
        assert found[-1] != before
    assert found[0] == found[1]
    halves = {value[1] for value in found[1]["parameters"].values()} & {torch.float16, torch.bfloat16}
    assert bool(halves) == (kind == "ao-int8")  # whose half precision is what its weights stand for


def test_a_model_by_its_method_alone_is_told():
    """GPTQ, AQLM, EETQ and HQQ, by what transformers notes of a model it has loaded."""
    import peft

    for method in ("gptq", "aqlm", "eetq", "hqq", "awq"):
        found = []
        for function in (peft.prepare_model_for_kbit_training, prepare_model_for_kbit_training):
            model = plain(torch.float16)
            model.quantization_method = method
            found.append(effects(quietly(function, model)))
        assert found[0] == found[1]
        checkpoints = any(enabled for _, enabled in found[1]["checkpointing"])
        assert (
            checkpoints
            == (method != "awq")
            == any(value[1] == torch.float16 for value in found[1]["parameters"].values())
        )


def test_preparing_comes_before_patching():
    model = load("nf4")
    fastpeft.patch(model, LoraConfig(**TARGETS))
    with pytest.raises(PatchError, match="the model has adapters, which this would freeze; call it before patch"):
        prepare_model_for_kbit_training(model)
    with pytest.raises(PatchError, match="model is a str; a torch.nn.Module is needed"):
        prepare_model_for_kbit_training("model")
    fresh = load("nf4")
    with pytest.raises(ConfigError, match="gradient_checkpointing_kwargs is True; give a dict or None"):
        prepare_model_for_kbit_training(fresh, True, True)
    with pytest.raises(PatchError, match="use_gradient_checkpointing='no' must be True or False"):
        prepare_model_for_kbit_training(fresh, "no")
    bare = torch.nn.Linear(2, 2)
    bare.is_loaded_in_4bit = True
    with pytest.raises(PatchError, match="this Linear has no activation_checkpointing_enable; set use_gradient"):
        prepare_model_for_kbit_training(bare)
    assert bare.weight.requires_grad
    assert all(parameter.requires_grad == load("nf4").get_parameter(name).requires_grad
               for name, parameter in fresh.named_parameters())  # fmt: skip


def test_models_of_older_transformers_are_asked_in_their_words():
    class Older(torch.nn.Linear):
        is_loaded_in_4bit = True

        def get_input_embeddings(self):
            return self

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            self.asked = gradient_checkpointing_kwargs

    model = prepare_model_for_kbit_training(Older(2, 2), gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.asked == {"use_reentrant": True} and not model.weight.requires_grad
    assert model(torch.ones(1, 2)).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4-double", "int8", "ao-int8"])
def test_qlora_from_checkpoint_to_adapter_is_as_in_peft(kind, reentrant, tmp_path):
    """In bf16 with checkpointing: losses, and each library with the other's adapter."""
    import peft

    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    models, losses = [], []
    for library, wrap in ((peft, peft.get_peft_model), (fastpeft, fastpeft.patch)):
        base = quietly(library.prepare_model_for_kbit_training, load(kind, torch.bfloat16), **options)
        torch.manual_seed(4)
        models.append(wrap(base, library.LoraConfig(**TARGETS)).train())
    randomise(*models)
    inputs = batch()
    for model in models:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == 28 and {parameter.dtype for parameter in trained} == {torch.float32}
        optimizer, curve = torch.optim.AdamW(trained, 2e-3), []
        for _ in range(4):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss))
        losses.append(curve)
    assert all(map(math.isfinite, losses[1])) and losses[1][-1] < losses[1][0]
    close(torch.tensor(losses[1]), torch.tensor(losses[0]), 2e-2)
    models[1].save_pretrained(tmp_path / "ours")
    models[0].save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        theirs = quietly(peft.PeftModel.from_pretrained, load(kind, torch.bfloat16), tmp_path / "ours")
        mine = quietly(fastpeft.load_adapter, load(kind, torch.bfloat16), tmp_path / "hf")
        results = [model.train()(**inputs).logits for model in (theirs, mine)]
    assert all(torch.isfinite(each).all() for each in results)
    close(*results, 5e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_evaluations_between_steps_change_no_step(kind):
    """Training that is interrupted by evaluations, as a Trainer's is, goes as far as training without."""
    curves = []
    for evaluates in (False, True):
        torch.manual_seed(4)
        model = fastpeft.patch(quietly(prepare_model_for_kbit_training, load(kind)), LoraConfig(**TARGETS)).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, curve = torch.optim.AdamW(trained, 1e-2), []
        for _ in range(4):
            if evaluates:
                with torch.no_grad():
                    model.eval()(**batch())
            loss = model.train()(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss))
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.8 * curves[0][0]
    close(curves[1], curves[0], 2e-2)
