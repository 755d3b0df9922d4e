"""`quantise_base_fp8`, `dequantise_base_fp8`: the frozen linear layers of a model with weights of 8 bits."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import nn

from fastpeft.arguments import check_flags
from fastpeft.configs import LoraConfig
from fastpeft.distributed import is_sharded
from fastpeft.errors import PatchError, TargetError
from fastpeft.fp8_layer import KINDS, Fp8Linear, to_dense, to_fp8
from fastpeft.names import dotted_ends, listed, nearest
from fastpeft.ops.fp8_linear import row_scales
from fastpeft.patching import PatchState
from fastpeft.patterns import in_bounded_time, matches_name
from fastpeft.quantised import entry_of
from fastpeft.targets import ADAPTER_CHILDREN, ALL_LINEAR
from fastpeft.tuners.layer import AdapterLayer, LayerState, accelerate_calls, offloaded_to
from fastpeft.untrusted import shown

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
READ_PAST = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)  # their children's forward
PEFT_BASE = ".base_layer"  # how the path of a layer ends that one of peft's has taken in
NOT_BASE = ADAPTER_CHILDREN | {"original_module"}


def quantise_base_fp8(
    model: nn.Module,
    target_modules: str | Collection[str] = "all-linear",
    exclude_modules: str | Collection[str] | None = None,
    *,
    keep: bool = False,
) -> nn.Module:
    """Keep the frozen weights of linear layers in float8 (e4m3) with one fp32 scale for each row, in place: a byte for
    a number, where bf16 has two. Nothing does this by itself, because it changes results: an input is rounded to the
    same format row by row in each call, while adapters and all gradients are computed from what was not rounded
    (`fastpeft.ops.fp8_linear` has the formulas). `fastpeft check --base fp8` shows what it costs in accuracy.

    Adapters may be in the model already or come later, of any method, natively or through peft; merging quantises the
    sum again. On a GPU with such products (H100, H200, ...) and in bf16, with sizes in multiples of 16, forward's are
    of 8 bits; those of backward, and all others, are of numbers that were made wider. In the state dict a layer has
    `weight` in float8, in one dimension, and `weight_scale` beside it, which `load_state_dict` of such a model reads
    and `from_pretrained` refuses: keep the checkpoint that the base came from.

    Args:
        model: any module; its weights on the device where they will be.
        target_modules: the layers' names, a regular expression for their paths, or "all-linear": every torch.nn.Linear
            of the backbone, without heads and what transformers keeps in fp32, that is not in float8 yet.
        exclude_modules: likewise, what is left out.
        keep: whether the weights as they are stay on the CPU, for `dequantise_base_fp8` to give back bit for bit.

    Returns:
        The same object. If it is interrupted, or memory gives out, the layers that were done stay in float8.

    Raises:
        ConfigError: target_modules or exclude_modules is no such thing.
        TargetError: they match nothing, or something that is no frozen torch.nn.Linear with a finite weight of its own.
        PatchError: model is no module, or adapters have changed weights (merging, PiSSA, OLoRA). Nothing has changed.
    """
    check_flags("quantise_base_fp8", keep=keep)
    _check_model(model, "quantise_base_fp8")
    with in_bounded_time():
        chosen = _chosen(model, LoraConfig(target_modules=target_modules, exclude_modules=exclude_modules))
    owners = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    for path, module in chosen:
        _check_layer(model, path, module, owners)
    state = model.__dict__.get("_fastpeft")
    for path, module in chosen:
        before = state.requires_grad if isinstance(state, PatchState) else {}
        to_fp8(module, keep, before.get(f"{path}.weight", False))
        before[f"{path}.weight"] = False  # what `unpatch` gives back
    return model


def dequantise_base_fp8(model: nn.Module) -> nn.Module:
    """Undo `quantise_base_fp8` in all layers: each gets a weight of its former dtype again, bit for bit the one that it
    had if that was kept (`keep=True`), and else the one that float8 stands for.

    Returns the same object. Raises PatchError if it has no such layer, or adapters have changed weights since then
    (merging, OLoRA).
    """
    _check_model(model, "dequantise_base_fp8")
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Fp8Linear)]
    if not found:
        raise PatchError("dequantise_base_fp8: no layer has its weight in float8; there is nothing to undo")
    for path, module in found:
        _check_unchanged(path, module)
    state = model.__dict__.get("_fastpeft")
    for path, module in found:
        wants_grad = module.wanted_grad
        if isinstance(state, PatchState):
            state.requires_grad[f"{path}.weight"], wants_grad = wants_grad, False
        to_dense(module, wants_grad)
    return model


def _check_model(model: nn.Module, where: str) -> None:
    if not isinstance(model, nn.Module):
        raise PatchError(f"{where}: model is a {type(model).__name__}; a torch.nn.Module is needed")
    own = model.__dict__.get("_fastpeft")
    for path, module in model.named_modules():
        name, state = path or "the model", module.__dict__.get("_fastpeft")
        patch = getattr(state, "model", state)
        if isinstance(patch, PatchState) and patch is not own:
            raise PatchError(
                f"{where}: {name} is of a patched model, and this {type(model).__name__} is a part of that, or around "
                "it; give the patched model itself"
            )
        merged = getattr(state, "merged", ()) or vars(module).get("merged_adapters")
        if merged:
            raise PatchError(f"{where}: {name} has {', '.join(merged)} merged into its weights; unmerge first")


def _chosen(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    """The layers that are asked for, by their paths. Raises TargetError if there are none."""
    named, excluded = config.target_modules, config.exclude_modules
    if not named:
        raise TargetError(f"quantise_base_fp8: target_modules={shown(named)} names nothing; give names or 'all-linear'")
    by_default = isinstance(named, str) and named.lower() == ALL_LINEAR
    paths = dict(_base_modules(model))
    found = _of_backbone(model, paths) if by_default else {path: m for path, m in paths.items() if _hits(named, path)}
    found = [(path, module) for path, module in found.items() if not _hits(excluded or (), path)]
    if not found:
        if any(isinstance(module, Fp8Linear) for module in model.modules()) and by_default:
            raise TargetError("quantise_base_fp8: every linear layer's weight is in float8; there is no more to do")
        hint = "" if by_default else nearest(named, paths)
        raise TargetError(
            f"quantise_base_fp8: target_modules={shown(config.target_modules)} matches no torch.nn.Linear of this "
            f"{type(model).__name__}; name some that are there{hint}"
        )
    return found


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all that is neither an adapter's nor what a trained copy stands for."""
    for path, module in model.named_modules():
        if path and NOT_BASE.isdisjoint(path.split(".")):
            yield path, module


