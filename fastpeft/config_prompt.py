"""The configurations of the methods that train virtual tokens: in front of the input, in attention, or both."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from fastpeft.config_base import (
    PeftConfig,
    PeftType,
    in_order,
    is_count,
    is_names,
    is_number,
    one_of,
    own,
    refuse,
    require_bool,
    require_saved_names,
)

# More of anything than a model has: what a damaged or hostile file may ask for.
MOST = 2**20


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the methods with virtual tokens have in common. All but num_virtual_tokens is taken from the model if None.

    num_transformer_submodules: how many stacks the table is laid out for; None is 2 for sequence-to-sequence tasks, 1
    for others. With 2, a prefix of an even number of layers leaves half of its table unused, and two layers share each
    pair of blocks; with 1 each layer of the decoder has a pair of its own, in peft as here.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def normalise(self) -> None:
        super().normalise()
        if is_names(self.modules_to_save):
            self.modules_to_save = in_order(self.modules_to_save)

    def validate(self) -> None:
        super().validate()
        require_count(self, "num_virtual_tokens", "the number of virtual tokens", needed=True)
        require_count(self, "token_dim", "the width of a virtual token in one layer's keys")
        require_count(self, "num_attention_heads", "the number of heads that the keys have")
        require_count(self, "num_layers", "the number of layers")
        stacks = self.num_transformer_submodules
        if stacks is not None and not (is_count(stacks) and stacks <= 2):
            why = "must be 1, 2 (sequence-to-sequence) or None, which takes it from task_type"
            refuse("num_transformer_submodules", stacks, why)
        require_saved_names(self)


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (Li & Liang, arXiv 2101.00190), with peft's fields and four of our own.

    num_virtual_tokens: how many keys and values each layer gets in front of the real ones.
    prefix_projection: the prefix comes out of a small network of width encoder_hidden_size, not out of a table.
    init_weights: None is random, "zero" makes the prefix zeros (which still draw attention).
    prefix_window: in layers with a sliding window the prefix slides out as peft's does ("slide"), or stays ("pin").
    encoder_prefix, cross_prefix: of a sequence-to-sequence model, also the encoder or the cross-attention gets one.
    legacy_bloom_layout: the tensors to be loaded pair keys and values as peft did for BLOOM until transformers 4.44.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    prefix_window: str = own("slide")
    encoder_prefix: bool = own(False)
    cross_prefix: bool = own(False)
    legacy_bloom_layout: bool = own(False, stored=False)  # what is saved has today's layout

    method: ClassVar[PeftType | None] = PeftType.PREFIX_TUNING
    tuner: ClassVar[str] = "fastpeft.tuners.prefix_injection"

    def validate_new(self) -> None:
        super().validate_new()
        if self.legacy_bloom_layout:
            refuse("legacy_bloom_layout", True, "it is for loading files of that layout; leave it out")

    def validate(self) -> None:
        super().validate()
        heads = self.num_attention_heads
        if self.token_dim is not None and heads is not None and self.token_dim % heads:
            refuse("token_dim", self.token_dim, f"must be a multiple of num_attention_heads={heads}")
        if self.init_weights is not None and not one_of(self.init_weights, ["zero"]):
            refuse("init_weights", self.init_weights, "must be None (random) or 'zero'")
        require_count(self, "encoder_hidden_size", "the width of the network that prefix_projection=True makes")
        if not one_of(self.prefix_window, ["slide", "pin"]):
            refuse("prefix_window", self.prefix_window, "must be 'slide' (as peft) or 'pin'")
        for name in ("prefix_projection", "encoder_prefix", "cross_prefix", "legacy_bloom_layout"):
            require_bool(self, name)


class PromptTuningInit(str, Enum):
    """How a prompt's rows begin: at random, as those of random tokens of the vocabulary, or as those of a text."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(str, Enum):
    """The network that P-tuning's rows come out of."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (Lester et al., arXiv 2104.08691), with peft's fields and one of our own.

    num_virtual_tokens: how many rows stand in front of the input's embeddings.
    prompt_tuning_init: RANDOM, SAMPLE_VOCAB, or TEXT, which needs prompt_tuning_init_text and tokenizer_name_or_path;
    tokenizer_kwargs are for loading that tokenizer, whose own code is never run.
    virtual_logits: the model's result keeps the places of the virtual tokens, as peft's does.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None
    virtual_logits: bool = own(False)

    method: ClassVar[PeftType | None] = PeftType.PROMPT_TUNING
    tuner: ClassVar[str] = "fastpeft.tuners.prompt_injection"

    def normalise(self) -> None:
        super().normalise()
        if one_of(self.prompt_tuning_init, PromptTuningInit):
            self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        if isinstance(self.tokenizer_kwargs, Mapping):
            self.tokenizer_kwargs = dict(self.tokenizer_kwargs)

    def validate(self) -> None:
        super().validate()
        init, kwargs = self.prompt_tuning_init, self.tokenizer_kwargs
        if not one_of(init, PromptTuningInit):
            refuse("prompt_tuning_init", init, "must be 'RANDOM', 'SAMPLE_VOCAB' or 'TEXT'")
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                refuse(name, value, "must be a string, or None")
            if init == PromptTuningInit.TEXT and value is None:
                refuse(name, None, "prompt_tuning_init='TEXT' needs it")
        if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs)):
            refuse("tokenizer_kwargs", kwargs, "must be a dict with string keys, or None")
        if kwargs and init != PromptTuningInit.TEXT:
            refuse("tokenizer_kwargs", kwargs, "is for prompt_tuning_init='TEXT' alone; leave it out")
        require_bool(self, "virtual_logits")


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (Liu et al., arXiv 2103.10385), with peft's fields and one of our own.

    num_virtual_tokens: how many rows stand in front of the input's embeddings.
    encoder_reparameterization_type: "MLP", three linear layers of width encoder_hidden_size, or "LSTM", bidirectional,
    of encoder_num_layers layers with encoder_dropout between them, and two linear ones.
    virtual_logits: the model's result keeps the places of the virtual tokens, as peft's does.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    virtual_logits: bool = own(False)

    method: ClassVar[PeftType | None] = PeftType.P_TUNING
    tuner: ClassVar[str] = "fastpeft.tuners.prompt_injection"

    def normalise(self) -> None:
        super().normalise()
        if one_of(self.encoder_reparameterization_type, PromptEncoderReparameterizationType):
            kind = PromptEncoderReparameterizationType(self.encoder_reparameterization_type)
            self.encoder_reparameterization_type = kind

    def validate(self) -> None:
        super().validate()
        kind, dropout, layers = self.encoder_reparameterization_type, self.encoder_dropout, self.encoder_num_layers
        if not one_of(kind, PromptEncoderReparameterizationType):
            refuse("encoder_reparameterization_type", kind, "must be 'MLP' or 'LSTM'")
        require_count(self, "encoder_hidden_size", "the width of the network")
        require_count(self, "encoder_num_layers", "the number of the LSTM's layers", needed=True)
        if not is_number(dropout) or not 0 <= dropout < 1:
            refuse("encoder_dropout", dropout, "must be a number from 0 to below 1")
        require_bool(self, "virtual_logits")
        if kind == PromptEncoderReparameterizationType.MLP and (layers != 2 or dropout):
            what = f"encoder_num_layers={layers} and encoder_dropout={dropout}"
            warnings.warn(f"{what} are the LSTM's; the MLP has three layers and no dropout", stacklevel=4)


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter (Zhang et al., arXiv 2303.16199), with peft's fields and one of our own.

    target_modules: what the attention modules are called, as in "self_attn"; None takes the model family's name.
    adapter_len: how many virtual tokens a layer gets; adapter_layers: how many layers, counted from the top.
    modules_to_save: modules trained whole besides. None is the head of the task; [] is nothing, as in peft, which has
    no such field here and leaves heads untrained.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None
    modules_to_save: list[str] | None = own(None)

    method: ClassVar[PeftType | None] = PeftType.ADAPTION_PROMPT
    tuner: ClassVar[str] = "fastpeft.tuners.adaption_prompt_injection"
    of_peft_s_files: ClassVar[dict] = {"modules_to_save": []}

    def normalise(self) -> None:
        super().normalise()
        if is_names(self.modules_to_save):
            self.modules_to_save = in_order(self.modules_to_save)

    def validate(self) -> None:
        super().validate()
        name = self.target_modules
        if name is not None and not (isinstance(name, str) and name and "." not in name):
            refuse("target_modules", name, "must be the name of the attention modules, as in 'self_attn', or None")
        require_count(self, "adapter_len", "the number of virtual tokens in a layer", needed=True)
        require_count(self, "adapter_layers", "the number of adapted layers (from the top)", needed=True)
        require_saved_names(self)


def require_count(config: PeftConfig, name: str, meaning: str, needed: bool = False) -> None:
    """Raises ConfigError unless the field is an int from 1 to MOST, or None where it may be."""
    value = getattr(config, name)
    if value is None and not needed:
        return
    if not is_count(value):
        refuse(name, value, f"{meaning} must be an int of at least 1{'' if needed else ', or None'}")
    if value > MOST:
        refuse(name, value, f"{meaning} can be at most {MOST}")
