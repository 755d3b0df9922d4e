"""The tensors of an adapter under HF peft's names, out of a patched model and into one."""

import contextlib
import os

import torch
from torch import nn

from fastpeft.configs import LoraConfig, PeftConfig, PromptLearningConfig
from fastpeft.distributed import gathered, plain_path
from fastpeft.errors import PatchError
from fastpeft.in_place import is_bias
from fastpeft.patching import layers, state_of
from fastpeft.patterns import matches_name
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.prefix_encoder import PromptEncoders
from fastpeft.tuners.saved_modules import SavedModule, own_tensors
from fastpeft.untrusted import shown

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")  # the names for which HF peft also saves a targeted module's base weight


def only_adapter(state, adapter_name: str | None) -> str:
    """`adapter_name`, or the active adapter, or the only one. Raises PatchError if that is not one adapter."""
    if adapter_name is None:
        names = state.active if len(state.active) == 1 else tuple(state.configs)
        if len(names) != 1:
            raise PatchError(f"which adapter? There are {', '.join(map(repr, state.configs)) or 'none'}; name one")
        return names[0]
    if not isinstance(adapter_name, str) or adapter_name not in state.configs:
        raise PatchError(f"no adapter {shown(adapter_name)}; there are {', '.join(map(repr, state.configs)) or 'none'}")
    return adapter_name


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """The adapter's tensors, under exactly the keys of HF peft's file; the tensors are the live ones, but of a sharded
    model (`fully_shard`) whole copies, for which every process has to call.

    `adapter_name` None: the active adapter, or the only one. Raises PatchError if the model is not patched or the
    name is not one adapter's.
    """
    name = only_adapter(state_of(model), adapter_name)
    with whole_tensors(model, name):
        out = own_tensors_of(model, name)
        out.update({key: tensor.detach() for key, tensor in base_tensors(model, name).items()})
    return out


@contextlib.contextmanager
def whole_tensors(model: nn.Module, adapter_name: str, full: dict[str, torch.Tensor] | None = None):
    """`fastpeft.distributed.gathered` of all that belongs into an adapter's file."""
    own = [layer.parameters_of(adapter_name) for _, layer in layers(model) if adapter_name in layer._fastpeft.adapters]
    tensors = [tensor for held in (*own, base_tensors(model, adapter_name)) for tensor in held.values()]
    with gathered(model, tensors, full) as mesh:
        yield mesh


