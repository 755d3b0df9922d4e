"""AdaLoRA's part in patching: the plan, the injection, what it adds to the loss, what training needs besides a file."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.configs import AdaLoraConfig, LoraConfig, PeftType, as_config
from fastpeft.distributed import is_sharded, plain_path, whole
from fastpeft.errors import AdapterFileError, ConfigError, PatchError
from fastpeft.names import listed
from fastpeft.targets import Target, resolve_targets
from fastpeft.tuners.adalora import KEYS, AdaLoraLayer, Ranks, adalora_class, rows_of, settings_of
from fastpeft.tuners.layer import AdapterLayer, attach
from fastpeft.tuners.lora_injection import Plan as LoraPlan
from fastpeft.tuners.lora_injection import checked_targets
from fastpeft.tuners.lora_kinds import settle_fan_in_fan_out
from fastpeft.tuners.orthogonality import mean_distance
from fastpeft.tuners.saved_modules import SavedModule, check_saved

_TARGETING = (
    *("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)


@dataclass(frozen=True)
class Plan(LoraPlan):
    """What an adapter will touch: targets with their classes and settings, and the modules it trains whole."""

    def resuming(self) -> "Plan":
        """The same plan: the triplets that the file lacks are put back by `fill_training`."""
        return self


def plan(model: nn.Module, config: AdaLoraConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError, ConfigError, or PatchError for a
    second adapter that trains."""
    config = as_config(config)
    _check_alone(model, config)
    asked = {name: getattr(config, name) for name in _TARGETING}
    as_lora = LoraConfig(r=config.init_r, lora_alpha=config.effective_alpha, **asked)
    resolution = resolve_targets(model, as_lora, PeftType.ADALORA)
    config.target_modules = resolution.config.target_modules
    config.modules_to_save = resolution.config.modules_to_save
    targets = tuple(
        (target, kind, settings_of(config, config.kept_of(target.name)))
        for target, kind in checked_targets(model, resolution, adalora_class)
    )
    _check_pattern(config, [target for target, _, _ in targets])
    saved = tuple((name, model.get_submodule(name)) for name in resolution.saved_modules)
    check_saved(model, saved)
    return Plan(config, targets, saved)


def _check_alone(model: nn.Module, config: AdaLoraConfig) -> None:
    present = getattr(model.__dict__.get("_fastpeft"), "configs", {})
    trained = [name for name, each in present.items() if isinstance(each, AdaLoraConfig) and not each.inference_mode]
    if trained and not config.inference_mode:
        raise PatchError(
            f"AdaLoRA trains one adapter of a model, and {trained[0]!r} is one; load others for inference, or delete it"
        )


