"""`fuse`, `unfuse`: adapted layers beside each other, computed as one op."""

from torch import nn

from fastpeft.arguments import check_flags
from fastpeft.errors import PatchError
from fastpeft.patching import state_of
from fastpeft.preconditions import adapted_by_peft
from fastpeft.tuners.fusions import FUSIONS
from fastpeft.untrusted import shown


def fuse(model: nn.Module, *names: str, recompute: bool = False) -> nn.Module:
    """Let adapted layers of a patched model compute together what belongs together. The results are the same up to
    rounding; a call that the op does not know (several active adapters, DoRA, a hook that changes an input, ...) goes
    layer by layer. That it pays on a GPU is predicted from the bytes and launches it saves, and measured on none yet.

    "projections": linear layers that read one tensor (q, k, v; gate, up) are one op, which reads it once. Which they
    are is seen in the first call of the module that they are in, which is computed as before; let it come before
    `torch.compile`, in which nothing is seen. Of quantised layers, float8 ones too, each has its own base product, and
    the op adds the low-rank terms of all.

    "mlp": an MLP whose forward is down(act(gate(x))·up(x)) and nothing beside, of frozen weights and with silu, gelu
    (exact or by tanh) or relu², is one op. It keeps for backward gate(x), up(x), x and the rank-r tensors, and seeds in
    place of the masks; with `recompute` x, the rank-r tensors and seeds alone.

    A model may be fused before it is distributed, or after, when `model` is the one inside DistributedDataParallel's or
    FullyShardedDataParallel's wrapper. Layers are one op where the module around them, or a greater one, is what was
    sharded; one that was sharded or checkpointed by itself is called by itself. "mlp" changes no training under
    FullyShardedDataParallel, where frozen weights are parts of a flat parameter that is trained.

    Args:
        model: one that `patch` has patched, natively or around a PeftModel.
        names: which fusions; all of them without names.
        recompute: of "mlp", gate(x) and up(x) are computed once more in backward instead of being saved. The last call
            for "mlp", by name or without names, says it for all of the model's MLPs.

    Returns:
        The same model; `unfuse` and `unpatch` end it.

    Raises:
        PatchError: the model is not patched, there is no such fusion, or `recompute` is given for fusions among which
            "mlp" is not. Nothing has changed.
    """
    check_flags("fuse", recompute=recompute)
    chosen = _chosen(model, names, "fuse")
    fusions = [FUSIONS[name] for name in chosen]
    if recompute and not any(each.recomputes for each in fusions):
        those = ", ".join(repr(name) for name, each in FUSIONS.items() if each.recomputes)
        raise PatchError(
            f"fuse: recompute=True, but of {', '.join(map(repr, chosen))} nothing is computed again in backward; name "
            f"{those} too, or leave it out"
        )
    for fusion in fusions:
        fusion.join(model, *([recompute] if fusion.recomputes else []))
    return model


def unfuse(model: nn.Module, *names: str) -> nn.Module:
    """Undo `fuse`, of these names or of all. Returns the same model. Raises PatchError as it does."""
    for name in _chosen(model, names, "unfuse"):
        FUSIONS[name].part(model)
    return model


def _chosen(model: nn.Module, names: tuple[str, ...], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in FUSIONS:
            raise PatchError(f"{what}: there is no fusion {shown(name)}; there are {', '.join(map(repr, FUSIONS))}")
    require_patched(model, what)
    return names or tuple(FUSIONS)


def require_patched(model: nn.Module, what: str) -> None:
    """Raises PatchError unless `patch` has patched the model, natively or around peft's adapters."""
    if adapted_by_peft(model):
        from fastpeft.integrations.peft import is_swapped

        if not is_swapped(model):
            raise PatchError(f"{what}: peft's adapters in this model are not patched; fastpeft.patch(model) first")
    else:
        state_of(model)
