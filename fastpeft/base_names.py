"""Whether an adapter was trained on the model that it is loaded into, as far as their names can tell."""

import os
import re
import warnings
from typing import Any

from torch import nn

from fastpeft.errors import FastpeftError
from fastpeft.files import AdapterFiles, Validate, read_adapter
from fastpeft.filling import most_tensors
from fastpeft.untrusted import shown

_FIELD = "base_model_name_or_path"


def _last(name: str) -> str:
    """What a model is called: the last part of its path or of its name on the hub, as there not minding capitals; of a
    path into the Hugging Face cache, models--org--name/snapshots/revision, that of the repository."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rpartition("--")[2].casefold()
    return parts[-1].casefold() if parts and parts[-1] != ".." else ""


def _two_bases(theirs: object, ours: object) -> str | None:
    """That a model is called otherwise than the one that an adapter was trained on; None if both are called the same,
    or one has no name, as a model that was made from a configuration."""
    if not isinstance(theirs, str) or not isinstance(ours, str):
        return None
    names = {_last(theirs), _last(ours)}
    if len(names) == 1 or "" in names:
        return None
    return f"the adapter was trained on {shown(theirs)}, and this model is {shown(ours)}"


def read_for(model: nn.Module, directory: str | os.PathLike[str], validate: Validate) -> AdapterFiles:
    """`read_adapter`, with no more tensors than the model could need. If the adapter was trained on a model of another
    name, an error of `validate` says so too, and where there is none there is a warning; HF peft is silent."""
    ours = getattr(model, "name_or_path", None)

    def named(raw_config: dict[str, Any], *found) -> None:
        try:
            validate(raw_config, *found)
        except FastpeftError as error:
            if words := _two_bases(raw_config.get(_FIELD), ours):
                error.args = (f"{error} (Note that {words}.)",)
            raise

    found = read_adapter(directory, named, most_tensors(model))
    if words := _two_bases(found.config.get(_FIELD), ours):
        warnings.warn(f"{found.path}: {words}; names and shapes fit, but is it the right base model?", stacklevel=3)
    return found