def _of_backbone(model: nn.Module, paths: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What "all-linear" means: heads, and what transformers keeps in fp32, are left out, and so are with a warning
    layers of a class derived from torch.nn.Linear."""
    of_transformers = (each for each in model.named_modules() if hasattr(type(each[1]), "base_model_prefix"))
    inside, root = next(of_transformers, ("", model))
    prefix = f"{inside}." if inside else ""
    backbone = getattr(root, "base_model_prefix", "")
    if backbone and backbone in root._modules:
        prefix += f"{backbone}."
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    wide = {*(getattr(root, "_keep_in_fp32_modules", None) or ())}
    wide |= {*(getattr(root, "_keep_in_fp32_modules_strict", None) or ())}
    linear = {
        path: module
        for path, module in paths.items()
        if path.startswith(prefix)
        and isinstance(module, nn.Linear)
        and not isinstance(module, Fp8Linear)
        and module is not head
        and wide.isdisjoint(path.split("."))
    }
    others = {path for path, module in linear.items() if base_class(module) is not nn.Linear and not entry_of(module)}
    if others:
        warnings.warn(
            f"quantise_base_fp8 leaves {listed(sorted(others))} as they are: only layers of torch.nn.Linear itself are "
            "kept in float8",
            stacklevel=4,
        )
    return {path: module for path, module in linear.items() if path not in others}


def _hits(named: set[str] | str | tuple, path: str) -> bool:
    """Whether a list of names or an expression means the module, by the path that it has without peft."""
    path = path.removesuffix(PEFT_BASE)
    return matches_name(named, path) if isinstance(named, str) else any(end in named for end in dotted_ends(path))


def base_class(module: nn.Module) -> type:
    """A module's class without what adapters have put in front."""
    state = module.__dict__.get("_fastpeft")
    return state.original_class if isinstance(state, LayerState) else type(module)


def _check_layer(model: nn.Module, path: str, module: nn.Module, owners: Counter) -> None:
    """Raises TargetError or PatchError for a layer that cannot be kept in float8."""
    if (reason := _why_not(model, path, module)) is not None:
        raise TargetError(f"quantise_base_fp8: {path} {reason}; leave it out with exclude_modules")
    _check_unchanged(path, module)
    weight = module.weight
    if weight.requires_grad:
        raise TargetError(
            f"quantise_base_fp8: {path}.weight is trained (requires_grad), and in float8 it has no gradient; patch the "
            "model first, which freezes it, or call model.requires_grad_(False)"
        )
    if owners[id(weight)] > 1:
        raise TargetError(
            f"quantise_base_fp8: another module shares the weight of {path} (tied weights); leave it out with "
            "exclude_modules"
        )
    if not torch.isfinite(row_scales(weight)).all():
        raise TargetError(f"quantise_base_fp8: {path}.weight has NaN or infinite values; load the model's weights anew")


def _why_not(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """What is in the way, in words that follow the layer's name."""
    entry, weight = entry_of(module), module._parameters.get("weight")
    if entry is not None:
        return f"is quantised already, by {entry.library}"
    if base_class(module) is not nn.Linear:
        return f"is a {base_class(module).__name__}, and only torch.nn.Linear itself is kept in float8"
    if isinstance(module, AdapterLayer) and type(module).__bases__[0] not in KINDS:
        return f"is trained whole or otherwise ({type(module).__name__})"
    if weight.is_meta or offloaded_to(module) is not None:
        return "is on the meta device or offloaded by accelerate"
    if is_sharded(weight):
        return "is sharded among processes"
    if weight.dtype not in DTYPES:
        return f"has a weight of {weight.dtype}, and float32, float16 or bfloat16 is needed"
    if weight.numel() + 4 * len(weight) >= weight.numel() * weight.itemsize:
        return f"has a weight of {tuple(weight.shape)}, which with a scale for each row would be no smaller"
    if "forward" in module.__dict__ and not accelerate_calls(module, type(module)):
        return "has a forward of its own on the instance"
    if getattr(module.__dict__.get("_fastpeft"), "original_forward", None) is not None:
        return "has a forward of its own on the instance, in front of which its adapters are"
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, READ_PAST):
        return f"is in a {type(parent).__name__}, which reads its weight without calling it"
    if path.endswith(PEFT_BASE) and getattr(parent, "lora_variant", None):
        return f"carries {next(iter(parent.lora_variant.values())).__class__.__name__} of peft, which reads its weight"
    return None


def _check_unchanged(path: str, module: nn.Module) -> None:
    """Raises PatchError if adapters remember the weight in another form."""
    state = module.__dict__.get("_fastpeft")
    if isinstance(state, LayerState) and (state.kept or state.unmerged):
        raise PatchError(
            f"an adapter's initialisation has changed the weight of {path}, and unpatching would put the former one "
            "back; let it be in float8, or no longer, before that adapter is added"
        )