def _check_pattern(config: AdaLoraConfig, targets: list[Target]) -> None:
    unknown = (config.rank_pattern or {}).keys() - {f"{target.name}.lora_E" for target in targets}
    if unknown:
        raise ConfigError(
            f"rank_pattern has {listed(sorted(unknown))}, and target_modules adapts no such layer of this model; give "
            "the model and the target_modules that it was made with"
        )


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Build the planned adapter into the model, in `named_modules()` order, which is the order of the random draws.
    Without `init` the parameters are left unset, for a file to fill."""
    for target, kind, settings in plan.targets:
        if not isinstance(target.module, AdapterLayer):
            attach(target.module, kind, state)
        settle_fan_in_fan_out(plan.config, target.module)
        target.module.add_adapter(name, settings, plan.config.init_lora_weights if init else None, autocast)
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, AdaLoraLayer]]:
    """(path, layer) of the layers that have this adapter, in `named_modules()` order."""
    for path, module in model.named_modules():
        if isinstance(module, AdaLoraLayer) and name in module._fastpeft.adapters:
            yield plain_path(path), module


def after_call(model: nn.Module, name: str, outputs):
    """A call's result with `orth_reg_weight` times the mean distance of the adapter's vectors from orthonormal ones
    added to its loss, in training, evaluation and frozen inference alike.

    The loss is `outputs.loss`, if it is a tensor; of a plain tuple (return_dict=False) the first element, if that is a
    scalar, which nothing but a loss is. Without a loss the result is as it was.
    """
    is_tuple = type(outputs) is tuple
    loss = next(iter(outputs), None) if is_tuple else getattr(outputs, "loss", None)
    weight = model._fastpeft.configs[name].orth_reg_weight
    if not isinstance(loss, torch.Tensor) or not weight or (is_tuple and loss.ndim):
        return outputs
    layers = []
    for path, layer in layers_of(model, name):
        if layer.is_offloaded(name):
            raise PatchError(
                f"{path}: its adapter is offloaded by accelerate, and the loss has a term of it; call without labels, "
                "or dispatch the model first and patch it then"
            )
        layers.append(layer)
    rows, columns = ([whole(getattr(each, key)[name]) for each in layers] for key in ("lora_A", "lora_B"))
    distance = mean_distance(rows, columns, loss.device)
    loss = loss + (weight * distance).to(loss.dtype)
    if is_tuple:
        return (loss, *outputs[1:])
    outputs.loss = loss
    return outputs


def training_is_sharded(model: nn.Module, name: str) -> bool:
    """Whether `training_tensors` has to gather something, for which all processes have to call it."""
    held = (layer._fastpeft.adapters[name].ranks.importance or () for _, layer in layers_of(model, name))
    return any(is_sharded(tensor) for tensors in held for tensor in tensors)


def training_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor] | None:
    """What training needs to go on bit for bit and HF peft's file does not have: the triplets that it leaves out, and
    how important each entry has been. None if there is nothing of it."""
    out = {}
    for path, layer in layers_of(model, name):
        settings, own = layer._fastpeft.adapters[name], layer.parameters_of(name)
        ranks = settings.ranks
        gone = [row for row, stays in enumerate(ranks.kept or ()) if not stays]
        if gone:
            out.update({f"{path}.{key}.dropped": tensor for key, tensor in rows_of(own, gone).items()})
        if settings.r and ranks.importance is not None:
            for what, held in (("exp_avg_ipt", ranks.importance), ("exp_avg_unc", ranks.uncertainty)):
                out.update({f"{path}.{key}.{what}": whole(tensor) for key, tensor in zip(KEYS, held, strict=True)})
        if 0 < settings.r < settings.init_r:
            out[f"{path}.positions"] = torch.tensor(ranks.positions, dtype=torch.float32)
    return out if any(not key.endswith(".positions") for key in out) else None


def fill_training(model: nn.Module, name: str, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put back what `training_tensors` has saved, into an adapter that its file has filled. Raises AdapterFileError,
    with the adapter as it was, if it does not fit."""
    config: AdaLoraConfig = model._fastpeft.configs[name]
    left, ready, lacking = dict(tensors), [], []
    for path, layer in layers_of(model, name):
        mine = {key: left.pop(f"{path}.{key}") for key in _SAVED if f"{path}.{key}" in left}
        if "lora_E.exp_avg_ipt" not in mine and (mine or layer._fastpeft.adapters[name].r):
            lacking.append(path)
        if not mine:
            continue
        ranks = Ranks(_positions(mine.get("positions"), config.init_r, f"{where}: {path}.positions"))
        pattern = config.kept_of(path)
        if pattern is not None:
            ranks.kept = tuple(pattern[position] for position in ranks.positions)
        _check_saved(layer, name, ranks, mine, f"{where}: {path}")
        ready.append((layer, ranks, mine))
    if left:
        raise AdapterFileError(f"{where}: {listed(sorted(left))} belong to no layer of the adapter; save it again")
    if any(key.endswith(".exp_avg_ipt") for key in tensors) and lacking:
        raise AdapterFileError(
            f"{where}: the saved state of training has no importances for {listed(lacking)}; save it again"
        )
    for layer, ranks, mine in ready:
        if "lora_E.dropped" in mine:
            layer.regrow(name, ranks, {key: mine[f"{key}.dropped"] for key in KEYS})
        else:
            layer.settle(name, ranks)
        own = layer.parameters_of(name)
        if "lora_A.exp_avg_ipt" in mine:
            ranks.importance = [mine[f"{key}.exp_avg_ipt"].to(own[key], copy=True) for key in KEYS]
            ranks.uncertainty = [mine[f"{key}.exp_avg_unc"].to(own[key], copy=True) for key in KEYS]


_SAVED = ("positions", *(f"{key}.{what}" for what in ("dropped", "exp_avg_ipt", "exp_avg_unc") for key in KEYS))


def _positions(saved: torch.Tensor | None, init_r: int, where: str) -> tuple[int, ...]:
    if saved is None:
        return tuple(range(init_r))
    found = tuple(map(int, saved.flatten().tolist()))
    if saved.ndim != 1 or list(found) != sorted(set(found)) or not all(0 <= each < init_r for each in found):
        raise AdapterFileError(
            f"{where} is not a list of different numbers from 0 to {init_r - 1} in order; save it again"
        )
    return found


def _check_saved(layer: AdaLoraLayer, name: str, ranks: Ranks, found: dict[str, torch.Tensor], where: str) -> None:
    settings, total = layer._fastpeft.adapters[name], len(ranks.positions)
    stays = total if ranks.kept is None else sum(ranks.kept)
    if stays != settings.r:
        raise AdapterFileError(
            f"{where} has {settings.r} triplets in the adapter's file, and {stays} beside it; they must be of one save"
        )
    whole = {key: list(tensor.shape) for key, tensor in layer.parameters_of(name).items()}
    wanted: dict[str, list[int]] = {"positions": [total]} if "positions" in found else {}
    for key, shape in whole.items():
        dimension = 1 if key == "lora_B" else 0
        if total > stays:
            wanted[f"{key}.dropped"] = [*shape[:dimension], total - stays, *shape[dimension + 1 :]]
        if any("exp_avg" in each for each in found):
            full = [*shape[:dimension], total, *shape[dimension + 1 :]]
            wanted.update({f"{key}.exp_avg_ipt": full, f"{key}.exp_avg_unc": full})
    have = {key: list(tensor.shape) for key, tensor in found.items()}
    if have != wanted:
        wrong = sorted(key for key in wanted.keys() | have.keys() if wanted.get(key) != have.get(key))[0]
        raise AdapterFileError(
            f"{where}.{wrong} has shape {have.get(wrong, 'none')} in the saved state of training, expected "
            f"{wanted.get(wrong, 'none')}"
        )
