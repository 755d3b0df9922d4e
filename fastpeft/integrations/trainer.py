"""transformers' and TRL's trainers for models that `fastpeft.patch` has patched:

    from fastpeft.integrations.trainer import Trainer  # in place of transformers'

    Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=True)

`Trainer`, `Seq2SeqTrainer`: transformers', which save the adapter alone by themselves, and know how to go on only with
peft's own classes. These do with a patched model: see `fastpeft.integrations.trainer_checkpoints`.
`SFTTrainer`, `DPOTrainer`, `GRPOTrainer`: TRL's, with the same: see `fastpeft.integrations.trainer_trl`.
`AdaLoraCallback`: AdaLoRA's step, of which no trainer knows, between the optimizer's and `zero_grad`; of a PeftModel
too:

    Trainer(model, args, train_dataset=data, callbacks=[AdaLoraCallback()]).train()

Each class is made when it is first asked for, so that nothing else loads transformers or TRL. Any other model is
handled as transformers' or TRL's own class does it.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from fastpeft.configs import AdaLoraConfig
from fastpeft.errors import PatchError
from fastpeft.integrations.peft.adalora_checkpoints import save_training
from fastpeft.integrations.trainer_checkpoints import AdapterCheckpoints, inside
from fastpeft.patching import state_of
from fastpeft.rank_allocator import update_and_allocate

_OF_TRANSFORMERS = ("Trainer", "Seq2SeqTrainer")
_OF_TRL = ("SFTTrainer", "DPOTrainer", "GRPOTrainer")


def __getattr__(name: str):
    if name == "AdaLoraCallback":
        return _callback_class()
    if name in (*_OF_TRANSFORMERS, *_OF_TRL):
        return _trainer_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "AdaLoraCallback", *_OF_TRANSFORMERS, *_OF_TRL])


@functools.cache
def _trainer_class(name: str) -> type:
    if name in _OF_TRL:
        import trl

        from fastpeft.integrations import trainer_trl

        mixin, original = getattr(trainer_trl, name.removesuffix("Trainer")), getattr(trl, name)
    else:
        import transformers

        mixin, original = AdapterCheckpoints, getattr(transformers, name)
    return type(name, (mixin, original), {"__module__": __name__, "__doc__": mixin.__doc__})


@functools.cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class AdaLoraCallback(TrainerCallback):
        """Calls `update_and_allocate` (of a PeftModel, peft's own) after each optimizer step, once for all the batches
        accumulated in it, while the gradients (clipped, if they are) are still there. The schedule's steps are the
        Trainer's `global_step`, from 1. Into every checkpoint of a PeftModel goes `fastpeft_adalora.safetensors`, with
        which a patched one goes on bit for bit; peft's files alone are not enough to train on.

        Raises PatchError at the start of training if no AdaLoRA adapter is active; warns if its total_step is not the
        number of steps that the Trainer will make.
        """

        def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
            config, _ = _schedule_of(inside(model))
            if config.total_step != state.max_steps:
                final_step = config.total_step - config.tfinal
                settled = f"the ranks are settled at step {final_step} (total_step - tfinal)"
                warnings.warn(
                    f"AdaLoraConfig.total_step={config.total_step}, but this training has {state.max_steps} steps; "
                    + (settled if final_step <= state.max_steps else f"{settled}, which it does not reach"),
                    stacklevel=2,
                )

        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
            (config, allocate), step = _schedule_of(inside(model)), state.global_step + 1
            skipped = getattr(optimizer, "step_was_skipped", False)  # by accelerate, for gradients beyond fp16's range
            if not skipped or step >= config.total_step - config.tfinal:  # where gradients are not looked at
                allocate(step)

        def on_save(self, args, state, control, model=None, **kwargs) -> None:
            from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

            model = inside(model)
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            if "_fastpeft" not in model.__dict__ and os.path.isdir(folder):
                save_training(model, folder, args.should_save)

    AdaLoraCallback.__module__, AdaLoraCallback.__qualname__ = __name__, "AdaLoraCallback"
    return AdaLoraCallback


def _schedule_of(model: nn.Module) -> tuple[Any, Callable[[int], None]]:
    """The configuration of the active AdaLoRA adapter, and what makes its step. Raises PatchError if there is none."""
    if "_fastpeft" not in model.__dict__ and hasattr(model, "peft_config"):
        configs, active = model.peft_config, model.active_adapters
        active = active() if callable(active) else active
        tuner = getattr(model, "base_model", None)
        mine = [name for name in active if name == getattr(tuner, "trainable_adapter_name", None)]
        allocate = getattr(tuner, "update_and_allocate", None)
    else:
        state = state_of(model)
        configs, active = state.configs, state.active
        mine = [name for name in active if isinstance(configs[name], AdaLoraConfig)]
        allocate = functools.partial(update_and_allocate, model)
    if not mine:
        raise PatchError(
            f"AdaLoraCallback: no AdaLoRA adapter is active in this model; active are "
            f"{', '.join(map(repr, active)) or 'none'}. Leave the callback out, or call set_adapter first"
        )
    return configs[mine[0]], allocate
