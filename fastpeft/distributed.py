"""Parameters of which a process holds a part: DTensors (FSDP2's `fully_shard`, tensor parallelism), the views into flat
parameters of the older FullyShardedDataParallel, DeepSpeed ZeRO-3's.

An adapter goes into a model whose parameters are whole, then the model is distributed, then the optimizer is made. The
engine that shards a module makes its parameters whole around the module's own forward. Our layers read parameters of
their children, which have to be sharded with a layer and not by themselves.
"""

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import AdapterFileError, PatchError

PLAIN = (nn.Parameter, Tensor)  # the types of most parameters, which are looked at no further
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
ORDER = (
    "an adapter goes into whole parameters: load the model, then fastpeft.patch or load_adapter, then distribute it, "
    "then make the optimizer"
)


def plain_path(path: str) -> str:
    """The path of a module or a parameter without what wrappers inside a model have added."""
    for wrapper in WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; differentiable. Of a DTensor each process of its mesh has to ask. Raises PatchError
    for a part of a flat parameter."""
    if getattr(tensor, "_fsdp_flattened", False):
        raise PatchError(
            "AdaLoRA needs the factors of all layers at once, of which FullyShardedDataParallel has given back all but "
            "its own part by then; use FSDP2 (fully_shard; accelerate's fsdp_version=2)"
        )
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of it that this process holds, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have, on the device of another of its shape and sharded as that is."""
    if is_sharded(tensor) or not is_sharded(other):
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    mesh = other.device_mesh
    return distribute_tensor(tensor.to(other.to_local().device), mesh, other.placements, src_data_rank=None)


def part_of(tensor: Tensor) -> str | None:
    """By what a parameter was divided so that a process has a part of it, or None."""
    if is_sharded(tensor):
        return "is a DTensor"
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        return "belongs to a FullyShardedDataParallel"
    return "is partitioned by DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") and hasattr(tensor, "ds_status") else None


def check_undistributed(model: nn.Module) -> None:
    """Raises PatchError if parameters of the model are divided among processes already."""
    for name, parameter in model.named_parameters():
        reason = part_of(parameter)
        if reason is None:
            continue
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise PatchError(
                f"{name} is split by tensor parallelism (tp_plan), which adapters do not follow: their factors would "
                "have to be split as each layer is. Load the model without tp_plan, patch it, and distribute it by "
                "fully_shard or DistributedDataParallel"
            )
        if "ZeRO-3" in reason:
            reason += " (from_pretrained under a DeepSpeed configuration does that; load the model before there is one)"
        raise PatchError(f"{name} {reason}: {ORDER}")


