"""What stands in front of peft's tuners, the objects that put adapters into a model: layers that are added later become
ours too."""

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.integrations.peft.layers import FUSED
from fastpeft.integrations.peft.swapping import Extension, Swapped, full_name, swap
from fastpeft.neighbours import check_peft_s_head
from fastpeft.tuners.fusions import part_all
from fastpeft.tuners.orthogonality import mean_distance


def swap_layers(model: nn.Module, extension: Extension) -> None:
    """Make every layer of peft's ours for which there is something."""
    for module in model.modules():
        mixin = FUSED.get(full_name(type(module)))
        if mixin is not None and not isinstance(module, Swapped):
            swap(module, mixin, extension)


class SwappingTuner(Swapped):
    """In front of a tuner of layers (LoraModel, MixedModel; AdaLoraModel below): whatever adds an adapter calls its
    `inject_adapter`, and whatever takes the adapters out of the base model its `_unload_and_optionally_merge`."""

    def forward(self, *args, **kwargs) -> Any:
        _check_head(self.model)
        return super().forward(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, *args, **kwargs) -> None:
        try:
            super().inject_adapter(model, *args, **kwargs)
        finally:  # where peft refuses an adapter late, it leaves its layers in the model
            swap_layers(model, self.extension)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        """Of `unload` and `merge_and_unload`, which return the base model as peft found it."""
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        part_all(base)  # not before: a merge that is refused changes nothing
        return base


class SwappingAdaLora(SwappingTuner):
    """In front of AdaLoraModel: the orthogonal term of the loss, in as many kernels as there are shapes, not layers."""

    def forward(self, *args, **kwargs) -> Any:
        _check_head(self.model)
        outputs = self.model.forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor):
            name = self.trainable_adapter_name
            weight = self.peft_config[name].orth_reg_weight
            if weight < 0:
                raise ValueError(f"orth_reg_weight={weight!r}; 0 or more is needed")
            named = [(path, each) for path, each in self.model.named_parameters() if name in path]  # peft's own rule
            rows, columns = ([each for path, each in named if key in path] for key in ("lora_A", "lora_B"))
            outputs.loss = loss + weight * mean_distance(rows, columns, loss.device).to(loss.dtype)
        return outputs


def _check_head(base: nn.Module) -> None:
    """Liger's kernels may have come after the patch."""
    if not torch.compiler.is_dynamo_compiling():
        check_peft_s_head(base)


class SwappingModel(Swapped):
    """In front of a transformers model that holds peft's layers itself (`model.add_adapter(config)`)."""

    def __call__(self, *args, **kwargs) -> Any:
        _check_head(self)
        return super().__call__(*args, **kwargs)

    def add_adapter(self, *args, **kwargs) -> None:
        super().add_adapter(*args, **kwargs)
        swap_layers(self, self.extension)

    def load_adapter(self, *args, **kwargs) -> Any:
        out = super().load_adapter(*args, **kwargs)
        swap_layers(self, self.extension)
        return out


_TUNERS = "peft.tuners"
TUNERS = {
    f"{_TUNERS}.lora.model.LoraModel": SwappingTuner,
    f"{_TUNERS}.mixed.model.MixedModel": SwappingTuner,
    f"{_TUNERS}.adalora.model.AdaLoraModel": SwappingAdaLora,
}
