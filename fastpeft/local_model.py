"""A causal language model from a local transformers directory, for the commands; nothing is ever fetched."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fastpeft.errors import FastpeftError


def load_causal_model(path: Path, device: torch.device) -> nn.Module:
    """The model in eval mode, in the dtype of its files.

    Raises FastpeftError if there is none, it cannot be loaded, or its files lack some of its weights.
    """
    if not (path / "config.json").is_file():
        raise FastpeftError(f"--model {path}: no config.json there; give a directory that save_pretrained wrote")
    from transformers import AutoModelForCausalLM

    with loading(path, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    if missing := sorted(found["missing_keys"]):
        raise FastpeftError(
            f"--model {path}: no {type(model).__name__}, the files lack {len(missing)} of its weights: {missing[0]}, …"
        )
    return model.to(device).eval()


@contextlib.contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """transformers and the readers beneath it raise nearly anything at a damaged directory."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FastpeftError(f"--model {path}: its {what} cannot be loaded: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and advice, and what it says to peft about names on their way out."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