def sharded_by_itself(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module."""
    return hasattr(type(module), "set_requires_gradient_sync")


def own_weight(module: nn.Module) -> Any:
    """A module's weight where that is a parameter and nothing more, or None. FullyShardedDataParallel has what stands
    for the parameter among the attributes while a checkpointed segment is recomputed."""
    weight = module._parameters.get("weight")
    if weight is None and "_is_fsdp_managed_module" in module.__dict__:
        return module.__dict__.get("weight")
    return weight


def own_class(module: nn.Module) -> type:
    """A module's class without the one that `fully_shard` has put in front of it."""
    return type(module).__bases__[1] if sharded_by_itself(module) else type(module)


def give_class(module: nn.Module, cls: type) -> None:
    """Give a module another class, in front of which the one that `fully_shard` has put there stays."""
    present = type(module)
    if sharded_by_itself(module):
        front, behind = present.__bases__[0], dict(present.__dict__)
        if present.__bases__[1:] != (cls,):
            module.__class__ = type(f"FSDP{cls.__name__}", (front, cls), behind)
    elif present is not cls:
        module.__class__ = cls


def check_dtypes(model: nn.Module) -> None:
    """Raises PatchError, before the first call of a model that `fully_shard` has sharded, where parameters that are
    trained and sharded together have several dtypes."""
    if not sharded_by_itself(model) or getattr(model._get_fsdp_state(), "_is_root", True) is not None:
        return
    groups, found = {}, defaultdict(dict)
    for path, module in model.named_modules():
        parent = groups.get(path.rpartition(".")[0])
        groups[path] = path if sharded_by_itself(module) else parent
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                found[groups[path]].setdefault(parameter.dtype, f"{path}.{leaf}")
    for path, names in found.items():
        if len(names) > 1:
            each = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
            raise PatchError(
                f"{each}, and fully_shard({path or 'model'}) has both in one group, whose gradients are reduced in one "
                "dtype. Before fully_shard convert what is trained to fp32, and give it "
                "mp_policy=MixedPrecisionPolicy(param_dtype=...), the base's dtype; or shard a trained head by itself"
            )


def is_apart(tensor: Tensor) -> bool:
    """Whether a parameter that is read in a layer's forward was sharded apart from the layer: by `fully_shard`, or in a
    FullyShardedDataParallel whose own forward is not going on, which has tensors in its parameters' places in it. Whole
    ones (`summon_full_params`) may be read where no gradient is wanted."""
    if type(tensor) not in PLAIN:
        return is_sharded(tensor)
    return getattr(tensor, "_fsdp_flattened", False) and (tensor.ndim == 1 or torch.is_grad_enabled())


def check_gathered(what: str, *tensors: Tensor) -> None:
    """Raises PatchError for a parameter that is read in a layer's forward and was sharded apart from the layer."""
    for tensor in tensors:
        if not is_apart(tensor):
            continue
        if type(tensor) in PLAIN:
            raise PatchError(
                f"{what} is in a FullyShardedDataParallel of its own, and is read by the layer around it: give an "
                "auto_wrap_policy of whole decoder layers (peft's fsdp_auto_wrap_policy is none), or use fully_shard"
            )
        raise PatchError(
            f"{what} is sharded by itself, and is read by the layer around it: call fully_shard on whole decoder "
            "layers and on the model, and on no part of an adapter"
        )


def check_reentrant(checkpoint: Callable, shared: Iterable[str]) -> None:
    """Raises PatchError where a checkpointed segment would have gradients reduced before all of them are there:
    `shared` are the adapters with parameters that several segments use."""
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is None or ddp.static_graph or getattr(checkpoint, "keywords", {}).get("use_reentrant", True) is False:
        return
    for name in shared:
        raise PatchError(
            f"adapter {name!r} under DistributedDataParallel: checkpointing with use_reentrant=True computes its "
            "gradients in one piece for each layer, of which the first alone would be averaged; set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or DistributedDataParallel(static_graph=True)"
        )


@contextlib.contextmanager
def gathered(model: nn.Module, tensors: Iterable[Tensor], full: dict[str, Tensor] | None = None):
    """Inside, those parameters of the model that are among `tensors` are whole, if a process holds a part of them; they
    are taken from `full`, a whole state dict of the model, or else gathered, for which every process has to come here.
    Yields the mesh of the processes that did, or None if there was nothing to gather. Raises PatchError for parameters
    that only the engine that has divided them can gather."""
    wanted, made, replaced, mesh = {id(tensor) for tensor in tensors}, {}, [], None
    try:
        for path, module in model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if id(parameter) not in wanted or (reason := part_of(parameter)) is None:
                    continue
                name = plain_path(f"{path}.{leaf}")
                if id(parameter) not in made:
                    made[id(parameter)] = _whole_parameter(name, parameter, reason, full)
                    mesh = parameter.device_mesh if full is None else None
                replaced.append((module, leaf, parameter, {name: module.__dict__[name] for name in HOOKS}))
                module._parameters[leaf] = made[id(parameter)]
                # An engine's hooks would look for the part that it knows.
                module.__dict__.update({name: OrderedDict() for name in HOOKS})
        yield mesh
    finally:
        for module, leaf, parameter, hooks in reversed(replaced):
            module._parameters[leaf] = parameter
            module.__dict__.update(hooks)


def _whole_parameter(name: str, parameter: Tensor, reason: str, full: dict[str, Tensor] | None) -> nn.Parameter:
    if full is not None:
        if name not in full:
            raise PatchError(f"state_dict: {name} is not in it; give the whole state dict of the model")
        if is_sharded(full[name]):
            raise PatchError(f"state_dict: {name} is sharded in it too; leave it out, and call in every process")
        return nn.Parameter(full[name], requires_grad=False)
    if not is_sharded(parameter):
        raise PatchError(
            f"{name} {reason}, which alone can gather it: get a whole state dict from there, as "
            "accelerator.get_state_dict(model) does, and save with state_dict=that, in the first process"
        )
    return nn.Parameter(parameter.detach().full_tensor(), requires_grad=False)


def first_writes(mesh, write: Callable[[], None]) -> None:
    """Call `write` in the first process of the mesh; the others wait. Raises its error, and AdapterFileError there."""
    import torch.distributed as dist

    first, error = int(mesh.mesh.flatten()[0]), None
    if dist.get_rank() == first:
        try:
            write()
        except Exception as failure:
            error = failure
    failed = torch.tensor([error is not None], dtype=torch.int32, device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    if error is not None:
        raise error
    if failed.item():
        raise AdapterFileError(f"the adapter is not saved: rank {first}, which writes it, says why; save again")
