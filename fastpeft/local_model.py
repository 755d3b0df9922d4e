"""A model from a local transformers directory, for the commands; nothing is ever fetched."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fastpeft.configs import TaskType
from fastpeft.errors import FastpeftError

# Task -> the class of transformers that loads its models, and transformers' table of these models.
_LOADERS = {
    TaskType.CAUSAL_LM: ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    TaskType.SEQ_2_SEQ_LM: ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    TaskType.SEQ_CLS: ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    TaskType.TOKEN_CLS: ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    TaskType.QUESTION_ANS: ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
}


def task_of(architecture: str | None) -> TaskType:
    """The task that a model of this class is for; a causal model's for a class that transformers has in no table."""
    from transformers.models.auto import modeling_auto

    for task, (_, table) in _LOADERS.items():
        names = getattr(modeling_auto, table).values()
        if any(architecture in ((name,) if isinstance(name, str) else name) for name in names):
            return task
    return TaskType.CAUSAL_LM


def load_causal_model(path: Path, device: torch.device) -> nn.Module:
    """`load_model` of a causal language model, whatever the directory says it is."""
    return load_model(path, device, TaskType.CAUSAL_LM)


def load_model(path: Path, device: torch.device, task: TaskType | None = None) -> nn.Module:
    """The model in eval mode, in the dtype of its files; `task` None: of the task that its configuration names.

    Raises FastpeftError if there is none, it cannot be loaded, or its files lack some of its weights.
    """
    if not (path / "config.json").is_file():
        raise FastpeftError(f"--model {path}: no config.json there; give a directory that save_pretrained wrote")
    import transformers

    with loading(path, "model"):
        if task is None:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            task = task_of((config.architectures or [None])[0])
        model, found = getattr(transformers, _LOADERS[task][0]).from_pretrained(
            path, local_files_only=True, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    if missing := sorted(found["missing_keys"]):
        raise FastpeftError(
            f"--model {path}: no {type(model).__name__}, the files lack {len(missing)} of its weights: {missing[0]}, …"
            "; give a directory that save_pretrained wrote"
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
