"""AdaLoRA under transformers' Trainer, which knows no step between the optimizer's and `zero_grad`:

    from fastpeft.integrations.trainer import AdaLoraCallback

    Trainer(model, args, train_dataset=data, callbacks=[AdaLoraCallback()]).train()

`AdaLoraCallback` is a `transformers.TrainerCallback`, made when it is first asked for, so that nothing else loads
transformers.
"""

import functools
import warnings

from torch import nn

from fastpeft.configs import AdaLoraConfig
from fastpeft.errors import PatchError
from fastpeft.patching import state_of
from fastpeft.rank_allocator import update_and_allocate


def __getattr__(name: str):
    if name == "AdaLoraCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class AdaLoraCallback(TrainerCallback):
        """Calls `update_and_allocate` after each optimizer step, once for all the batches accumulated in it, while the
        gradients (clipped, if they are) are still there. The schedule's steps are the Trainer's `global_step`, from 1.

        Raises PatchError at the start of training if no AdaLoRA adapter is active; warns if its total_step is not the
        number of steps that the Trainer will make.
        """

        def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
            config = _config_of(_inside(model))
            if config.total_step != state.max_steps:
                settled = f"the ranks are settled at step {config.final_step} (total_step - tfinal)"
                warnings.warn(
                    f"AdaLoraConfig.total_step={config.total_step}, but this training has {state.max_steps} steps; "
                    + (settled if config.final_step <= state.max_steps else f"{settled}, which it does not reach"),
                    stacklevel=2,
                )

        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
            model, step = _inside(model), state.global_step + 1
            skipped = getattr(optimizer, "step_was_skipped", False)  # by accelerate, for gradients beyond fp16's range
            if not skipped or step >= _config_of(model).final_step:  # where gradients are not looked at
                update_and_allocate(model, step)

    AdaLoraCallback.__module__, AdaLoraCallback.__qualname__ = __name__, "AdaLoraCallback"
    return AdaLoraCallback


def _inside(model: nn.Module) -> nn.Module:
    """The patched model in what distributes or compiles it."""
    while "_fastpeft" not in model.__dict__ and (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    return model._modules.get("module", model._modules.get("_orig_mod"))


def _config_of(model: nn.Module) -> AdaLoraConfig:
    """Of the active AdaLoRA adapter. Raises PatchError if there is none."""
    state = state_of(model)
    for name in state.active:
        if isinstance(state.configs[name], AdaLoraConfig):
            return state.configs[name]
    raise PatchError(
        f"AdaLoraCallback: no AdaLoRA adapter is active in this model; active are "
        f"{', '.join(map(repr, state.active)) or 'none'}. Leave the callback out, or call set_adapter first"
    )
