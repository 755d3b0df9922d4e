"""What transformers' Trainer does with a PeftModel and not with a model that `fastpeft.patch` has patched.

A checkpoint holds the adapters alone, as `save_pretrained` of a patched model writes them, and beside them optimizer,
schedule, random states and trainer_state.json, which is written last: without it the checkpoint is incomplete.
"""

import contextlib
import json
import os
import re
import warnings

from torch import nn

from fastpeft.config_base import PeftType
from fastpeft.errors import AdapterFileError, PatchError
from fastpeft.files import adapter_directory
from fastpeft.journal import CONFIG
from fastpeft.model import PatchedModel
from fastpeft.neighbours import check_liger, put_behind
from fastpeft.patching import state_of
from fastpeft.restoring import restore_adapter

_STATE = "trainer_state.json"


class AdapterCheckpoints:
    """transformers' class of this name, for a model patched by fastpeft too.

    `resume_from_checkpoint` (a path, or True for the last complete checkpoint) and `load_best_model_at_end` give every
    adapter of the model what the checkpoint holds of it, in place: its tensors, the network that a prompt comes out of,
    AdaLoRA's importances and ranks. Training goes on bit for bit. A checkpoint that was being written when the process
    died is passed over; one of another configuration is refused, with the name of the field, and one with adapters
    that the model has not. One without an optimizer (`save_only_model`) is gone on from with a warning.

    Raises, before the first step, AdapterFileError and ConfigError as `fastpeft.restoring.restore_adapter`, and
    PatchError where Liger's kernels (`use_liger_kernel`) would pass the adapter by, or AdaLoRA is resumed under FSDP,
    whose checkpoints have no importances.
    """

    def __init__(self, model=None, *args, **kwargs):
        with adapters_known(model):
            super().__init__(model, *args, **kwargs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        patched = is_patched(self.model)
        if patched:
            liger = self.args.use_liger_kernel
            fused = (self.args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
            check_liger(inside(self.model), liger and fused)
        if resume_from_checkpoint and patched:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete(self.args.output_dir)
            else:
                check_complete(resume_from_checkpoint)
            self._check_resumed(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumed(self, checkpoint: str) -> None:
        state = state_of(inside(self.model))
        importances = [name for name, config in state.configs.items() if config.peft_type == PeftType.ADALORA]
        if self.is_fsdp_enabled and importances:
            raise PatchError(
                f"a checkpoint of FSDP has no importances of AdaLoRA's triplets, and {importances[0]!r} would choose "
                "its ranks anew; train it under DistributedDataParallel, or to the end at once"
            )
        others = [name for name in os.listdir(checkpoint) if os.path.isfile(os.path.join(checkpoint, name, CONFIG))]
        if more := sorted(set(others) - state.configs.keys()):
            raise AdapterFileError(
                f"{checkpoint} has the adapter {more[0]!r}, and the model has {', '.join(map(repr, state.configs))}; "
                "add it to the model, with the configuration that it was trained with, before the Trainer is made"
            )
        if not any(name.startswith(("optimizer", "global_step")) for name in os.listdir(checkpoint)):
            warnings.warn(
                f"{checkpoint} has no state of the optimizer (save_only_model=True writes none): training goes on with "
                "a new optimizer and schedule",
                stacklevel=3,
            )

    def _inner_training_loop(self, *args, **kwargs):
        if is_patched(self.model):
            put_behind(inside(self.model))
        return super()._inner_training_loop(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # of an earlier run, and not to be taken for this one's
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, _STATE))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not is_patched(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_all(inside(self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not is_patched(self.model):
            super()._load_best_model()
        elif not os.path.isdir(self.state.best_model_checkpoint):
            gone = f"the best checkpoint, {self.state.best_model_checkpoint}, is not there"
            warnings.warn(f"{gone}; the model stays as the last step left it", stacklevel=2)
        else:
            restore_all(inside(self.model), self.state.best_model_checkpoint)


def inside(model: nn.Module) -> nn.Module:
    """The patched model in what distributes or compiles it."""
    while "_fastpeft" not in model.__dict__ and (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    return model._modules.get("module", model._modules.get("_orig_mod"))


def is_patched(model) -> bool:
    """Whether it is, or wraps, a model whose adapters are fastpeft's own, and not those of a PeftModel."""
    return isinstance(model, nn.Module) and isinstance(inside(model), PatchedModel)


@contextlib.contextmanager
def adapters_known(model):
    """Inside, transformers knows that a quantised model has adapters: without any it refuses to train it."""
    known = is_patched(model) and getattr(model, "is_quantized", False)
    if known:
        model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        if known:
            del model.__dict__["_hf_peft_config_loaded"]


def restore_all(model: nn.Module, checkpoint: str) -> None:
    """Give every adapter of a patched model what a checkpoint has of it. Raises as `restore_adapter`."""
    for name in state_of(model).configs:
        restore_adapter(model, adapter_directory(checkpoint, name), adapter_name=name)


def is_complete(checkpoint: str) -> bool:
    """Whether the last thing that a Trainer writes into a checkpoint is there as a whole."""
    try:
        with open(os.path.join(checkpoint, _STATE), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


def check_complete(checkpoint: str) -> None:
    """Raises AdapterFileError for a checkpoint that was not written to its end."""
    if not is_complete(checkpoint):
        raise AdapterFileError(
            f"{checkpoint} has no {_STATE}, which a Trainer writes last: it is no checkpoint, or training was stopped "
            "while it was written. Give an earlier one, or resume_from_checkpoint=True for the last that is complete"
        )


def last_complete(directory: str) -> str:
    """The checkpoint of the highest step in a directory that was written to its end. Raises AdapterFileError if there
    is none; warns of those passed over."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = sorted((int(found[1]), name) for name in names if (found := pattern.fullmatch(name)))
    passed = []
    for _, name in reversed(steps):
        checkpoint = os.path.join(directory, name)
        if is_complete(checkpoint):
            if passed:
                warnings.warn(f"{', '.join(passed)} in {directory} not written to the end; passed over", stacklevel=3)
            return checkpoint
        passed.append(name)
    what = f"{', '.join(passed)} not written to the end" if passed else "there is none"
    raise AdapterFileError(f"no complete checkpoint in {directory} ({what}); call train() without resuming")
