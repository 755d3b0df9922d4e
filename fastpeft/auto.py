"""An adapter's directory and the base model that it names, loaded together: peft's `AutoPeftModelFor...`.

model = fastpeft.AutoPeftModelForCausalLM.from_pretrained("my-adapter")
"""

import os
from typing import ClassVar

from fastpeft.adapters import load_adapter
from fastpeft.configs import PeftConfig, TaskType
from fastpeft.errors import AdapterFileError, ConfigError
from fastpeft.untrusted import shown


class AutoPeftModel:
    """For an adapter without a task: the base model's class is what the configuration says of it."""

    task: ClassVar[TaskType | None] = None
    auto: ClassVar[str] = ""  # transformers' class that loads the base model

    def __init__(self, *args, **kwargs):
        raise ConfigError(f"{type(self).__name__} is not made: call {type(self).__name__}.from_pretrained(directory)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, adapter_name: str = "default", is_trainable: bool = False,
        autocast_adapter_dtype: bool = True, embeddings: bool = False, **kwargs,
    ):  # fmt: skip
        """The base model that a local directory's adapter_config.json names, patched with the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's directory. If it has a tokenizer of more tokens than the base
                model has embeddings, these are made more, as peft does it.
            adapter_name, is_trainable, autocast_adapter_dtype, embeddings: as `load_adapter`'s.
            **kwargs: for the base model's `from_pretrained` (dtype, device_map, …), which is transformers' and finds
                base models as it does.

        Raises:
            ConfigError: the configuration names no base model, or another task; AdapterFileError and others as
            `load_adapter`.
        """
        directory = pretrained_model_name_or_path
        config = PeftConfig.from_pretrained(directory)
        if config.task_type != cls.task:
            has = "no task_type" if config.task_type is None else f"task_type={config.task_type.value!r}"
            raise ConfigError(f"{directory} has {has}; {cls.__name__} is for {_name(cls.task)}")
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"{directory} names no base model (base_model_name_or_path); load it, and "
                "fastpeft.load_adapter(model, directory)"
            )
        kwargs.setdefault("revision", config.revision)
        model = cls._base_class(config, directory).from_pretrained(config.base_model_name_or_path, **kwargs)
        _make_room(model, directory)
        return load_adapter(
            model, directory, adapter_name=adapter_name, trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype, embeddings=embeddings,
        )  # fmt: skip

    @classmethod
    def _base_class(cls, config: PeftConfig, directory) -> type:
        import transformers

        if cls.auto:
            return getattr(transformers, cls.auto)
        mapping = config.auto_mapping or {}
        name, library = mapping.get("base_model_class"), str(mapping.get("parent_library"))
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if library.partition(".")[0] != "transformers" or not hasattr(found, "from_pretrained"):
            raise ConfigError(
                f"{directory}: auto_mapping={shown(config.auto_mapping)} names no model of transformers; load the "
                "base model, and fastpeft.load_adapter(model, directory)"
            )
        return found


def _name(task: TaskType | None) -> str:
    return "adapters without one" if task is None else task.value


def _make_room(model, directory) -> None:
    """Make the embeddings as many as the tokens of a tokenizer that lies beside the adapter, if they are fewer."""
    if not os.path.isfile(os.path.join(directory, "tokenizer_config.json")):
        return
    from transformers import AutoTokenizer

    try:  # a tokenizer's own code is never run for its size's sake
        count = len(AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True))
    except Exception as error:  # of many kinds, as there are many kinds of tokenizers and of damage to their files
        raise AdapterFileError(
            f"{directory}: the tokenizer beside the adapter, which says how many tokens there are, cannot be read "
            f"({type(error).__name__}: {shown(str(error))}); load the model, resize its embeddings, and "
            "fastpeft.load_adapter(model, directory)"
        ) from error
    if count > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(count)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For `task_type="CAUSAL_LM"`."""

    task, auto = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For `task_type="SEQ_2_SEQ_LM"`."""

    task, auto = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For `task_type="SEQ_CLS"`."""

    task, auto = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For `task_type="TOKEN_CLS"`."""

    task, auto = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For `task_type="QUESTION_ANS"`."""

    task, auto = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For `task_type="FEATURE_EXTRACTION"`."""

    task, auto = TaskType.FEATURE_EXTRACTION, "AutoModel"
