"""The network that virtual tokens come out of (`prefix_projection`, P-tuning), which HF peft does not save: its
parameters in a file beside the adapter's, for training to go on from where it was."""

import warnings

import torch
from torch import nn

from fastpeft.configs import PeftConfig, PromptEncoderConfig
from fastpeft.errors import AdapterFileError
from fastpeft.files import AdapterFiles
from fastpeft.journal import ENCODER, SIDE
from fastpeft.mapping import tuner_of
from fastpeft.tuners.prefix_encoder import TABLE, PromptEncoders


def _encoder(model: nn.Module, name: str) -> nn.Module | None:
    holder = model._modules.get(PromptEncoders.NAME)
    return holder[name] if isinstance(holder, PromptEncoders) and name in holder else None


def has_network(model: nn.Module, name: str) -> bool:
    """Whether an adapter's virtual tokens come out of a network that is trained."""
    encoder = _encoder(model, name)
    return encoder is not None and encoder.projects


def encoder_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor] | None:
    """The parameters of an adapter's network by name, or what else its training needs; None if there is nothing."""
    tuner = tuner_of(model._fastpeft.configs[name])
    if hasattr(tuner, "training_tensors"):
        return tuner.training_tensors(model, name)
    encoder = _encoder(model, name)
    if encoder is None:
        return None
    if encoder.left_behind:
        warnings.warn(
            f"adapter {name!r} was loaded without the network that it came out of, and is saved without; load it with "
            "trainable=True to keep that",
            stacklevel=4,
        )
    return encoder.state_dict() if encoder.projects else None


def check_encoder(config: PeftConfig, found: AdapterFiles) -> None:
    """Raises AdapterFileError for a network beside an adapter that has none."""
    has_network = isinstance(config, PromptEncoderConfig) or getattr(config, "prefix_projection", False)
    if found.encoder is not None and not has_network and not hasattr(tuner_of(config), "fill_training"):
        raise AdapterFileError(
            f"{found.path} has {ENCODER}, and {config.peft_type.value} of this configuration has no network; delete it "
            f"and {SIDE}, or save the adapter again"
        )


def fill_encoder(model: nn.Module, name: str, found: AdapterFiles) -> None:
    """Copy the network's parameters in. Raises AdapterFileError unless they fit, and give the table in the file."""
    tuner = tuner_of(model._fastpeft.configs[name])
    if hasattr(tuner, "fill_training"):
        tuner.fill_training(model, name, found.encoder, found.path)
        return
    encoder = _encoder(model, name)
    own = encoder.state_dict()
    wanted, have = ({key: tuple(t.shape) for key, t in tensors.items()} for tensors in (own, found.encoder))
    if wanted != have:
        wrong = sorted(key for key in wanted.keys() | have.keys() if wanted.get(key) != have.get(key))
        raise AdapterFileError(
            f"{found.path}: the saved network does not fit the configuration: {wrong[0]} has shape "
            f"{have.get(wrong[0], 'none')}, expected {wanted.get(wrong[0], 'none')}"
        )
    encoder.load_state_dict(found.encoder)
    with torch.no_grad():
        table, saved = encoder.table().cpu(), found.tensors[TABLE].to(torch.float32)
        if not (table - saved).abs().max() <= 1e-3 * max(float(saved.abs().max()), 1e-30):
            raise AdapterFileError(
                f"{found.path}: the saved network does not give the saved {TABLE}; they are of different saves"
            )


def forget_encoder(model: nn.Module, name: str) -> None:
    """Note that the directory has a network, and the adapter, which is for inference, only the table."""
    encoder = _encoder(model, name)
    if encoder is not None:
        encoder.left_behind = True
