"""State that a call, a swap or a checkpoint might pass by in silence: it is honoured, or refused in words."""

import pytest
import torch

import fastpeft
from fastpeft.integrations.peft.adalora_checkpoints import FILE, restore_training, save_training
from tests.models import batch, tiny
from tests.peft_pair import quietly, randomise

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora(**settings):
    return fastpeft.LoraConfig(**{"r": 4, **TARGETS, **settings})


def patched(*configs):
    torch.manual_seed(3)
    model = fastpeft.patch(tiny(), configs[0])
    for number, config in enumerate(configs[1:]):
        model.add_adapter(f"more{number}", config)
    randomise(model)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def test_continuous_batching_knows_no_choice_of_this_thread():
    model = patched(lora(), lora())
    ids = batch()["input_ids"][:, :4].tolist()
    with pytest.raises(fastpeft.PatchError, match="adapter_names: continuous batching packs samples"):
        model.generate_batch(ids, adapter_names=["more0", "more0"])
    with fastpeft.use_adapter(model, "more0"), pytest.raises(fastpeft.PatchError, match="a thread of its own"):
        model.init_continuous_batching()
    with model.disable_adapter(), pytest.raises(fastpeft.PatchError, match="a thread of its own"):
        model.init_continuous_batching()


def test_biases_trained_in_place_are_no_sample_s_own():
    model = fastpeft.patch(tiny("qwen2"), lora(target_modules=["q_proj"], bias="all"))
    model.add_adapter("more0", lora())
    with pytest.raises(fastpeft.PatchError, match="trains biases of the base model in place"):
        model(**batch(), adapter_names=["more0", "__base__"])


@pytest.mark.parametrize("first", [True, False])
def test_no_swap_where_the_base_was_changed_for_an_adapter(first, tmp_path):
    configs = [lora(init_lora_weights="olora"), lora()]
    quietly(patched(configs[not first]).save_pretrained, tmp_path)
    model = patched(configs[first])
    before = logits(model)
    with pytest.raises(fastpeft.ConfigError, match="for which the base weights were changed"):
        fastpeft.hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_no_swap_of_what_is_offloaded(tmp_path):
    from accelerate import cpu_offload

    patched(lora()).save_pretrained(tmp_path)
    model = cpu_offload(patched(lora()), "cpu")
    with pytest.raises(fastpeft.PatchError, match="is offloaded by accelerate"):
        fastpeft.hotswap_adapter(model, tmp_path)
    with pytest.raises(fastpeft.PatchError, match="is offloaded by accelerate"):
        fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_a_swap_to_another_task_is_refused(tmp_path):
    model = fastpeft.patch(
        tiny(), fastpeft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="FEATURE_EXTRACTION")
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(fastpeft.ConfigError, match="task_type is"):
        fastpeft.hotswap_adapter(patched(lora()), tmp_path)


def test_an_optimizer_of_before_a_swap_is_noticed(tmp_path):
    patched(lora(r=2)).save_pretrained(tmp_path)
    model = patched(lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step():
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()

    step()
    fastpeft.hotswap_adapter(model, tmp_path)
    model.save_pretrained(tmp_path / "well")
    step()
    with pytest.raises(fastpeft.PatchError, match="make a new optimizer after hotswap_adapter"):
        model.save_pretrained(tmp_path / "not")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_adapters_of_a_model_that_is_ready_for_swaps(kind):
    models = [patched(lora(), lora()) for _ in range(2)]
    fastpeft.prepare_model_for_compiled_hotswap(models[1], target_rank=8)
    for model in models:
        torch.manual_seed(1)
        model.add_weighted_adapter(["default", "more0"], [0.7, 0.5], "both", combination_type=kind)
        model.set_adapter("both")
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-4, atol=1e-4)


def adalora_model():
    import peft

    torch.manual_seed(3)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=9, **TARGETS)
    model = fastpeft.patch(peft.get_peft_model(tiny(), config))
    model(**batch()).loss.backward()
    model.base_model.update_and_allocate(1)
    return model


def rewritten(path, change):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


DAMAGE = {
    "is nothing of this model's": lambda tensors: tensors.update({"foo": torch.ones(1)}),
    "the table ipt is not of": lambda tensors: tensors.pop(next(key for key in tensors if key.startswith("ipt."))),
    "NaN or infinite": lambda tensors: next(t for k, t in tensors.items() if k.startswith("ipt.")).fill_(torch.nan),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_file_of_adalora_s_training_changes_nothing(words, tmp_path):
    model = adalora_model()
    model.save_pretrained(tmp_path)
    save_training(model, str(tmp_path), True)
    restore_training(model, str(tmp_path / FILE))
    rewritten(tmp_path / FILE, DAMAGE[words])
    other = adalora_model()
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(fastpeft.AdapterFileError, match=words):
        restore_training(other, str(tmp_path / FILE))
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_a_file_of_another_save_is_refused(tmp_path):
    model = adalora_model()
    model.save_pretrained(tmp_path)
    save_training(model, str(tmp_path), True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(fastpeft.AdapterFileError, match="belongs to another save"):
        restore_training(model, str(tmp_path / FILE))
