"""What an adapter's file may hold for a model, and where each tensor of it goes.

`places_in_file` is the only list: a header is checked against it before the data is read, and `fill` writes by it and
nothing else.
"""

import re
from typing import NamedTuple

import torch
from torch import nn

from fastpeft.configs import LoraConfig, PeftConfig, as_config
from fastpeft.errors import AdapterFileError, ConfigError, PatchError
from fastpeft.files import OPTIONS
from fastpeft.in_place import note
from fastpeft.journal import SIDE
from fastpeft.patching import added_names, layers, state_of
from fastpeft.state import PREFIX, embeddings, ends_of, file_key, own_tensors_of
from fastpeft.tuners.lora import LoraLayer
from fastpeft.tuners.lora_kinds import layer_class
from fastpeft.tuners.saved_modules import SavedModule, own_tensors
from fastpeft.untrusted import shown

# What a tensor of a file is. OWN: the adapter's; it must be there. BASE: replaces a parameter of the base model.
# TWIN: repeats another tensor of the file. SPARE: HF peft writes it, and nothing reads it.
OWN, BASE, TWIN, SPARE = "own", "base", "twin", "spare"


# What stands before a targeted module's parameter: nothing in files of peft 0.2 to 0.6, whose layers were no wrappers.
_INNER = ("base_layer.", "")


class Place(NamedTuple):
    """A tensor's shape and use; `of`: the base model's parameter that it replaces, or the tensor that it repeats."""

    shape: tuple[int, ...]
    use: str = OWN
    of: str = ""


def config_of(raw_config: dict, side: dict | None) -> PeftConfig:
    """The configuration that a directory's two files describe. Raises ConfigError, and AdapterFileError for an
    hf_quirks of the side file that is none."""
    config, side = as_config(raw_config), side or {}
    if not isinstance(side.get("hf_quirks", False), bool):
        raise AdapterFileError(f"{SIDE} has hf_quirks={shown(side['hf_quirks'])}; it must be true or false")
    options = side.get(OPTIONS) or {}
    if not isinstance(options, dict):
        raise ConfigError(f"the {OPTIONS} of {SIDE} must be an object, not {shown(options)}; delete the file")
    return config.with_side_values({**config.of_peft_s_files, **options})


FEW_TENSORS = 2_000  # of any model; they are read in less than 50 ms


def most_tensors(model: nn.Module) -> int:
    """More tensors than a file for the model may hold, so that one of a larger model is still told what does not fit.

    A targeted module has up to six: A, B, its bias, E or a magnitude, the module's own weight and bias. A module that
    is trained whole has each of its parameters up to three times.
    """
    modules = sum(1 for _ in model.modules())
    tensors = sum(len(module._parameters) + len(module._buffers) for module in model.modules())
    return max(FEW_TENSORS, 6 * modules + 3 * tensors)


def places_in_file(model: nn.Module, plan, embeddings: bool = False) -> dict[str, Place]:
    """Every tensor that the file of a planned adapter may hold, by its name there.

    Base weights are accepted only where the configuration declares their modules: biases with `bias`, and the weights
    of targeted embeddings, which HF peft saves by default or on request. With `embeddings`, those of the others too.
    """
    out = {key: Place(tuple(shape)) for key, shape in plan.file_shapes().items()}
    if embeddings:
        out = {**_other_embeddings(model, plan), **out}
    if not isinstance(plan.config, LoraConfig):
        return out
    targeted = {target.name: target.module for target, _, _ in plan.targets}
    places = _embedding_places(model, targeted)
    if plan.config.bias == "lora_only":
        biases = {path: module.bias for path, module in targeted.items() if getattr(module, "bias", None) is not None}
        for inner in _INNER:
            places.update({f"{PREFIX}{path}.{inner}bias": _base(bias, f"{path}.bias") for path, bias in biases.items()})
    elif plan.config.bias == "all":
        saved = dict(plan.saved)
        places.update(_bias_places(model, targeted, saved))
        saved.update({path: layer for path, layer in layers(model) if isinstance(layer, SavedModule)})
        for path, module in saved.items():
            places.update(_repeated_biases(path, module, path in dict(plan.saved)))
    return {**places, **out}


def _base(parameter: torch.Tensor, name: str) -> Place:
    return Place(tuple(parameter.shape), BASE, name)


