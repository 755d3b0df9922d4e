"""A patched PeftModel under the trainers of transformers and TRL as they are: what a checkpoint holds, going on from it
bit for bit, and the losses of the same script without the patch."""

import json
import math
import os
import shutil
import warnings

import datasets
import peft
import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file

import fastpeft
from fastpeft.integrations.peft.adalora_checkpoints import FILE
from fastpeft.integrations.trainer import AdaLoraCallback
from tests import test_trl
from tests.models import batch, tiny
from tests.peft_pair import close
from tests.test_integrations_trainer_checkpoints import MODES, arguments, contents, quiet, rows_of
from tests.test_trl import PAIRS, TEXTS, reward, settings_for

tokenizer = test_trl.tokenizer
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
ADALORA = {"init_r": 6, "target_r": 2, "total_step": 4, "tinit": 1, "tfinal": 1, "deltaT": 1, "target_modules": TARGETS}

# What is trained: the task, the class of the configuration, its settings; dropout is added where there is any.
METHODS = {
    "lora": ("CAUSAL_LM", "LoraConfig", LORA),
    "dora": ("CAUSAL_LM", "LoraConfig", {**LORA, "use_dora": True, "bias": "lora_only"}),
    "head": ("SEQ_CLS", "LoraConfig", {**LORA, "modules_to_save": ["score"]}),
    "adalora": ("CAUSAL_LM", "AdaLoraConfig", ADALORA),
    "prefix": ("CAUSAL_LM", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("CAUSAL_LM", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("CAUSAL_LM", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "llama-adapter": ("CAUSAL_LM", "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}),
    "seq2seq": ("SEQ_2_SEQ_LM", "LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}),
}
WITH_DROPOUT = ("LoraConfig", "AdaLoraConfig")


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def adapted(method: str, patched=True, dropout=0.0, perturb=False, **more):
    """A new PeftModel, with `more` settings; its adapter is not neutral if `perturb`."""
    task, kind, settings = METHODS[method]
    settings = {**settings, **more}
    if kind in WITH_DROPOUT:
        settings = {**settings, "lora_dropout": dropout}
    torch.manual_seed(3)
    base = tiny("t5" if task == "SEQ_2_SEQ_LM" else "llama", task)
    model = quiet(peft.get_peft_model, base, getattr(peft, kind)(task_type=task, **settings))
    if perturb:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return fastpeft.patch(model) if patched else model


def trainer(model, directory, kind=transformers.Trainer, **settings):
    task = model.peft_config["default"].task_type
    settings_kind = transformers.TrainingArguments
    if kind is transformers.Seq2SeqTrainer:
        settings_kind = transformers.Seq2SeqTrainingArguments
        settings = {"predict_with_generate": True, "generation_max_length": 6, **settings}
    adaptive = isinstance(model.peft_config["default"], peft.AdaLoraConfig)
    rows = rows_of(task)
    return kind(
        model, arguments(directory, settings_kind, **settings), train_dataset=rows, eval_dataset=rows[:4],
        callbacks=[AdaLoraCallback()] * adaptive,
    )  # fmt: skip


def held(checkpoint) -> dict:
    """As `contents`; peft names modules_to_save again each time it adds an adapter."""
    found = contents(checkpoint)
    config = json.loads(found["adapter_config.json"])
    if config.get("modules_to_save"):
        config["modules_to_save"] = sorted(set(config["modules_to_save"]))
    return {**found, "adapter_config.json": config}


def assert_goes_on(make, directory) -> None:
    """Four steps at once, and two and two in another model, end in the same files, byte by byte."""
    whole = make(directory / "whole")
    quiet(whole.train)
    shutil.copytree(directory / "whole/checkpoint-2", directory / "halves/checkpoint-2")
    second = make(directory / "halves")
    quiet(second.train, resume_from_checkpoint=True)
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in second.model.named_parameters())
    assert held(directory / "halves/checkpoint-4") == held(directory / "whole/checkpoint-4")
    first, last = (contents(directory / f"whole/checkpoint-{step}") for step in (2, 4))
    assert first["adapter_model.safetensors"] != last["adapter_model.safetensors"]
    assert len(last["losses"]) == 4 and all(math.isfinite(loss) for loss in last["losses"])


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("adalora", "p-tuning")])
def test_training_goes_on_bit_for_bit(method, tmp_path):
    kind = transformers.Seq2SeqTrainer if method == "seq2seq" else transformers.Trainer
    assert_goes_on(lambda place: trainer(adapted(method, dropout=0.1), place, kind), tmp_path)
    names = set(contents(tmp_path / "whole/checkpoint-4")) - {"losses"}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert names == adapter | {"optimizer.pt", "rng_state.pth", "scheduler.pt"}


def test_a_network_that_peft_does_not_save_is_said(tmp_path):
    """peft resumes with a new one, and says nothing."""
    quiet(trainer(adapted("p-tuning"), tmp_path).train)
    second = trainer(adapted("p-tuning"), tmp_path)
    with pytest.warns(UserWarning, match="the virtual tokens of 'default', and not the network that they come out of"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        served = fastpeft.patch(peft.PeftModel.from_pretrained(tiny(), tmp_path / "checkpoint-2"))
        served.load_adapter(tmp_path / "checkpoint-4", "default")


def test_dropout_counts_in_what_goes_on(tmp_path):
    """Without the random state of the checkpoint the end is another."""
    whole = trainer(adapted("lora", dropout=0.1), tmp_path)
    quiet(whole.train)
    os.remove(tmp_path / "checkpoint-2/rng_state.pth")
    second = trainer(adapted("lora", dropout=0.1), tmp_path)
    torch.manual_seed(77)
    quiet(second.train, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert not all(torch.equal(p, expected[name]) for name, p in second.model.named_parameters())


@pytest.mark.parametrize(
    ("mode", "method"),
    [*((mode, "lora") for mode in MODES), ("checkpointed", "prefix"), ("reentrant", "prompt"), ("bf16", "dora")],
)
def test_training_goes_on_in_every_mode(mode, method, tmp_path):
    assert_goes_on(lambda place: trainer(adapted(method, dropout=0.1), place, **MODES[mode]), tmp_path)


def history(trainer) -> list[dict]:
    """What was logged, and so what any service that is reported to gets, but for times."""
    logged = trainer.state.log_history
    return [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "_time"))} for entry in logged
    ]


def assert_same_training(make, bound=1e-5, adapter=True) -> None:
    """`make(patched)` makes a trainer; what it logs and learns is the same with and without the patch."""
    found = []
    for patched in (False, True):
        made = make(patched)
        quiet(made.train)
        found.append((history(made), dict(made.model.named_parameters())))
    (expected, theirs), (logged, ours) = found
    assert len(logged) == len(expected) and len({entry["loss"] for entry in expected if "loss" in entry}) == 4
    for mine, other in zip(logged, expected, strict=True):
        assert mine == pytest.approx(other, rel=bound, abs=bound)
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        if adapter and parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-4, msg=name)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
PARITY = {
    **{f"{mode}-lora": ("lora", MODES[mode]) for mode in MODES},
    **{f"plain-{method}": (method, {}) for method in METHODS if method != "lora"},
    "checkpointed-dora": ("dora", MODES["checkpointed"]),
    "reentrant-llama-adapter": ("llama-adapter", MODES["reentrant"]),
    "bf16-prefix": ("prefix", MODES["bf16"]),
    "accumulated-adalora": ("adalora", MODES["accumulated"]),
    "smoothed-neftune": ("lora", {"label_smoothing_factor": 0.2, "neftune_noise_alpha": 5.0}),
}


