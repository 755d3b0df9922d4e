"""A patched model under fastpeft's Trainer: what a checkpoint holds, going on from it, and the losses of HF peft's."""

import json
import os
import shutil
import types
import warnings

import peft
import pytest
import torch
import transformers

import fastpeft
from fastpeft.integrations import trainer_checkpoints
from fastpeft.integrations.trainer import AdaLoraCallback, Seq2SeqTrainer, Trainer
from fastpeft.restoring import restore_adapter
from tests.adalora_pair import pattern
from tests.models import batch, tiny

WEIGHTS = "adapter_model.safetensors"
ADAPTER = {WEIGHTS, "adapter_config.json", "fastpeft.json"}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj", "gate_proj"]}
ADALORA = {"init_r": 6, "target_r": 2, "total_step": 4, "tinit": 1, "tfinal": 0, "deltaT": 1, "lora_dropout": 0.2}
LSTM = {"encoder_hidden_size": 8, "encoder_num_layers": 2, "encoder_dropout": 0.2}

# What is trained: the task and, by the adapters' names, configurations.
METHODS = {
    "lora": ("CAUSAL_LM", {"default": ("LoraConfig", LORA)}),
    "dora-biases": ("SEQ_CLS", {"default": ("LoraConfig", {**LORA, "use_dora": True, "bias": "all"})}),
    "pissa": ("CAUSAL_LM", {"default": ("LoraConfig", {**LORA, "init_lora_weights": "pissa"})}),
    "even": ("CAUSAL_LM", {"default": ("LoraConfig", {**LORA, "lora_dropout": 0.0})}),
    "named": ("CAUSAL_LM", {"mine": ("LoraConfig", LORA)}),
    "several": (
        "CAUSAL_LM",
        {"default": ("LoraConfig", LORA), "two": ("PrefixTuningConfig", {"num_virtual_tokens": 3})},
    ),
    "adalora": ("CAUSAL_LM", {"default": ("AdaLoraConfig", {**ADALORA, "target_modules": ["q_proj", "v_proj"]})}),
    "prefix": ("CAUSAL_LM", {"default": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True})}),
    "prompt": ("CAUSAL_LM", {"default": ("PromptTuningConfig", {"num_virtual_tokens": 3})}),
    "p-tuning": (
        "SEQ_CLS",
        {
            "default": (
                "PromptEncoderConfig",
                {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", **LSTM},
            )
        },
    ),
    "llama-adapter": ("CAUSAL_LM", {"default": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2})}),
}


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def rows_of(task: str) -> list[dict]:
    inputs = batch(task, rows=8)
    return [{key: value[row] for key, value in inputs.items()} for row in range(8)]


def arguments(directory, kind=transformers.TrainingArguments, **settings):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "report_to": [], **settings}
    return kind(
        str(directory), per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        logging_steps=1, **settings,
    )  # fmt: skip


def patched(method: str, family: str = "llama"):
    """A new model with the method's adapters, all at work."""
    task, adapters = METHODS[method]
    torch.manual_seed(3)
    model = tiny(family, task)
    for name, (kind, settings) in adapters.items():
        config = getattr(fastpeft, kind)(task_type=task, **settings)
        if "_fastpeft" in model.__dict__:
            model.add_adapter(name, config)
        else:
            fastpeft.patch(model, config, adapter_name=name)
    fastpeft.set_adapter(model, list(adapters))
    return model


def trainer(model, directory, task="CAUSAL_LM", **settings):
    callbacks = [AdaLoraCallback()] if any(hasattr(c, "tinit") for c in model.peft_config.values()) else []
    settings = arguments(directory, **settings)
    return Trainer(model, settings, train_dataset=rows_of(task), eval_dataset=rows_of(task)[:4], callbacks=callbacks)


def contents(checkpoint) -> dict[str, bytes]:
    """The files that say what training has come to, byte by byte, and the losses so far."""
    found = {}
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            if name != "training_args.bin":
                with open(os.path.join(folder, name), "rb") as file:
                    found[os.path.relpath(os.path.join(folder, name), checkpoint)] = file.read()
    state = json.loads(found.pop("trainer_state.json"))
    return {**found, "losses": [entry["loss"] for entry in state["log_history"] if "loss" in entry]}