def _other_embeddings(model: nn.Module, plan) -> dict[str, Place]:
    """The input and output embeddings that the adapter neither targets nor trains whole; of two that share a weight
    the second repeats it."""
    targets, saved = getattr(plan, "targets", ()), getattr(plan, "saved", ())
    taken = {id(target.module) for target, *_ in targets} | {id(module) for _, module in saved}
    out, first = {}, {}
    for path, end in ends_of(model):
        for leaf, parameter in end._parameters.items():
            if parameter is not None and id(end) not in taken:
                key = file_key(plan.config, path, leaf)
                before = first.setdefault(id(parameter), key)
                out[key] = _base(parameter, f"{path}.{leaf}")
                if before != key:
                    out[key] = Place(tuple(parameter.shape), TWIN, before)
    return out


def _embedding_places(model: nn.Module, targeted: dict[str, nn.Module]) -> dict[str, Place]:
    """The weights of targeted input and output embeddings. With HF peft's save_embedding_layers=True one that shares
    its weight with a targeted one, and is none itself, is in the file too."""
    out, ends = {}, embeddings(model)
    for path, module in targeted.items():
        if any(module is end for end in ends):
            held = {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}
            out.update(
                {f"{PREFIX}{path}.base_layer.{leaf}": _base(each, f"{path}.{leaf}") for leaf, each in held.items()}
            )
    names = {id(module): path for path, module in model.named_modules()}
    owners = {id(model.get_parameter(place.of)): key for key, place in out.items() if key.endswith(".weight")}
    for end in ends:
        path, key = names.get(id(end)), owners.get(id(end._parameters.get("weight")))
        if path is not None and path not in targeted and key is not None:
            out[f"{PREFIX}{path}.weight"] = Place(out[key].shape, TWIN, key)
    return out


def _bias_places(model: nn.Module, targeted: dict[str, nn.Module], saved: dict[str, nn.Module]) -> dict[str, Place]:
    """What `bias="all"` puts into a file. Older versions of peft took every name with "bias" in it; such a file is read
    as peft 0.21.2 reads it, and what is no bias by the present rule is not trained further. The biases of targeted
    modules are read under the names of peft 0.2 to 0.6 too, which peft 0.21.2 leaves out without a word."""
    skip = added_names(model) + tuple(f"{path}." for path in saved)
    modules, out = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters():
        if "bias" not in name or name.startswith(skip):
            continue
        path, _, leaf = name.rpartition(".")
        wrapped = f"{PREFIX}{path}.base_layer.{leaf}"
        out[PREFIX + name] = _base(parameter, name)
        if path in targeted or layer_class(modules[path]) is not None:  # another adapter may have had it as a target
            out[wrapped] = _base(parameter, name)
    return out


def _repeated_biases(path: str, module: nn.Module, by_this_adapter: bool) -> dict[str, Place]:
    """The biases of a module that is trained whole, once more: see `fastpeft.state._biases_again`. The adapter's name
    at the time of saving stands in some of their names, as * here."""
    out = {}
    for key, tensor in own_tensors(module).items():
        if "bias" not in key:
            continue
        shape = tuple(tensor.shape)
        out[f"{PREFIX}{path}.original_module.{key}"] = Place(shape, SPARE)
        if by_this_adapter:
            inner = f"*.{key}" if "." in key else key
            out[f"{PREFIX}{path}.modules_to_save.{inner}"] = Place(shape, TWIN, f"{PREFIX}{path}.{key}")
    return out


def _place_of(key: str, places: dict[str, Place]) -> Place | None:
    place = places.get(key)
    if place is not None or ".modules_to_save." not in key:
        return place
    return places.get(re.sub(r"(\.modules_to_save\.)[A-Za-z0-9_-]+\.(?=.)", r"\1*.", key, count=1))


