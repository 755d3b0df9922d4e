"""`rehome`, `unrehome`: frozen weights with room beside them, so that one product computes a layer with its adapter."""

from torch import nn

from fastpeft.errors import PatchError
from fastpeft.fusing import require_patched
from fastpeft.names import leaf
from fastpeft.tuners.rehoming import give_room, refusal, take_rooms


def rehome(model: nn.Module) -> nn.Module:
    """Give the frozen weights (N, K) of adapted linear layers room for B beside them and for A below them. On the
    kernels one vendor's product [x|S]·[W|B]ᵀ is then a layer's forward where N > K, and without dropout
    [dY|T]·[W; A] its dX where N < K, which moves fewer bytes than the rank-r term written before the product, at the
    price of a copy of x or dY. Predicted to pay there; no GPU has measured it.

    Only for adapters in the base's dtype (peft makes them fp32: `autocast_adapter_dtype=False`). Values, parameters and
    results are as before, up to rounding; a weight is no longer contiguous, and its storage larger by at least the
    rank, and less than 64 more, in each direction. What moves or copies a weight (`model.to`, `copy.deepcopy`) leaves
    its room behind: call again after it. safetensors' `save_model` refuses such weights, as views of larger storage;
    transformers' `save_pretrained` writes them without their room. One model is then for one CUDA stream at a time.

    DistributedDataParallel goes with it, before or after. A weight that is divided among processes (`fully_shard`,
    FullyShardedDataParallel, DeepSpeed ZeRO-3) gets no room, and the first two take none that has: `unrehome` before.

    Args:
        model: one that `patch` has patched, natively or around a PeftModel, on the device where it is to stay.

    Returns:
        The same model; `unrehome` and `unpatch` end it.

    Raises:
        PatchError: the model is not patched, or no layer of it can be re-homed. Nothing has changed.
    """
    require_patched(model, "rehome")
    refused = {name: refusal(module) for name, module in model.named_modules() if hasattr(module, "lora_A")}
    chosen = [name for name, reason in refused.items() if reason is None]
    if not chosen:
        name, reason = next(iter(refused.items()), ("the model", "it has no LoRA"))
        raise PatchError(f"rehome: no weight of this {type(model).__name__} can have room; of {leaf(name)}: {reason}")
    try:
        for name in chosen:
            give_room(model.get_submodule(name))
    except BaseException:
        take_rooms(model)
        raise
    return model


def unrehome(model: nn.Module) -> nn.Module:
    """Undo `rehome`: each parameter, bit for bit, is in a storage of its own size again. Returns the same model.
    Raises PatchError if it is not patched."""
    require_patched(model, "unrehome")
    take_rooms(model)
    return model