def assert_goes_on(method: str, directory, **settings) -> None:
    """Four steps at once, and two and two in another model, end in the same files."""
    task = METHODS[method][0]
    whole = trainer(patched(method), directory / "whole", task, **settings)
    quiet(whole.train)
    shutil.copytree(directory / "whole/checkpoint-2", directory / "halves/checkpoint-2")
    second = trainer(patched(method), directory / "halves", task, **settings)
    before = {name: id(parameter) for name, parameter in second.model.named_parameters()}
    quiet(second.train, resume_from_checkpoint=True)
    assert {name: id(parameter) for name, parameter in second.model.named_parameters()} == before
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in second.model.named_parameters())
    assert contents(directory / "halves/checkpoint-4") == contents(directory / "whole/checkpoint-4")
    first, last = (contents(directory / f"whole/checkpoint-{step}") for step in (2, 4))
    assert first["optimizer.pt"] != last["optimizer.pt"] and len(last["losses"]) == 4


@pytest.mark.parametrize("method", [method for method in METHODS if method != "even"])
def test_training_goes_on_bit_for_bit(method, tmp_path):
    assert_goes_on(method, tmp_path)
    names = {name for name in contents(tmp_path / "whole/checkpoint-4") if name != "losses"}
    held = {
        "named": {f"mine/{name}" for name in ADAPTER},
        "several": {*ADAPTER, *(f"two/{name}" for name in ADAPTER)},
    }.get(method, ADAPTER)
    network = {"fastpeft_encoder.safetensors"} if method in ("prefix", "p-tuning", "adalora") else set()
    assert names == {"optimizer.pt", "rng_state.pth", "scheduler.pt"} | held | network
    assert os.path.getsize(tmp_path / "whole/checkpoint-4/trainer_state.json")


MODES = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize(
    ("mode", "method"),
    [("accumulated", "lora"), ("bf16", "lora"), ("checkpointed", "prefix"), ("reentrant", "lora")],
)
def test_training_goes_on_in_every_mode(mode, method, tmp_path):
    assert_goes_on(method, tmp_path, **MODES[mode])


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pair(task: str, settings: dict, family: str = "llama"):
    """(HF peft's model, ours) from one seed, without dropout."""
    models = []
    for library, wrap in ((peft, peft.get_peft_model), (fastpeft, fastpeft.patch)):
        torch.manual_seed(3)
        models.append(quiet(wrap, tiny(family, task), library.LoraConfig(task_type=task, **settings)))
    return models


PARITY = {
    **{mode: MODES[mode] for mode in ("bf16", "checkpointed", "reentrant")},
    "smoothed": {"label_smoothing_factor": 0.2},
    "accumulated-clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("mode", PARITY)
def test_the_losses_are_those_of_peft_under_transformers_trainer(mode, tmp_path):
    found, settings = [], {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "lm_head"]}
    for model, kind in zip(pair("CAUSAL_LM", settings), (transformers.Trainer, Trainer), strict=True):
        chosen = arguments(tmp_path / kind.__module__, eval_strategy="steps", eval_steps=2, **PARITY[mode])
        rows = rows_of("CAUSAL_LM")
        trained = kind(model, chosen, train_dataset=rows, eval_dataset=rows[:3])
        quiet(trained.train)
        predictions = quiet(trained.predict, rows[:3])
        found.append((trained, losses(trained), predictions))
    (hf, expected, hf_predictions), (ours, losses_of_ours, predictions) = found
    bound = 2e-2 if mode == "bf16" else 1e-5
    assert losses_of_ours == pytest.approx(expected, rel=bound) and len(set(expected)) == 4
    assert predictions.metrics["test_loss"] == pytest.approx(hf_predictions.metrics["test_loss"], rel=bound)
    assert abs(predictions.predictions - hf_predictions.predictions).max() < (0.3 if mode == "bf16" else 1e-4)
    assert (predictions.label_ids == hf_predictions.label_ids).all()
    for name in ("label_names", "can_return_loss", "model_accepts_loss_kwargs"):
        assert getattr(ours, name) == getattr(hf, name), name
    for each in (ours, hf):
        each._set_signature_columns_if_needed()
    assert set(ours._signature_columns) == set(hf._signature_columns) >= {"input_ids", "labels", "attention_mask"}
    evaluated = [[e["eval_loss"] for e in each.state.log_history if "eval_loss" in e] for each in (ours, hf)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=bound) and len(evaluated[0]) == 2
    assert [type(each) for each in ours.callback_handler.callbacks] == [type(c) for c in hf.callback_handler.callbacks]


