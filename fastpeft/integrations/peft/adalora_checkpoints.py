"""Checkpoints of peft's AdaLoRA. peft's own files are for use: they leave out the triplets that are masked for now, and
the importances. Training needs both to go on, and finds them in a file beside peft's."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.distributed import placed_as, plain_path, whole
from fastpeft.errors import AdapterFileError
from fastpeft.integrations.peft.swapping import Swapped
from fastpeft.safetensors_header import read_header

FILE = "fastpeft_adalora.safetensors"
_TABLES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's RankAllocator: parameter's name -> importances
_PARAMETER, _PATTERN = "parameter.", "rank_pattern."


class ResumingAdaLora(Swapped):
    """In front of a PeftModel whose tuner is an AdaLoraModel."""

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, *args, **kwargs) -> Any:
        """peft's; the adapter that is trained, from a checkpoint that has the file, as it was, in the same tensors."""
        path = os.path.join(str(model_id), FILE)
        if adapter_name != getattr(self.base_model, "trainable_adapter_name", None) or not os.path.isfile(path):
            return super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        restore_training(self, path)
        if not is_trainable:
            self.eval()
        return nn.modules.module._IncompatibleKeys([], [])


def save_training(model: nn.Module, directory: str, writes: bool) -> None:
    """Write what training has come to into a checkpoint's directory.

    Args:
        model: a `peft.PeftModel` with AdaLoRA; if its parameters are sharded, every process calls.
        directory: there already.
        writes: whether this process writes the file.
    """
    from safetensors.torch import save_file

    tuner = model.base_model
    tensors = {_PARAMETER + name: each for name, each in _trained(model).items()}
    for table in _TABLES:
        tensors |= {f"{table}.{name}": each for name, each in getattr(tuner.rankallocator, table).items()}
    pattern = tuner.peft_config[tuner.trainable_adapter_name].rank_pattern or {}
    tensors |= {_PATTERN + name: torch.tensor(kept, dtype=torch.float32) for name, kept in pattern.items()}
    tensors = {name: whole(each.detach()).cpu().contiguous() for name, each in tensors.items()}
    if writes:
        path = os.path.join(directory, FILE)
        save_file(tensors, path + ".tmp")
        os.replace(path + ".tmp", path)


@torch.no_grad()
def restore_training(model: nn.Module, path: str) -> None:
    """Give a model what `save_training` wrote. Raises AdapterFileError if the file is damaged or of another model; the
    model is then as it was."""
    from safetensors.torch import load_file

    parameters = _trained(model)
    mine = {name: tuple(each.shape) for name, each in parameters.items()}
    header = {name: tuple(each.shape) for name, each in read_header(path).items()}
    theirs = {name.removeprefix(_PARAMETER): each for name, each in header.items() if name.startswith(_PARAMETER)}
    if differing := sorted(mine.items() ^ theirs.items()):
        name = differing[0][0]
        raise AdapterFileError(
            f"{path} is of another model: {name} is {theirs.get(name, 'not there')}, and {mine.get(name, 'not there')} "
            "in the model; make the adapter with the configuration that the checkpoint has"
        )
    found, tuner = load_file(path), model.base_model
    for name, parameter in parameters.items():
        parameter.copy_(placed_as(found[_PARAMETER + name], parameter))
    devices = {name: parameter.device for name, parameter in tuner.model.named_parameters()}
    for table in _TABLES:
        read = {name: found[key] for key in found if (name := key.removeprefix(f"{table}.")) != key}
        setattr(tuner.rankallocator, table, {name: each.to(devices[name]) for name, each in read.items()})
    pattern = {name: found[key].bool().tolist() for key in found if (name := key.removeprefix(_PATTERN)) != key}
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = pattern or None


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {plain_path(name): each for name, each in model.named_parameters() if each.requires_grad}
