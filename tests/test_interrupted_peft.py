"""What is interrupted while it works on models of peft's, or on the way to them: `patch`, `unpatch` and
`get_peft_model` of each method, peft's verbs on a patched model, and the making of TRL's trainers."""

import functools
from collections.abc import Callable

import datasets
import peft
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import fastpeft
from fastpeft.integrations import trainer as ours
from fastpeft.integrations.peft.model import is_swapped
from fastpeft.patching import layers
from tests.counting import count, how_many
from tests.interrupted import interrupted, left_behind, lines_of, portrait, spread, telling, unlike
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import quietly, randomise, result

LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, **LORA),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, init_lora_weights="pissa", modules_to_save=["lm_head"], **LORA),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **LORA),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "llama-adapter": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
}
# Of AdaLoRA a PeftModel trains one, and PiSSA changes the base with each.
WITH_OTHERS = [kind for kind in CONFIGS if kind not in ("adalora", "dora")]


def wrapped(kind: str, base: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(3)
    model = quietly(peft.get_peft_model, tiny() if base is None else base, CONFIGS[kind]())
    randomise(model)
    return model.eval()


def patched(kind: str) -> nn.Module:
    return quietly(fastpeft.patch, wrapped(kind))


def places_of(make: Callable[[], nn.Module], act: Callable, quick: int = 4, full: int = 60) -> tuple[list[int], dict]:
    """Where to interrupt `act(make())`, and the portrait of the model after it has been let through."""
    models = make(), make()
    for model in models:  # the first time some things are found that are kept for the second
        places = lines_of(lambda model=model: quietly(act, model))
    return spread(telling(places), how_many(quick, full)), portrait(models[1])


def unpatched(model: nn.Module) -> None:
    if is_swapped(model):
        fastpeft.unpatch(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_patching_a_peft_model_is_done_or_is_not(kind):
    places, after = places_of(lambda: wrapped(kind), fastpeft.patch, quick=6)
    for at in places:
        model = wrapped(kind)
        before = snapshot(model)
        assert interrupted(lambda model=model: quietly(fastpeft.patch, model), at), at
        found = portrait(model) if is_swapped(model) else differences(before, snapshot(model))
        assert found in (after, []), at
        quietly(unpatched, model)
        assert differences(before, snapshot(model)) == [], at
        quietly(fastpeft.patch, model)
        assert unlike(portrait(model), after) == [] and left_behind() == [], at
        count("interruptions survived")


@pytest.mark.parametrize("kind", CONFIGS)
def test_unpatching_a_peft_model_is_done_once_more(kind):
    places, _ = places_of(lambda: patched(kind), unpatched)
    for at in places:
        model = wrapped(kind)
        before = snapshot(model)
        quietly(fastpeft.patch, model)
        assert interrupted(lambda model=model: quietly(unpatched, model), at), at
        quietly(unpatched, model)
        assert differences(before, snapshot(model)) == [] and left_behind() == [], at
        count("interruptions survived")


@pytest.mark.parametrize("kind", CONFIGS)
def test_get_peft_model_leaves_the_base_as_it_was(kind):
    def act(model: nn.Module) -> None:
        torch.manual_seed(4)
        made.append(fastpeft.get_peft_model(model, CONFIGS[kind]()))

    made: list[nn.Module] = []
    places, _ = places_of(tiny, act)
    after = portrait(made[-1])
    for at in places:
        base = tiny()
        before = snapshot(base)
        assert interrupted(lambda base=base: quietly(act, base), at), at
        assert differences(before, snapshot(base)) == [], at
        quietly(act, base)
        assert unlike(portrait(made[-1]), after) == [] and left_behind() == [], at
        count("interruptions survived")


@pytest.mark.parametrize("kind", ["dora", "prefix"])
def test_get_peft_model_that_is_refused_leaves_the_base_as_it_was(kind, monkeypatch):
    monkeypatch.setattr("fastpeft.dispatch.triton_unavailable", lambda: "there is none")
    base = tiny()
    before = snapshot(base)
    with pytest.raises(fastpeft.BackendError, match="there is none"):
        quietly(fastpeft.get_peft_model, base, CONFIGS[kind](), backend="triton")
    assert differences(before, snapshot(base)) == []


def test_get_peft_model_copies_no_values_that_are_not_there():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="orthogonal")
    model = quietly(fastpeft.get_peft_model, base, config, low_cpu_mem_usage=True)
    assert is_swapped(model) and all(each.is_meta for each in model.parameters())


def added(model: nn.Module, kind: str) -> None:
    if "b" in model.peft_config:
        model.delete_adapter("b")
    torch.manual_seed(5)
    model.add_adapter("b", CONFIGS[kind]())


def with_two(kind: str) -> nn.Module:
    model = patched(kind)
    quietly(added, model, kind)
    return model


def deleted(model: nn.Module) -> None:
    if "b" in model.peft_config:
        model.delete_adapter("b")


VERBS = {
    **{f"add-{kind}": (functools.partial(patched, kind), functools.partial(added, kind=kind)) for kind in WITH_OTHERS},
    **{f"delete-{kind}": (functools.partial(with_two, kind), deleted) for kind in ("prefix", "prompt")},
    "set-llama-adapter": (lambda: with_two("llama-adapter"), lambda model: model.set_adapter("default")),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_of_peft_s_is_done_once_more(name):
    make, act = VERBS[name]
    places, after = places_of(make, act)
    assert places
    for at in places:
        model = make()
        assert interrupted(lambda model=model: quietly(act, model), at), at
        quietly(act, model)
        assert unlike(portrait(model), after) == [] and left_behind() == [], at
        count("interruptions survived")


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p-tuning"])
def test_an_adapter_of_virtual_tokens_is_added_or_is_not(kind):
    places, _ = places_of(lambda: patched(kind), functools.partial(added, kind=kind))
    model = patched(kind)
    expected = result(model, batch())
    for at in places:
        assert interrupted(lambda: quietly(added, model, kind), at), at
        assert torch.equal(result(model, batch()), expected), at
        assert list(model.peft_config) in (["default"], ["default", "b"]), at
        if "b" in model.peft_config:
            assert "b" in model.extension.hooked.configs, at
            quietly(model.delete_adapter, "b")
        count("interruptions survived")


@pytest.fixture
def _no_state_of_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(90)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2")


TEXTS = {"sft": {"text": ["w5 w7 w9", "w8 w6"]}, "dpo": {"prompt": ["w5"], "chosen": [" w7 w8"], "rejected": [" w9"]}}


def trainer_of(kind: str, model: nn.Module, directory, config=None, **more):
    library, settings = (ours.SFTTrainer, trl.SFTConfig) if kind == "sft" else (ours.DPOTrainer, trl.DPOConfig)
    arguments = settings(str(directory), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **more)
    rows = datasets.Dataset.from_dict(TEXTS[kind])
    return library(model, args=arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=config)


def with_dropout() -> nn.Module:
    torch.manual_seed(6)
    return quietly(fastpeft.patch, tiny(), fastpeft.LoraConfig(r=2, lora_dropout=0.5, **LORA))


TRAINERS = {  # kind, the model that is given, the configuration beside it
    "sft-new": ("sft", tiny, lambda: fastpeft.LoraConfig(r=2, **LORA)),
    "sft-prefix": ("sft", tiny, lambda: fastpeft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "dpo-new": ("dpo", tiny, lambda: fastpeft.LoraConfig(r=2, **LORA)),
    "dpo-patched": ("dpo", with_dropout, lambda: None),
}


@pytest.mark.usefixtures("_no_state_of_accelerate")
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_trl_s_is_made_or_the_model_is_as_it_was(name, tmp_path):
    kind, make, config = TRAINERS[name]

    def act(model: nn.Module) -> None:
        trainer_of(kind, model, tmp_path, config())

    places, after = places_of(make, act, quick=4, full=40)
    for at in places:
        model = make()
        before, state = snapshot(model), told(model)
        assert interrupted(lambda model=model: quietly(act, model), at), at
        assert differences(before, snapshot(model)) == [] and told(model) == state, at
        quietly(act, model)
        assert unlike(portrait(model), after) == [] and left_behind() == [], at
        count("interruptions survived")


def told(model: nn.Module) -> tuple | None:
    """What a patched model says of its adapters, and of what stood on it."""
    state = model.__dict__.get("_fastpeft")
    if state is None:
        return None
    settings = [dict(layer._fastpeft.adapters) for _, layer in layers(model)]
    return dict(state.configs), state.active, dict(state.parts), state.original_forward, settings


@pytest.mark.usefixtures("_no_state_of_accelerate")
def test_a_trainer_that_trl_refuses_leaves_the_model_as_it_was(tmp_path):
    for make, config in ((tiny, fastpeft.LoraConfig(r=2, **LORA)), (with_dropout, None)):
        model = make()
        before, state = snapshot(model), told(model)
        with pytest.raises(ValueError, match="w99"):
            quietly(trainer_of, "dpo", model, tmp_path, config, pad_token="w99")
        assert differences(before, snapshot(model)) == [] and told(model) == state
