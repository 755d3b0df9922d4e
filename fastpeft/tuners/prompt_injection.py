"""The part of prompt tuning and P-tuning in patching: the plan, and the injection that cannot fail for what the plan
has checked."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpeft.configs import PromptEncoderConfig, PromptLearningConfig, PromptTuningConfig, refuse
from fastpeft.errors import ConfigError, TargetError
from fastpeft.prefix_geometry import fill_prompt_dims, geometry
from fastpeft.targets import saved_modules
from fastpeft.tuners.layer import AdapterLayer, attach, offloaded_to
from fastpeft.tuners.prefix_encoder import TABLE, PromptEncoders
from fastpeft.tuners.prompt_call import argument_names, most_positions
from fastpeft.tuners.prompt_encoder import PromptNetwork, PromptTable
from fastpeft.tuners.prompt_layer import PromptedEmbedding, PromptedEncoder
from fastpeft.tuners.saved_modules import SavedModule, check_apart, check_saved, own_tensors


@dataclass(frozen=True)
class Plan:
    """What a prompt will touch: (path, embedding, whether it is a decoder's behind an encoder), the encoder if there is
    one, and the modules trained whole."""

    model: nn.Module
    config: PromptLearningConfig
    embeddings: tuple[tuple[str, nn.Module, bool], ...]
    encoder: nn.Module | None
    saved: tuple[tuple[str, nn.Module], ...]
    resumes: bool = False
    targets = ()

    @property
    def rows(self) -> int:
        """Of the table: as in HF peft, a second half for a decoder is there and never read."""
        return self.config.num_virtual_tokens * self.config.num_transformer_submodules

    def resuming(self) -> "Plan":
        """The same for an adapter whose network is there to be filled."""
        return dataclasses.replace(self, resumes=True)

    def in_today_s_layout(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors as they are: there has been one layout only."""
        return tensors

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors in the adapter's file."""
        out = {TABLE: (self.rows, self.config.token_dim)}
        for name, module in self.saved:
            out.update({f"base_model.{name}.{key}": tuple(t.shape) for key, t in own_tensors(module).items()})
        return out


def plan(model: nn.Module, config: PromptLearningConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError or ConfigError."""
    encoder, embeddings = _embeddings(model)
    config = _filled(model, config, embeddings[0][1])
    for path, module, _ in embeddings:
        if isinstance(module, AdapterLayer) and not isinstance(module, PromptedEmbedding):
            raise TargetError(f"{path} carries another adapter, and a prompt stands in front of it; leave it out there")
    saved = tuple((name, model.get_submodule(name)) for name in saved_modules(model, config))
    check_apart(model, saved, [path for path, _, _ in embeddings], "a prompt in front of its tokens")
    check_saved(model, saved)
    _check_positions(model, config, embeddings[0][0])
    return Plan(model, config, tuple(embeddings), encoder, saved)


def _embeddings(model: nn.Module) -> tuple[nn.Module | None, list[tuple[str, nn.Module, bool]]]:
    """The encoder of a sequence-to-sequence model, if it is one, and the embeddings of tokens."""
    name = type(model).__name__
    if not callable(getattr(model, "get_input_embeddings", None)):
        raise TargetError(
            f"{name} is not a transformers model: it does not say what its embedding of tokens is; use LoRA"
        )
    pair = getattr(model.config, "is_encoder_decoder", False)
    stacks = [model.get_encoder(), model.get_decoder()] if pair else [model]
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for stack in stacks:
        try:
            module = stack.get_input_embeddings()
        except NotImplementedError:
            module = None
        if not isinstance(module, nn.Embedding) or id(module) not in paths:
            kind = f"a {type(module).__name__}" if module is not None else "none"
            raise TargetError(
                f"{name} cannot carry a prompt: virtual tokens stand in front of tokens, and its input goes through "
                f"{kind}, not through an embedding of tokens; use LoRA or prefix tuning"
            )
        found.append((paths[id(module)], module, bool(found)))
    chosen = {id(module) for _, module, _ in found}
    tied = {id(module._parameters.get("weight")): decodes for _, module, decodes in reversed(found)}
    for path, module in model.named_modules():  # T5's encoder looks tokens up in one that shares the model's weight
        weight = id(module._parameters.get("weight"))
        if isinstance(module, nn.Embedding) and id(module) not in chosen and weight in tied:
            found.append((path, module, tied[weight]))
    return (stacks[0] if pair else None), list({id(each[1]): each for each in reversed(found)}.values())[::-1]


def _filled(model: nn.Module, config: PromptLearningConfig, embedding: nn.Module) -> PromptLearningConfig:
    """A copy with the sizes filled in. A row is as wide as the embedding, also where a model widens that (OPT-350m,
    ALBERT), for which HF peft takes the hidden size and fails."""
    width = embedding.embedding_dim
    usual = config.token_dim is None or config.token_dim == width
    asked = dataclasses.replace(config, token_dim=geometry(model).width or width if usual else config.token_dim)
    filled = fill_prompt_dims(model, asked)
    filled.token_dim = width
    hidden = config.encoder_hidden_size if isinstance(config, PromptEncoderConfig) else None
    if isinstance(config, PromptEncoderConfig):
        filled.encoder_hidden_size = width if hidden is None else hidden
    return filled


def _check_positions(model: nn.Module, config: PromptLearningConfig, path: str) -> None:
    """Raises ConfigError if the model has a place for no token behind the prompt."""
    most = most_positions(model, path)
    if most is not None and config.num_virtual_tokens >= most:
        refuse(
            "num_virtual_tokens",
            config.num_virtual_tokens,
            f"this {type(model).__name__} has a table of {most} positions, and the tokens behind the prompt need some",
        )


def _text_tokens(config: PromptTuningConfig, rows: int, embedding: nn.Module) -> list[int]:
    """The ids of prompt_tuning_init_text, repeated or cut to the table's rows. Raises ConfigError."""
    from transformers import AutoTokenizer

    # A tokenizer's own code is never run for a configuration's sake.
    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    except Exception as error:  # of many kinds, as there are many kinds of tokenizers and of damage to their files
        raise ConfigError(
            f"tokenizer_name_or_path={config.tokenizer_name_or_path!r}: no tokenizer there that can be used ({error}); "
            "give the folder of the model's tokenizer"
        ) from error
    if not ids:
        raise ConfigError(
            f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens; give a longer text"
        )
    if max(ids) >= embedding.num_embeddings:
        raise ConfigError(
            f"tokenizer_name_or_path={config.tokenizer_name_or_path!r}: its token {max(ids)} is none of the model's "
            f"{embedding.num_embeddings}; give the model's own tokenizer"
        )
    return (ids * math.ceil(rows / len(ids)))[:rows]


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Build what the prompt's rows come from, and let the embeddings know virtual tokens. Without `init` it is a table
    to be filled from a file. A prompt is always fp32, as HF peft's. Raises ConfigError, before anything is touched, if
    there is no text to begin with."""
    first = plan.embeddings[0][1]
    encoder = _encoder(plan, first, init)
    PromptEncoders.of(plan.model, state).add_adapter(name, encoder.to(offloaded_to(first) or first.weight.device))
    encoder.train(plan.model.training)
    attach_embeddings(plan, encoder, name, state)
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)


def attach_embeddings(plan: Plan, encoder: nn.Module, name: str, state) -> None:
    """Let the embeddings know virtual tokens, whose rows come from `encoder`, whoever holds that."""
    encoder.most = most_positions(plan.model, plan.embeddings[0][0])
    argument_names(state.original_class)  # which are found here, before torch.compile asks for them
    for _, module, decodes in plan.embeddings:
        if not isinstance(module, AdapterLayer):
            attach(module, PromptedEmbedding, state)
        module._fastpeft.adapters[name] = decodes
    if plan.encoder is not None:
        if not isinstance(plan.encoder, AdapterLayer):
            attach(plan.encoder, PromptedEncoder, state)
        plan.encoder._fastpeft.adapters[name] = encoder
        argument_names(plan.encoder._fastpeft.original_class)


def _encoder(plan: Plan, embedding: nn.Module, init: bool) -> nn.Module:
    """Drawn in HF peft's order: the table, the network, then tokens."""
    config, rows = plan.config, plan.rows
    sizes = (rows, config.token_dim, config.num_virtual_tokens)
    if isinstance(config, PromptEncoderConfig) and (init or plan.resumes):
        kind, hidden = str(config.encoder_reparameterization_type.value), config.encoder_hidden_size
        return PromptNetwork(*sizes, kind, hidden, config.encoder_num_layers, config.encoder_dropout)
    encoder = PromptTable(*sizes)
    if not init or not isinstance(config, PromptTuningConfig):
        return encoder
    tokens = _text_tokens(config, rows, embedding) if config.prompt_tuning_init == "TEXT" else None
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        tokens = torch.randint(0, embedding.num_embeddings, (rows,), dtype=torch.long).tolist()
    if tokens is not None:
        with torch.no_grad():
            ids = torch.tensor(tokens, device=offloaded_to(embedding) or embedding.weight.device)
            # The module's own rows, scaled where it scales; none of a prompt that is there already.
            read = embedding.base_forward if isinstance(embedding, AdapterLayer) else embedding
            encoder.embedding.weight.copy_(read(ids))
    return encoder