@pytest.mark.parametrize("case", PARITY)
def test_losses_logs_and_weights_are_those_of_peft(case, tmp_path):
    method, mode = PARITY[case]
    kind = transformers.Seq2SeqTrainer if method == "seq2seq" else transformers.Trainer

    def make(patched):
        return trainer(adapted(method, patched), tmp_path / str(patched), kind, **EVALUATED, **mode)

    half = "bf16" in mode
    assert_same_training(make, bound=2e-2 if half else 1e-5, adapter=not half)


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def test_compiled_training_goes_on(tmp_path):
    assert_goes_on(lambda place: trainer(adapted("lora", dropout=0.1), place, **COMPILED), tmp_path)


def test_compiled_losses_are_those_of_peft_as_it_is(tmp_path):
    def make(patched):
        return trainer(adapted("lora", patched), tmp_path / str(patched), **(COMPILED if patched else {}))

    assert_same_training(make)


def test_the_best_model_comes_back(tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    for method in ("lora", "head", "prefix"):
        best = trainer(adapted(method, dropout=0.1), tmp_path / method, **EVALUATED, **settings)
        before = {name: id(parameter) for name, parameter in best.model.named_parameters()}
        quiet(best.train)
        step = best.state.best_global_step
        saved = load_file(f"{best.state.best_model_checkpoint}/adapter_model.safetensors")
        found = peft.get_peft_model_state_dict(best.model)
        assert step == 2 and found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert {name: id(parameter) for name, parameter in best.model.named_parameters()} == before
        assert math.isclose(best.evaluate()["eval_loss"], best.state.best_metric, rel_tol=1e-6)


ALLOCATED = {"total_step": 8, "tinit": 1, "tfinal": 2}


@pytest.mark.parametrize("step", [2, 6], ids=["masking", "settled"])
def test_adalora_goes_on_bit_for_bit(step, tmp_path):
    """peft's own file has no more than the triplets that are in use."""

    def make(place):
        return trainer(adapted("adalora", dropout=0.1, **ALLOCATED), place, max_steps=8)

    whole = make(tmp_path / "whole")
    quiet(whole.train)
    second = make(tmp_path / "halves")
    before = {name: id(parameter) for name, parameter in second.model.named_parameters()}
    quiet(second.train, resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    assert {name: id(parameter) for name, parameter in second.model.named_parameters()} == before
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in second.model.named_parameters())
    assert held(tmp_path / "halves/checkpoint-8") == held(tmp_path / "whole/checkpoint-8")
    names = set(contents(tmp_path / "whole/checkpoint-8")) - {"losses"}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", FILE}
    assert names == adapter | {"optimizer.pt", "rng_state.pth", "scheduler.pt"}
    rows = load_file(tmp_path / f"whole/checkpoint-{step}/adapter_model.safetensors")
    assert any(each.shape[0] < 6 for name, each in rows.items() if "lora_A" in name)
    served = peft.PeftModel.from_pretrained(tiny(), tmp_path / "halves/checkpoint-8")
    ids = batch()["input_ids"]
    with torch.no_grad():
        close(served(ids).logits, second.model.eval()(ids).logits, 1e-5)


def test_the_best_of_adalora_comes_back_with_its_ranks(tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    best = trainer(adapted("adalora", **ALLOCATED), tmp_path, max_steps=8, **EVALUATED, **settings)
    quiet(best.train)
    assert best.state.best_global_step == 2 and not best.model.training
    saved = load_file(tmp_path / "checkpoint-2" / FILE)
    trained = {name: p for name, p in best.model.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(p, saved[f"parameter.{name}"]) for name, p in trained.items())
    kept = best.model.peft_config["default"].rank_pattern
    assert {f"rank_pattern.{name}" for name in kept} == {name for name in saved if name.startswith("rank_pattern.")}
    assert math.isclose(best.evaluate()["eval_loss"], best.state.best_metric, rel_tol=1e-6)


def test_an_adalora_checkpoint_that_does_not_fit_is_refused(tmp_path):
    quiet(trainer(adapted("adalora"), tmp_path).train)
    for more, said in (
        ({"init_r": 5}, r"lora_A.default is \(6, 48\), and \(5, 48\) in the model"),
        ({"target_modules": ["q_proj"]}, "is .*, and not there in the model"),
    ):
        model = adapted("adalora", **more)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(fastpeft.AdapterFileError, match=said):
            model.load_adapter(tmp_path / "checkpoint-4", "default", is_trainable=True)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model = adapted("adalora")
    file = tmp_path / "checkpoint-4" / FILE
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(fastpeft.AdapterFileError, match=FILE):
        model.load_adapter(str(tmp_path / "checkpoint-4"), "default", is_trainable=True)
    file.unlink()
    with pytest.raises(RuntimeError, match="size mismatch"):  # as peft has it
        model.load_adapter(str(tmp_path / "checkpoint-4"), "default", is_trainable=True)


def test_the_adalora_callback_makes_peft_s_own_steps(tmp_path):
    class ByHand(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step + 1)

    models = []
    for callback in (AdaLoraCallback, ByHand):
        model = adapted("adalora")
        settings = arguments(tmp_path / callback.__name__)
        trained = transformers.Trainer(model, settings, train_dataset=rows_of("CAUSAL_LM"), callbacks=[callback()])
        quiet(trained.train)
        models.append(model)
    expected = dict(models[1].named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in models[0].named_parameters())
    pattern = models[0].peft_config["default"].rank_pattern
    assert pattern == models[1].peft_config["default"].rank_pattern
    assert 0 < sum(map(sum, pattern.values())) < 36


def test_the_adalora_callback_says_what_it_cannot_do(tmp_path):
    for model in (adapted("lora"), adapted("prefix"), adapted("lora", patched=False)):
        made = transformers.Trainer(model, arguments(tmp_path), train_dataset=rows_of("CAUSAL_LM"))
        made.add_callback(AdaLoraCallback())
        with pytest.raises(fastpeft.PatchError, match="no AdaLoRA adapter is active .* active are 'default'"):
            quiet(made.train)
    with pytest.warns(UserWarning, match="total_step=4, but this training has 2 steps; .* step 3 .* does not reach"):
        trainer(adapted("adalora"), tmp_path, max_steps=2).train()
    made = transformers.Trainer(tiny(), arguments(tmp_path), train_dataset=rows_of("CAUSAL_LM"))
    made.add_callback(AdaLoraCallback())
    with pytest.raises(fastpeft.PatchError, match="not patched"):
        quiet(made.train)


def trl_trainer(kind, model, directory, tokenizer, config=None, **more):
    """One of TRL's, with its data of `tests.test_trl`."""
    name = kind.__name__.removesuffix("Trainer")
    data = {"SFT": TEXTS, "DPO": PAIRS, "GRPO": {"prompt": PAIRS["prompt"]}}[name]
    if name == "GRPO":
        more = {"beta": 0.1, "num_generations": 2, "max_completion_length": 5, **more}
    settings = settings_for(getattr(trl, f"{name}Config"), directory, **more)
    rewards = {"reward_funcs": reward} if name == "GRPO" else {}
    return quiet(
        kind, model, args=settings, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer,
        peft_config=config, **rewards,
    )  # fmt: skip


TRL = {
    **{f"sft-{method}": (trl.SFTTrainer, method, {}) for method in ("lora", "prefix", "prompt", "adalora")},
    "sft-checkpointed": (trl.SFTTrainer, "dora", {"gradient_checkpointing": True}),
    "sft-packed": (trl.SFTTrainer, "lora", {"packing": True, "max_length": 16, "gradient_accumulation_steps": 2}),
    **{f"dpo-{method}": (trl.DPOTrainer, method, {}) for method in ("lora", "prefix", "prompt")},
    "dpo-precomputed": (trl.DPOTrainer, "lora", {"precompute_ref_log_probs": True}),
    "grpo-lora": (trl.GRPOTrainer, "lora", {}),
}
BEFORE = [(case, "before") for case in TRL]
AFTER = [(case, "after") for case in ("sft-prompt", "dpo-lora")]


@pytest.mark.parametrize(("case", "when"), BEFORE + AFTER)
def test_trl_has_the_losses_of_peft(case, when, tmp_path, tokenizer):
    """`when`: the patch comes before the trainer is made, or after that."""
    kind, method, more = TRL[case]

    def make(patched):
        model = adapted(method, patched and when == "before", perturb=True)
        made = trl_trainer(kind, model, tmp_path / str(patched), tokenizer, **more)
        if patched and when == "after":
            fastpeft.patch(made.model)
        return made

    assert_same_training(make, bound=2e-5)


@pytest.mark.parametrize("kind", [trl.SFTTrainer, trl.DPOTrainer], ids=["sft", "dpo"])
def test_trl_goes_on_bit_for_bit(kind, tmp_path, tokenizer):
    """TRL switches dropout off in DPO, where an adapter that was there is copied for reference."""
    more = {"save_strategy": "steps", "save_steps": 2}

    def make(place):
        return trl_trainer(kind, adapted("lora", dropout=0.1, perturb=True), place, tokenizer, **more)

    assert_goes_on(make, tmp_path)
    files = os.listdir(tmp_path / "whole/checkpoint-4")
    assert ("ref" in files) == (kind is trl.DPOTrainer) and "model.safetensors" not in files


def test_dpo_of_a_new_adapter_compares_with_the_base(tmp_path, tokenizer):
    def make(patched):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
        made = trl_trainer(trl.DPOTrainer, tiny(), tmp_path / str(patched), tokenizer, config)
        assert list(made.model.peft_config) == ["default"] and made.ref_model is None
        return made if not patched else patch_in(made)

    assert_same_training(make, bound=2e-5)


def patch_in(trainer):
    """The one line where a trainer has made the PeftModel."""
    fastpeft.patch(trainer.model)
    return trainer


def test_reports_get_what_they_get_of_peft(tmp_path, monkeypatch):
    """A service that reads what W&B's callback reads."""
    reports = []

    class Service(transformers.TrainerCallback):
        def __init__(self):
            reports.append([])

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            reports[-1] += [type(model).__name__, model.config.to_dict(), model.peft_config["default"].to_dict()]
            reports[-1] += [model.num_parameters(), model.num_parameters(only_trainable=True), args.to_dict()]

        def on_log(self, args, state, control, logs=None, **kwargs):
            reports[-1] += [sorted(logs)]

    known = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(known, "service", Service)
    for patched in (False, True):
        made = trainer(adapted("lora", patched), tmp_path, report_to=["service"], **EVALUATED)
        quiet(made.train)
        assert made.args.report_to == ["service"]
    assert len(reports) == 2 and len(reports[0]) == 13 and reports[0] == reports[1]


@pytest.mark.interpreter
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_ligers_cross_entropy_beside_us(method, tmp_path):
    alone = {"rope": False, "swiglu": False, "rms_norm": False, "fused_linear_cross_entropy": True}
    settings = {"use_liger_kernel": True, "liger_kernel_config": alone}

    def make(patched):
        return trainer(adapted(method, patched), tmp_path / str(patched), **settings)

    assert_same_training(make)
