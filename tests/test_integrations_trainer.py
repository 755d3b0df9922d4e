"""AdaLoRA under transformers' Trainer: when the callback runs, with accumulated and clipped gradients, and saving."""

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers

import fastpeft
from fastpeft.integrations import trainer as integration
from fastpeft.integrations.trainer import AdaLoraCallback
from tests.adalora_pair import TARGETS, ours_alone, pattern, ranks
from tests.models import batch, tiny

SETTINGS = {"total_step": 8, "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, **TARGETS}
ROWS = [{key: value[row] for key, value in batch(rows=8).items()} for row in range(8)]


def trainer(model, directory, **settings):
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, **settings}
    arguments = transformers.TrainingArguments(
        str(directory), per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True,
        report_to=[], save_strategy="steps", save_steps=4, disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=[AdaLoraCallback()])


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def by_hand(model, order: list, steps=8) -> None:
    """The Trainer's steps: batches accumulated, each with its share of the mean over all their tokens, gradients
    clipped, then the optimizer, the allocator, zero_grad."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    rows = iter(order)
    for step in range(1, steps + 1):
        chosen = [next(rows) for _ in range(4)]
        items = sum((row["labels"][1:] != -100).sum() for row in chosen)
        for part in (chosen[:2], chosen[2:]):
            inputs = {key: torch.stack([row[key] for row in part]) for key in part[0]}
            model(**inputs, num_items_in_batch=items).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        fastpeft.update_and_allocate(model, step)
        optimizer.zero_grad()


def test_the_trainer_does_what_a_loop_does(tmp_path):
    model = ours_alone(**SETTINGS)
    by_trainer = trainer(copy.deepcopy(model), tmp_path)
    order = []
    collate = by_trainer.data_collator
    by_trainer.data_collator = lambda rows: order.extend(rows) or collate(rows)
    quiet(by_trainer.train)
    trained = by_trainer.model
    by_hand(model.train(), order)
    assert pattern(trained) == pattern(model) and sum(ranks(trained).values()) == 12
    for (name, mine), (_, theirs) in zip(trained.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, monkeypatch):
    whole = trainer(ours_alone(**SETTINGS), tmp_path)
    quiet(whole.train)
    for name in ("checkpoint-4", "checkpoint-8"):
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    resumed = fastpeft.load_adapter(tiny(), tmp_path / "checkpoint-4", trainable=True)
    second = trainer(resumed, tmp_path / "again")
    monkeypatch.setattr(second, "_load_from_checkpoint", lambda *args, **kwargs: None)  # the adapter is in already
    quiet(second.train, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.named_parameters())
    assert pattern(resumed) == pattern(whole.model)


def test_a_total_step_that_is_not_the_trainers_is_said(tmp_path):
    model = ours_alone(**{**SETTINGS, "total_step": 20})
    with pytest.warns(UserWarning, match=r"total_step=20, but this training has 2 steps; .* step 18 .* does not reach"):
        trainer(model, tmp_path, max_steps=2).train()
    state = SimpleNamespace(max_steps=12, global_step=0)
    with pytest.warns(
        UserWarning, match=r"total_step=8, but this training has 12 steps; the ranks are settled at step 6"
    ):
        AdaLoraCallback().on_train_begin(None, state, None, model=ours_alone(**SETTINGS))


def test_a_model_without_adalora_is_refused_at_the_start(tmp_path):
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(fastpeft.PatchError, match="no AdaLoRA adapter is active in this model; active are 'default'"):
        quiet(trainer(model, tmp_path).train)


def test_a_step_that_loss_scaling_skipped_counts_for_no_importance():
    model, callback = ours_alone(**SETTINGS), AdaLoraCallback()
    skipped = SimpleNamespace(step_was_skipped=True)
    model(**batch()).loss.backward()
    callback.on_optimizer_step(None, SimpleNamespace(global_step=0), None, model=model)
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else torch.full_like(parameter.grad, torch.inf)
    wrapped = torch.nn.DataParallel(model)
    callback.on_optimizer_step(None, SimpleNamespace(global_step=3), None, model=wrapped, optimizer=skipped)
    assert pattern(model) is None
    callback.on_optimizer_step(None, SimpleNamespace(global_step=5), None, model=wrapped, optimizer=skipped)
    assert sum(ranks(model).values()) == 0 and sum(map(sum, pattern(model).values())) == 12  # values start at zero


def test_the_callback_is_transformers_and_nothing_else_loads_that():
    assert issubclass(AdaLoraCallback, transformers.TrainerCallback) and integration.AdaLoraCallback is AdaLoraCallback
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        integration.Other  # noqa: B018
    program = "import sys, fastpeft.integrations.trainer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