def own_tensors_of(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors that the adapter has itself, without those of the base, under the keys of HF peft's file."""
    config, out = state_of(model).configs[adapter_name], {}
    for path, layer in layers(model):
        if adapter_name in layer._fastpeft.adapters:
            for key, tensor in layer.file_tensors(adapter_name).items():
                out[file_key(config, path, key)] = tensor.detach()
    return out


def file_key(config: PeftConfig, path: str, key: str) -> str:
    """The name in HF peft's file of a layer's tensor: prompt learning has its table, and its heads, nearer the top."""
    path = plain_path(path)
    if not isinstance(config, PromptLearningConfig):
        return f"{PREFIX}{path}.{key}"
    return key if path == PromptEncoders.NAME else f"base_model.{path}.{key}"


def base_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors besides its own that belong into the adapter's file: trained biases, the weights of targeted
    `embed_tokens` and `lm_head`, and those of all embeddings if the vocabulary is not the base model's. Those of an
    adapted layer stand under its `base_layer`."""
    config = state_of(model).configs[adapter_name]
    out = whole_embeddings(model, config) if keeps_embeddings(model, config) else {}
    if not isinstance(config, LoraConfig):
        return out
    adapted = dict(layers(model))
    whole = tuple(f"{path}." for path, layer in adapted.items() if isinstance(layer, SavedModule))
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        trained = name in state_of(model).in_place and is_bias(name) and not name.startswith(whole)
        if trained and config.bias != "none":
            out[_base_key(path, leaf, adapted)] = _unmerged(adapted.get(path), leaf, parameter)
    for path in targeted_embeddings(model, config):
        for leaf, parameter in adapted[path]._parameters.items():
            if parameter is not None:
                out[f"{PREFIX}{path}.base_layer.{leaf}"] = _unmerged(adapted[path], leaf, parameter)
    if config.bias == "all":
        for path, layer in adapted.items():
            if isinstance(layer, SavedModule):
                out.update(_biases_again(path, layer, adapter_name))
    return out


def _biases_again(path: str, layer: SavedModule, adapter_name: str) -> dict[str, torch.Tensor]:
    """The biases of a module that is trained whole, as bias="all" has them in HF's file besides: its rule takes those
    of the original and of the copy under the names that these have in memory, of which the adapter's name is taken
    out only before the last part."""
    held = {f"{path}.original_module.{key}": value for key, value in own_tensors(layer).items()}
    trained = layer.parameters_of(adapter_name) if adapter_name in layer._fastpeft.adapters else {}
    for key, value in trained.items():
        held[f"{path}.modules_to_save.{adapter_name + '.' if '.' in key else ''}{key}"] = value
    return {PREFIX + key: value for key, value in held.items() if is_bias(key)}


def _unmerged(layer: nn.Module | None, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if layer is None else layer._fastpeft.unmerged.get(leaf, tensor)


def _base_key(path: str, leaf: str, adapted: dict) -> str:
    inner = "base_layer." if path in adapted else ""
    return f"{PREFIX}{path}.{inner}{leaf}"


def embeddings(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings of a transformers model, as far as it has them."""
    getters = (getattr(model, f"get_{which}_embeddings", None) for which in ("input", "output"))
    return [found for get in getters if callable(get) and (found := get()) is not None]


def keeps_embeddings(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the embeddings belong into an adapter's file: those of a file have replaced the model's, or, as in HF
    peft, the vocabulary has another size than that of the base model in the local directory it was loaded from."""
    replaced = getattr(model.__dict__.get("_fastpeft"), "in_place", {})
    ends = {f"{path}.{leaf}" for path, end in ends_of(model) for leaf in end._parameters if leaf != "bias"}
    if ends & replaced.keys():
        return True
    base, size = config.base_model_name_or_path, getattr(getattr(model, "config", None), "vocab_size", None)
    if not size or not base or not os.path.isfile(os.path.join(base, "config.json")):
        return False
    return type(model.config).from_pretrained(base).vocab_size != size


def whole_embeddings(model: nn.Module, config: PeftConfig) -> dict[str, torch.Tensor]:
    """The parameters of the input and output embeddings, by their names in HF peft's file, if none of them is a target
    of the adapter: of those that are the file has the weights anyway."""
    if isinstance(config, LoraConfig) and targeted_embeddings(model, config):
        return {}
    return {
        file_key(config, path, leaf): _unmerged(end if isinstance(end, AdapterLayer) else None, leaf, parameter)
        for path, end in ends_of(model)
        for leaf, parameter in end._parameters.items()
        if parameter is not None and not isinstance(end, SavedModule)
    }


def ends_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the input and output embeddings."""
    ends = {id(end) for end in embeddings(model)}
    return [(path, module) for path, module in model.named_modules() if id(module) in ends]


def targeted_embeddings(model: nn.Module, config) -> list[str]:
    """Paths of the input and output embeddings with a LoRA, if target_modules names one of EMBEDDINGS: HF peft then
    saves the base weights of both. It looks for the names themselves, so a whole path does not count."""
    named = config.target_modules
    if isinstance(named, str):
        found = any(path.rpartition(".")[2] in EMBEDDINGS and matches_name(named, path) for path, _ in layers(model))
    else:
        found = any(name in named for name in EMBEDDINGS)
    ends = {id(module) for module in embeddings(model)} if found else ()
    return [path for path, layer in layers(model) if id(layer) in ends and hasattr(layer, "factors")]