def check_names_and_shapes(places: dict[str, Place], found: dict[str, tuple], where: str) -> None:
    """What a file holds must be what it may hold, and all of the adapter's own. Raises AdapterFileError."""
    expected = {key for key, place in places.items() if place.use == OWN}
    known = {key: place for key in found if (place := _place_of(key, places)) is not None}
    known = {key: place for key, place in known.items() if place.use != TWIN or place.of in found}
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - known.keys())
    if missing and extra and not expected & found.keys():
        raise AdapterFileError(
            f"{where}: none of its {len(found)} tensors fits this model; it has {shown(extra[0])}, "
            f"expected {missing[0]!r}"
        )
    if missing:
        raise AdapterFileError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing, and all are needed: {_some(missing)}"
        )
    if extra:
        raise AdapterFileError(
            f"{where}: {len(extra)} tensors that the configuration does not declare: {_some(extra)}; an adapter may "
            "hold only its own tensors, its modules_to_save, its trained biases, and targeted embeddings (with "
            "load_adapter(..., embeddings=True) all of them, in place of the model's)"
        )
    replaced: dict[str, str] = {}
    for key, place in known.items():
        if tuple(found[key]) != place.shape:
            advice = "is it the right base model, and is r what the adapter was trained with?"
            if place.use != OWN and len(found[key]) == 2:
                advice += f" A vocabulary that was resized has to be here too: resize_token_embeddings({found[key][0]})"
            raise AdapterFileError(
                f"{where}: {key} has shape {tuple(found[key])}, but this model and configuration need {place.shape}; "
                + advice
            )
        if place.use == BASE and replaced.setdefault(place.of, key) != key:
            raise AdapterFileError(f"{where}: {replaced[place.of]} and {key} are both for {place.of}; remove one")


def _some(names: list[str], limit: int = 4) -> str:
    short = (name if len(name) <= 120 else f"{name[:100]}... ({len(name)} characters)" for name in names[:limit])
    return ", ".join(short) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def fill(
    model: nn.Module, adapter_name: str, places: dict[str, Place], tensors: dict[str, torch.Tensor], where: str
) -> None:
    """Copy a file's tensors, whose names and shapes are checked, into the adapter just built and the base parameters
    that it may replace; what these were is kept for `unpatch`.

    Raises AdapterFileError for a value beyond the range of where it goes, and for a tensor that does not repeat what
    it should; PatchError for a base parameter that is offloaded.
    """
    own, base = own_tensors_of(model, adapter_name), dict(model.named_parameters(remove_duplicate=False))
    adapted, state = dict(layers(model)), state_of(model)
    used = {key: _place_of(key, places) for key in tensors}
    targets = {key: own[key] if place.use == OWN else base.get(place.of) for key, place in used.items()}
    for key, place in used.items():
        _check_values(key, place, targets[key], tensors, where)
    with torch.no_grad():
        for key, tensor in tensors.items():
            place, target = used[key], targets[key]
            if place.use == BASE:
                if torch.equal(target.cpu(), tensor.to(target.dtype)):
                    continue
                path, _, leaf = place.of.rpartition(".")
                if place.of in state.in_place or not isinstance(adapted.get(path), LoraLayer):
                    note(state, place.of, target, adapter_name)
                else:
                    adapted[path].keep(leaf)
            if place.use in (OWN, BASE):
                target.copy_(tensor)


def check_replaced(model: nn.Module, places: dict[str, Place], tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raises AdapterFileError for a base parameter that another adapter has changed, and a new one's file again."""
    changed = {name: repr(before.owner) for name, before in state_of(model).in_place.items()}
    for path, layer in layers(model):
        if isinstance(layer, LoraLayer):
            changed.update({f"{path}.{leaf}": "an adapter before it" for leaf in layer._fastpeft.kept})
    for key, tensor in tensors.items():
        place = _place_of(key, places)
        if place.use != BASE or place.of not in changed:
            continue
        target = model.get_parameter(place.of)
        if not target.is_meta and not torch.equal(target.cpu(), tensor.to(target.dtype)):
            raise AdapterFileError(
                f"{where}: {key} would take the place of {place.of}, which has the values that {changed[place.of]} "
                "brought and needs; load the two into two models"
            )


def _check_values(key: str, place: Place, target: torch.Tensor | None, tensors: dict, where: str) -> None:
    tensor = tensors[key]
    twin = tensors[place.of] if place.use == TWIN else tensor
    if twin.dtype != tensor.dtype or not torch.equal(twin, tensor):
        raise AdapterFileError(
            f"{where}: {key} differs from {place.of}, which it should repeat; save the adapter again"
        )
    if place.use not in (OWN, BASE):
        return
    if place.use == BASE and target.is_meta:
        raise PatchError(f"{where} has a value for {place.of}, which accelerate has offloaded; load the model without")
    narrower = torch.promote_types(tensor.dtype, target.dtype) != target.dtype
    if narrower and not torch.isfinite(tensor.to(target.dtype)).all():
        raise AdapterFileError(
            f"{where}: {key} has values up to {float(tensor.abs().max()):.3g}, which its {target.dtype} in this model "
            "cannot hold; load it into a model of a wider dtype, or with autocast_adapter_dtype=True"
        )
