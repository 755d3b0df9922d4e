"""Checkpoints of peft's AdaLoRA. peft's own files are for use: they leave out the triplets that are masked for now, and
the importances. Training needs both to go on, and finds them in a file beside peft's."""

import hashlib
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.distributed import placed_as, plain_path, whole
from fastpeft.errors import AdapterFileError
from fastpeft.filling import most_tensors
from fastpeft.integrations.peft.swapping import Swapped
from fastpeft.journal import WEIGHTS
from fastpeft.safetensors_header import read_header

FILE = "fastpeft_adalora.safetensors"
_TABLES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's RankAllocator: parameter's name -> importances
_DIGEST = "weights_sha256"
_PARAMETER, _PATTERN = "parameter.", "rank_pattern."


class ResumingAdaLora(Swapped):
    """In front of a PeftModel whose tuner is an AdaLoraModel."""

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, *args, **kwargs) -> Any:
        """peft's; the adapter that is trained, from a checkpoint that has the file, as it was, in the same tensors."""
        path = os.path.join(str(model_id), FILE)
        trained = adapter_name == getattr(self.base_model, "trainable_adapter_name", None)
        if trained and not os.path.isfile(path) and os.path.isfile(os.path.join(str(model_id), "trainer_state.json")):
            warnings.warn(
                f"{model_id} has no {FILE}, which AdaLoraCallback writes: training does not go on from it as it was, "
                "but without importances and masked triplets",
                stacklevel=2,
            )
        if not trained or not os.path.isfile(path):
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
        save_file(tensors, path + ".tmp", metadata={_DIGEST: _digest(directory)})
        os.replace(path + ".tmp", path)


@torch.no_grad()
def restore_training(model: nn.Module, path: str) -> None:
    """Give a model what `save_training` wrote. Raises AdapterFileError if the file is damaged or of another model; the
    model is then as it was."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    directory, parameters = os.path.dirname(path), _trained(model)
    mine = {name: tuple(each.shape) for name, each in parameters.items()}
    header = {name: tuple(each.shape) for name, each in read_header(path, most_tensors(model)).items()}
    theirs = {name.removeprefix(_PARAMETER): each for name, each in header.items() if name.startswith(_PARAMETER)}
    if differing := sorted(mine.items() ^ theirs.items()):
        name = differing[0][0]
        raise AdapterFileError(
            f"{path} is of another model: {name} is {theirs.get(name, 'not there')}, and {mine.get(name, 'not there')} "
            "in the model; make the adapter with the configuration that the checkpoint has"
        )
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get(_DIGEST) != _digest(directory):
            raise AdapterFileError(
                f"{path} belongs to another save than {WEIGHTS} beside it, as of a run that was killed while it saved; "
                "give an earlier checkpoint, or delete the file to go on as peft does"
            )
    found, tuner = load_file(path), model.base_model
    _check_tables(path, found, tuner)
    for name, parameter in parameters.items():
        parameter.copy_(placed_as(found[_PARAMETER + name], parameter))
    devices = {name: parameter.device for name, parameter in tuner.model.named_parameters()}
    for table in _TABLES:
        read = {name: found[key] for key in found if (name := key.removeprefix(f"{table}.")) != key}
        setattr(tuner.rankallocator, table, {name: each.to(devices[name]) for name, each in read.items()})
    pattern = {name: found[key].bool().tolist() for key in found if (name := key.removeprefix(_PATTERN)) != key}
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = pattern or None


def _check_tables(path: str, found: dict[str, Tensor], tuner: nn.Module) -> None:
    """Raises AdapterFileError unless each table is of all triplets, or of none, and everything is finite."""
    adapter = tuner.trainable_adapter_name
    shapes = {n: p.shape for n, p in tuner.model.named_parameters() if "lora_" in n and adapter in n}
    known = {key for key in found if key.startswith(_PARAMETER)}
    for table in _TABLES:
        own = {name: each.shape for key, each in found.items() if (name := key.removeprefix(f"{table}.")) != key}
        if own and own != shapes:
            raise AdapterFileError(f"{path}: the table {table} is not of this model's triplets; it is damaged")
        known |= {f"{table}.{name}" for name in own}
    values = {name for name in shapes if "lora_E" in name}
    values |= {name.replace(f".{adapter}", "") for name in values}
    known |= {_PATTERN + name for name in values}
    if extra := sorted(found.keys() - known):
        raise AdapterFileError(f"{path}: {extra[0]} is nothing of this model's; it is damaged")
    if bad := [key for key, each in found.items() if not torch.isfinite(each).all()]:
        raise AdapterFileError(f"{path}: {bad[0]} has NaN or infinite values; give an earlier checkpoint")


def _digest(directory: str) -> str:
    """Of the adapter's weights beside the file."""
    with open(os.path.join(directory, WEIGHTS), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {plain_path(name): each for name, each in model.named_parameters() if each.requires_grad}
