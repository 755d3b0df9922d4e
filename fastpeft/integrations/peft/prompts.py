"""Prefix tuning, prompt tuning and P-tuning of peft: the parameters stay in the PeftModel's `prompt_encoder`, its
forward hands the call to the base model, where attention and embeddings find the virtual tokens."""

import warnings
from typing import Any

from torch import nn

from fastpeft.attention.interface import register
from fastpeft.configs import PrefixTuningConfig, PromptLearningConfig, TaskType, as_config
from fastpeft.errors import FastpeftError
from fastpeft.forward import Part
from fastpeft.integrations.peft.base import begin_base, end_base, forget_adapter, using
from fastpeft.integrations.peft.swapping import Extension, Swapped, full_name, swap
from fastpeft.integrations.trainer_trl import put_trl_behind
from fastpeft.mapping import task_class, tuner_of
from fastpeft.neighbours import put_behind
from fastpeft.tuners import prefix_injection, prompt_encoder, prompt_injection
from fastpeft.tuners.prefix_encoder import PrefixEncoder
from fastpeft.tuners.prompt_call import argument_names, named_arguments


class FusedPromptModel(Swapped):
    """In front of a PeftModel of one of these methods."""

    def forward(self, *args, **kwargs) -> Any:
        name, state = self.active_adapter, self.extension.hooked
        if name not in state.configs:
            return super().forward(*args, **kwargs)
        put_behind(self.base_model)  # Liger's forward, which may have come after the patch
        given = named_arguments(self.swapped_from, args, kwargs)
        given.pop("task_ids", None)
        drops = state.configs[name].task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
        if drops and given.get("token_type_ids") is not None:
            warnings.warn("peft hands no token_type_ids on to a model of this task; they are ignored", stacklevel=2)
            del given["token_type_ids"]
        given = {key: value for key, value in given.items() if value is not None}
        if given.get("fused_lm_head") and "forward" in self.base_model.__dict__:  # TRL's, put there after the patch
            put_trl_behind(self.base_model)
        return using(state, name, self.base_model, **given)

    def generate(self, *args, **kwargs) -> Any:
        name, state = self.active_adapter, self.extension.hooked
        if name not in state.configs or self._adapters_disabled:
            return super().generate(*args, **kwargs)
        if "generation_config" in self.__dict__:
            self.base_model.generation_config = self.generation_config
        return using(state, name, self.base_model.generate, *args, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: Any, *args, **kwargs) -> None:
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        try:
            attach_adapter(self, adapter_name)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def load_adapter(self, model_id: Any, adapter_name: str, *args, **kwargs) -> Any:
        encoder = self.prompt_encoder._modules.get(adapter_name)
        if encoder is not None and len(encoder._modules) > 1:
            warnings.warn(
                f"peft's files have the virtual tokens of {adapter_name!r}, and not the network that they come out of: "
                "what this model computes and learns from here on is not what was saved. Load them for use, with "
                "PeftModel.from_pretrained; to resume training, use fastpeft.patch(model, config) and "
                "fastpeft.integrations.trainer.Trainer, whose checkpoints have the network",
                stacklevel=2,
            )
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        forget_adapter(self.base_model, self.extension, adapter_name)  # first, so that it can be deleted once more
        super().delete_adapter(adapter_name)

    def swapped_back(self) -> None:
        """Undo what `swap_prompts` did to the base model."""
        end_base(self.base_model, self.extension)


def swap_prompts(model: nn.Module, extension: Extension) -> None:
    """Make a PeftModel with virtual tokens ours, and its base model ready for them."""
    argument_names(type(model))  # which are found here, before torch.compile asks for them
    if any(full_name(kind).startswith("peft.") for kind in type(model.base_model).__mro__):
        why = "its base model is a PeftModel itself"
    elif swap(model, FusedPromptModel, extension):
        begin_base(model.base_model, extension)
        for name in model.peft_config:
            attach_adapter(model, name)
        return
    else:
        why = "the model's forward was replaced by somebody (accelerator.prepare?); patch before that"
    extension.left.update(dict.fromkeys(model.peft_config, why))


def attach_adapter(model: nn.Module, name: str) -> None:
    """Let the base model's modules know one adapter of the PeftModel. What fastpeft has no way for is left to peft's
    own forward, and the extension says why."""
    base, extension = model.base_model, model.extension
    state, encoder = extension.hooked, model.prompt_encoder[name]
    try:
        config: PromptLearningConfig = as_config(model.peft_config[name])
        config.modules_to_save = None  # which peft has put in place
        plan = tuner_of(config).plan(base, config)
    except FastpeftError as error:
        extension.left[name] = str(error)
        return
    config, view = plan.config, None
    if isinstance(config, PrefixTuningConfig):
        register()
        (part,) = plan.parts
        prefix = PrefixEncoder.over(encoder, config.num_virtual_tokens, part.width, part.blocks)
        prefix_injection.attach_part(part, prefix, name, state, config)
    else:
        view = prompt_encoder.over(encoder, config.num_virtual_tokens)
        prompt_injection.attach_embeddings(plan, view, name, state)
    state.configs[name] = config
    state.quirky.add(name)
    part = Part(task_class(config), True, view)
    if part.acts:
        state.parts[name] = part