def test_generation_in_evaluation_is_that_of_peft(tmp_path):
    found, settings = [], {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
    for model, kind in zip(
        pair("SEQ_2_SEQ_LM", settings, "t5"), (transformers.Seq2SeqTrainer, Seq2SeqTrainer), strict=True
    ):
        chosen = arguments(
            tmp_path / kind.__module__, transformers.Seq2SeqTrainingArguments, predict_with_generate=True,
            generation_max_length=8,
        )  # fmt: skip
        trained = kind(model, chosen, train_dataset=rows_of("SEQ_2_SEQ_LM"))
        quiet(trained.train)
        found.append((losses(trained), quiet(trained.predict, rows_of("SEQ_2_SEQ_LM")).predictions))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert (found[1][1] == found[0][1]).all() and len(found[1][1]) == 8


@pytest.mark.slow
def test_a_compiled_model_goes_on_and_has_the_same_losses(tmp_path):
    """Traced as for inductor, which takes a minute to compile."""
    assert_goes_on("even", tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    eager = trainer(patched("even"), tmp_path / "eager")
    quiet(eager.train)
    assert contents(tmp_path / "whole/checkpoint-4")["losses"] == pytest.approx(losses(eager), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix"])
def test_the_best_model_comes_back_at_the_end(method, tmp_path):
    model = patched(method)
    chosen = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_total_limit=1,
        save_only_model=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    callbacks = [AdaLoraCallback()] if method == "adalora" else []
    rows = rows_of("CAUSAL_LM")
    trained = Trainer(model, chosen, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks)
    quiet(trained.train)
    assert trained.state.best_global_step == 2 and os.listdir(tmp_path) == ["checkpoint-2"]
    assert not {"optimizer.pt", "rng_state.pth"} & set(os.listdir(tmp_path / "checkpoint-2"))
    saved = fastpeft.load_adapter(tiny(), tmp_path / "checkpoint-2", trainable=True)
    expected = fastpeft.adapter_state_dict(saved)
    for key, tensor in fastpeft.adapter_state_dict(trained.model).items():
        assert torch.equal(tensor, expected[key]), key
    assert trained.evaluate()["eval_loss"] == pytest.approx(trained.state.best_metric, rel=1e-6)


def test_a_checkpoint_of_another_configuration_is_refused_and_nothing_changes(tmp_path):
    quiet(trainer(patched("lora"), tmp_path).train)
    other = fastpeft.patch(tiny(), fastpeft.LoraConfig(**{**LORA, "lora_alpha": 32}, task_type="CAUSAL_LM"))
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    said = r"checkpoint-4 was saved with lora_alpha=8, and adapter 'default' has lora_alpha=32; make the adapter"
    with pytest.raises(fastpeft.ConfigError, match=said):
        quiet(trainer(other, tmp_path).train, resume_from_checkpoint=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())
    prefix = patched("prefix")
    with pytest.raises(fastpeft.ConfigError, match="saved with peft_type='LORA', and adapter 'default' has peft_type"):
        quiet(trainer(prefix, tmp_path).train, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    fewer = {**LORA, "target_modules": ["q_proj", "v_proj"]}
    other = fastpeft.patch(tiny(), fastpeft.LoraConfig(**fewer, task_type="CAUSAL_LM"))
    with pytest.raises(fastpeft.AdapterFileError, match="different layers: the directory alone has .*gate_proj.lora_A"):
        restore_adapter(other, tmp_path / "checkpoint-2")
    quirky = fastpeft.patch(tiny(), fastpeft.LoraConfig(**LORA, task_type="CAUSAL_LM"), hf_quirks=True)
    with pytest.raises(fastpeft.ConfigError, match="saved with hf_quirks=False, and adapter 'default' has hf_quirks"):
        restore_adapter(quirky, tmp_path / "checkpoint-2")
    merged = patched("lora")
    fastpeft.merge(merged)
    with pytest.raises(fastpeft.PatchError, match="'?default'? is merged into the base weights; unmerge first"):
        restore_adapter(merged, tmp_path / "checkpoint-2")
    with pytest.raises(fastpeft.AdapterFileError, match="checkpoint-2/mine does not exist"):
        quiet(trainer(patched("named"), tmp_path).train, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_table_without_its_network_is_no_checkpoint(tmp_path):
    model = patched("prefix")
    fastpeft.save_adapter(model, tmp_path)
    os.remove(tmp_path / "fastpeft.json")
    with pytest.raises(fastpeft.AdapterFileError, match="has the table of 'default', and not the network"):
        restore_adapter(model, tmp_path)


def test_a_failing_restoration_leaves_adalora_as_it_was(tmp_path, monkeypatch):
    trained = trainer(patched("adalora"), tmp_path)
    quiet(trained.train)
    model = patched("adalora")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}

    def failing(*args):
        raise fastpeft.AdapterFileError("planted")

    monkeypatch.setattr("fastpeft.restoring.fill_encoder", failing)
    with pytest.raises(fastpeft.AdapterFileError, match="planted"):
        restore_adapter(model, tmp_path / "checkpoint-4")
    assert pattern(model) is None
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name
    monkeypatch.undo()
    restore_adapter(model, tmp_path / "checkpoint-4")
    assert pattern(model) == pattern(trained.model) is not None
    os.remove(tmp_path / "checkpoint-4/fastpeft.json")
    with pytest.raises(fastpeft.AdapterFileError, match="has 6 triplets, and . in the directory, which was saved with"):
        restore_adapter(patched("adalora"), tmp_path / "checkpoint-4")


def test_an_unfinished_checkpoint_is_passed_over_and_refused_by_name(tmp_path):
    quiet(trainer(patched("lora"), tmp_path).train)
    state = tmp_path / "checkpoint-4/trainer_state.json"
    content = state.read_text()
    state.write_text(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="checkpoint-4 in .* not written to the end; passed over"):
        assert trainer_checkpoints.last_complete(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    with pytest.raises(fastpeft.AdapterFileError, match="checkpoint-4 has no trainer_state.json"):
        quiet(trainer(patched("lora"), tmp_path).train, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(fastpeft.AdapterFileError, match=r"no complete checkpoint in .* \(there is none\)"):
        quiet(trainer(patched("lora"), tmp_path / "empty").train, resume_from_checkpoint=True)


def test_what_a_checkpoint_has_besides_is_not_passed_by(tmp_path):
    quiet(trainer(patched("several"), tmp_path).train)
    alone = trainer(patched("lora"), tmp_path)
    before = [parameter.clone() for parameter in alone.model.parameters()]
    with pytest.raises(fastpeft.AdapterFileError, match="has the adapter 'two', and the model has 'default'; add it"):
        alone.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, before, alone.model.parameters()))


def test_a_checkpoint_without_an_optimizer_is_gone_on_from_with_a_warning(tmp_path):
    quiet(trainer(patched("lora"), tmp_path, save_only_model=True).train)
    with pytest.warns(UserWarning, match="checkpoint-4 has no state of the optimizer"):
        trainer(patched("lora"), tmp_path, max_steps=5).train(resume_from_checkpoint=True)


def test_adalora_does_not_go_on_under_fsdp(tmp_path):
    quiet(trainer(patched("adalora"), tmp_path).train)
    again = trainer(patched("adalora"), tmp_path)
    again.is_fsdp_enabled = True
    with pytest.raises(
        fastpeft.PatchError, match="has no importances of AdaLoRA's triplets, and 'default' would choose"
    ):
        again.train(resume_from_checkpoint=True)


def test_an_old_state_does_not_make_a_new_checkpoint_complete(tmp_path, monkeypatch):
    quiet(trainer(patched("lora"), tmp_path).train)
    again = trainer(patched("lora"), tmp_path)

    def die(output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(again, "_save_rng_state", die)
    with pytest.raises(KeyboardInterrupt):
        quiet(again.train)
    assert not (tmp_path / "checkpoint-2/trainer_state.json").exists()


def test_other_models_are_handled_as_transformers_does(tmp_path):
    plain = Trainer(tiny(), arguments(tmp_path / "plain"), train_dataset=rows_of("CAUSAL_LM"))
    quiet(plain.train)
    again = Trainer(tiny(), arguments(tmp_path / "plain"), train_dataset=rows_of("CAUSAL_LM"))
    again.model.lm_head.weight.data.zero_()
    quiet(again.train, resume_from_checkpoint=str(tmp_path / "plain/checkpoint-4"))
    assert (tmp_path / "plain/checkpoint-4/model.safetensors").is_file()
    assert torch.equal(again.model.lm_head.weight, plain.model.lm_head.weight)


def test_a_quantised_base_is_known_to_have_adapters(tmp_path):
    model = patched("lora")
    model.__dict__["is_quantized"] = True
    model.__dict__["hf_quantizer"] = types.SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(model, arguments(tmp_path))
    Trainer(model, arguments(tmp_path))
    assert "_hf_peft_config_loaded" not in model.__dict__
