"""What the processes of the distributed tests do with fused models: the steps that follow those of each engine."""

import contextlib
import functools
import itertools
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import fastpeft
from fastpeft.distributed import plain_path
from fastpeft.ops import _lora_mlp_compiled, _lora_projections_compiled
from fastpeft.tuners import mlp, siblings
from tests import distributed_accelerate as libraries
from tests import distributed_fsdp as fsdp
from tests import distributed_work as work
from tests.peft_pair import randomise

BOTH, PROJECTIONS = ("projections", "mlp"), ("projections",)
RTOL = 1e-5


@contextlib.contextmanager
def counted(compiled: bool = False):
    """Which ops calls are made of inside: how many projections each has, or "mlp". Of compiled graphs, those that are
    there as operators."""
    made = Counter()

    def spy(shipped, key):
        def op(*args, **kwargs):
            made[key(args)] += 1
            return shipped(*args, **kwargs)

        return op

    with contextlib.ExitStack() as stack:
        places = [(siblings, "apply_lora_projections"), (mlp, "apply_lora_mlp")]
        if compiled:
            places = [(_lora_projections_compiled, "run_forward"), (_lora_mlp_compiled, "run_forward")]
        for (module, name), key in zip(places, (lambda args: len(args[1]), lambda args: "mlp"), strict=True):
            stack.enter_context(mock.patch.object(module, name, spy(getattr(module, name), key)))
        yield made


def checkpointed(model: nn.Module, kind: str | None) -> None:
    """As `work.checkpointing`, or by wrappers around layers, as accelerate's FSDP does."""
    if kind != "wrapper":
        return work.checkpointing(model, kind)
    model.config.use_cache = False
    layers = {*model.model.layers}
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)


# DDP. Each case: fusions, before or after the model is wrapped, and of its training what a case of `work.ddp` is; the
# ops in a process. The first call of a model is watched, so that its projections go together in the three that follow.

DDP = [
    (BOTH, "before", {}, {3: 6, "mlp": 8}),
    (PROJECTIONS, "after", {"micro": 2, "gradient_as_bucket_view": True}, {3: 14, 2: 14}),
    (BOTH, "after", {"checkpointing": "without reentrance"}, {3: 12, "mlp": 16}),
    (BOTH, "before", {"checkpointing": "reentrant", "static_graph": True}, {3: 12, "mlp": 16}),
    (PROJECTIONS, "before", {"checkpointing": "wrapper", "find_unused_parameters": True}, {3: 12, 2: 12}),
]


def under_ddp(rank: int, cases: list) -> tuple[list, list[dict]]:
    plain = work.ddp(rank, cases)
    unused_outputs(rank)
    rehomed(rank)
    return plain, [ddp(rank, *case) for case in DDP]


def ddp(rank: int, names: tuple, when: str, case: dict, ops: dict) -> dict:
    options = dict(case)
    micro = options.pop("micro", 1)
    model = work.patched("lora")
    checkpointed(model, options.pop("checkpointing", None))
    wrapped = distributed(model, lambda: DistributedDataParallel(model, **options), names, when)
    with counted() as made:
        losses = work.train(model, wrapped, rank=rank, world=2, micro=micro, unsynced=wrapped.no_sync)
    assert made == ops, (names, when, case, made)
    return result_of(model, losses)


def result_of(model: nn.Module, losses: list[float]) -> dict:
    """That of `work`, under the names without wrappers."""
    result = work.result_of(model, losses)
    return result | {"parameters": {plain_path(name): each for name, each in result["parameters"].items()}}


def distributed(model: nn.Module, distribute, names: tuple, when: str):
    """What `distribute` returns, with the model fused before or after."""
    if when == "before":
        fastpeft.fuse(model, *names)
    wrapped = distribute()
    if when == "after":
        fastpeft.fuse(model, *names)
    return wrapped


def rehomed(rank: int) -> None:
    """Before and after the model is wrapped."""
    expected = work.alone("lora")["losses"]
    for first in (fastpeft.rehome, DistributedDataParallel):
        model = work.patched("lora")
        wrapped = first(model)
        wrapped = DistributedDataParallel(model) if wrapped is model else wrapped
        fastpeft.rehome(model)
        losses = torch.tensor(work.train(model, wrapped, rank=rank, world=2))
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=RTOL, atol=0)


class Ignoring(nn.Module):
    """Three projections of one tensor, of which a process may leave k's result alone."""

    def __init__(self, uses_k: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.uses_k = uses_k

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q + v.tanh() * k if self.uses_k else q + v.tanh()


def ignoring(uses_k: bool, *names: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Ignoring(uses_k), nn.Tanh(), Ignoring(uses_k), nn.Linear(8, 1))
    model = fastpeft.patch(model, fastpeft.LoraConfig(target_modules=["q", "k", "v"], r=2))
    randomise(model)
    return fastpeft.fuse(model.train(), *names) if names else model.train()


def unused_outputs(rank: int) -> None:
    """A fused run trains the parameters that its projections do one by one, of which an unused one has no gradient;
    where one process uses it, its gradient is averaged."""
    engines = {
        "find unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
        "fsdp2": lambda model: fully_shard([fully_shard(model[0]), fully_shard(model[2]), model][-1]),
    }
    for engine, using in [*((engine, ()) for engine in engines), ("find unused", (1,))]:
        expected = trained_unused(rank, engines[engine], ignoring(rank in using))
        with counted() as made:
            found = trained_unused(rank, engines[engine], ignoring(rank in using, "projections"))
        assert made == {3: 8}, (engine, made)
        assert found.keys() == expected.keys() and len(found) == (12 if using else 8), (engine, found.keys())
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=RTOL, atol=RTOL * float(tensor.abs().max()))


def trained_unused(rank: int, distribute, model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that have had gradients, after four steps; the model has been called once before it is wrapped."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
    model(x[0])
    wrapped, had = distribute(model), {}
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for step in x:
        wrapped(step[rank::2]).mean().backward()
        had |= {name: p for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return {name: work.whole(parameter) for name, parameter in had.items()}


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def compiled(rank: int) -> None:
    """A block that is sharded by itself, as one graph."""
    x, found = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1)), {}
    for how in ("unfused", "fused", "compiled"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(Ignoring(True), Gated()))
        model = fastpeft.patch(model, fastpeft.LoraConfig(target_modules="all-linear", r=2))
        randomise(model)
        if how != "unfused":
            fastpeft.fuse(model)(x[0])
        fully_shard(model[0])
        if how == "compiled":
            model[0].compile(backend="aot_eager")
        optimizer = torch.optim.SGD([p for p in fully_shard(model.train()).parameters() if p.requires_grad], lr=0.1)
        with counted(how == "compiled") as made:
            for step in x:
                model(step[rank::2]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert made == ({} if how == "unfused" else {3: 3, "mlp": 3}), (how, made)
        found[how] = torch.cat([work.whole(p).flatten() for p in model.parameters()])
    for how in ("fused", "compiled"):
        torch.testing.assert_close(found[how], found["unfused"], rtol=RTOL, atol=RTOL)
    torch._dynamo.reset()


# FSDP2. Each case: fusions, when, what is sharded by itself within the model, of its training micro, checkpointing and
# options of `fully_shard`; the ops.

FSDP = [
    (BOTH, "before", "layers", {}, {3: 6, "mlp": 8}),
    (BOTH, "after", "layers", {"micro": 2, "reshard_after_forward": True}, {3: 14, "mlp": 16}),
    (PROJECTIONS, "after", "root", {"checkpointing": "reentrant"}, {3: 12, 2: 12}),
    (BOTH, "before", "layers", {"checkpointing": "wrapper"}, {3: 12, "mlp": 16}),
    (BOTH, "after", "blocks", {"checkpointing": "without reentrance"}, {3: 12, "mlp": 16}),
    # Of q, k, v and gate, up, down these are sharded by themselves: they are called, and the MLP goes layer by layer.
    (BOTH, "before", ("q_proj", "down_proj"), {}, {2: 12}),
    (BOTH, "after", ("k_proj", "up_proj"), {"reshard_after_forward": True}, {2: 6}),
    (BOTH, "after", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), {}, {}),
]


def under_fsdp2(rank: int, folder: str, *args) -> dict:
    plain = fsdp.everything(rank, folder, *args)
    in_one_group(rank)
    half(rank)
    compiled(rank)
    same_file(Path(folder, "fused"), rank)
    refused(rank)
    return plain | {"fused": [fully_sharded(rank, *case) for case in FSDP]}


def shard(model: nn.Module, what, **options) -> nn.Module:
    if what == "root":
        return fully_shard(model, **options)
    for layer in model.base_model.layers:
        blocks = (layer.self_attn, layer.mlp) if what == "blocks" else ()
        parts = () if isinstance(what, str) else [part for name, part in layer.named_modules() if name.endswith(what)]
        for part in (*blocks, *parts):
            fully_shard(part, **options)
    return fsdp.shard(model, **options)


def fully_sharded(rank: int, names: tuple, when: str, what, case: dict, ops: dict) -> dict:
    options = dict(case)
    micro = options.pop("micro", 1)
    model = work.patched("lora")
    checkpointed(model, options.pop("checkpointing", None))
    classes = {module: type(module).__name__ for module in model.modules()}
    distributed(model, lambda: shard(model, what, **options), names, when)
    with counted() as made:
        losses = fsdp.train(model, rank, micro)
    assert made == ops, (names, when, what, case, made)
    result = result_of(model, losses)
    fastpeft.unfuse(model)
    assert all(type(module).__name__ in (name, f"FSDP{name}") for module, name in classes.items())
    fsdp.train(model, rank, steps=1)
    fastpeft.unpatch(model)
    return result


def in_one_group(rank: int) -> None:
    """Two projections are one group, which is whole when both have been called: no run has one of them."""
    model = fastpeft.fuse(work.patched("lora"))
    for layer in model.model.layers:
        fully_shard([layer.self_attn.k_proj, layer.self_attn.v_proj])
        fully_shard([layer.mlp.gate_proj, layer.mlp.up_proj])
    with counted() as made:
        losses = torch.tensor(fsdp.train(fsdp.shard(model), rank))
    assert not made, made
    torch.testing.assert_close(losses, torch.tensor(work.alone("lora")["losses"]), rtol=RTOL, atol=0)


def half(rank: int) -> None:
    """Computed in half precision by FSDP's policy."""
    expected = work.alone("lora")["losses"]
    with counted() as made:
        found = fsdp.train(fsdp.shard(fastpeft.fuse(work.patched("lora")), **fsdp.BFLOAT16), rank)
    assert made == {3: 6, "mlp": 8}
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=0)


def same_file(folder: Path, rank: int) -> None:
    """What a fused model saves, and gives as a state dict, is what it does unfused, byte for byte."""
    model = fsdp.shard(fastpeft.fuse(work.patched("lora")))
    fsdp.train(model, rank, steps=2)
    fastpeft.save_adapter(model, folder / "fused")
    names = [*model.state_dict()]
    fastpeft.unfuse(model)
    fastpeft.save_adapter(model, folder / "unfused")
    assert names == [*model.state_dict()]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "fused" / file).read_bytes() == (folder / "unfused" / file).read_bytes()


def refused(rank: int) -> None:
    """Weights that are sharded get no room, those with room are not sharded, and matrices that are sharded by
    themselves are no op's."""
    model = fsdp.shard(work.patched("lora"))
    said = fsdp.words(lambda: fastpeft.rehome(model))
    assert "of q_proj: its weight is a DTensor, and is whole in its layer's call alone" in said
    fastpeft.unrehome(model)
    with pytest.raises(NotImplementedError, match="does not support non-contiguous parameters"):
        fsdp.shard(fastpeft.rehome(work.patched("lora")))
    fsdp.shard(fastpeft.unrehome(fastpeft.rehome(work.patched("lora"))))
    for names in (PROJECTIONS, ("mlp",)):
        model = fastpeft.fuse(work.patched("lora"), *names)
        for path, module in model.named_modules():
            if path.endswith(("k_proj.lora_B.default", "up_proj.lora_B.default")):
                fully_shard(module)
        said = fsdp.words(lambda model=model: fsdp.train(fsdp.shard(model), rank))
        assert said.startswith("a factor of LoRA is sharded by itself")


# accelerate and the older FSDP.

FLAT = [
    (PROJECTIONS, "before", (), {}, {3: 6, 2: 6}),
    (BOTH, "after", (), {"micro": 2}, {3: 14, 2: 14}),
    (BOTH, "after", (), {"checkpointing": "without reentrance"}, {3: 12, 2: 12}),
    (BOTH, "before", (), {"checkpointing": "wrapper", "strategy": "SHARD_GRAD_OP"}, {3: 12, 2: 12}),
    (BOTH, "before", ("k_proj", "up_proj"), {}, {2: 6}),
    (BOTH, "after", ("q_proj", "gate_proj", "up_proj", "down_proj"), {"strategy": "NO_SHARD"}, {2: 6}),
]


def under_libraries(rank: int, folder: str, cases: list) -> dict:
    plain = libraries.everything(rank, folder, cases)
    flat_apart(rank)
    return plain | {
        "fused": with_accelerate(rank, Path(folder, "fused")),
        "fused flat": [flat(rank, *case) for case in FLAT],
    }


def with_accelerate(rank: int, folder: Path) -> dict:
    patched = work.patched
    with counted() as made, mock.patch.object(work, "patched", lambda method: fastpeft.fuse(patched(method))):
        result = libraries.one(rank, folder, "lora", "fsdp2")
    assert made == {3: 14, "mlp": 16}, made
    return result


def wrapped_flat(model: nn.Module, is_wrapped, strategy: str = "FULL_SHARD") -> FullyShardedDataParallel:
    policy, cpu = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_wrapped), torch.device("cpu")
    options = {"sharding_strategy": ShardingStrategy[strategy], "use_orig_params": True, "device_id": cpu}
    with mock.patch("torch.distributed.fsdp._init_utils._get_compute_device", lambda *args: cpu):
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)


def flat(rank: int, names: tuple, when: str, alone: tuple, case: dict, ops: dict) -> list[float]:
    """The losses where layers, and the projections `alone`, are wrapped by themselves."""
    model = work.patched("lora")
    checkpointed(model, case.get("checkpointing"))
    units = {*model.model.layers, *(module for name, module in model.named_modules() if name.endswith(alone or "none"))}
    strategy = case.get("strategy", "FULL_SHARD")
    wrapped = distributed(model, lambda: wrapped_flat(model, units.__contains__, strategy), names, when)
    with counted() as made:
        micro = case.get("micro", 1)
        losses = work.train(model, wrapped, rank=rank, world=2, micro=micro, unsynced=wrapped.no_sync)
    assert made == ops, (names, when, alone, case, made)
    said = fsdp.words(lambda: fastpeft.rehome(model))
    assert "its weight belongs to a FullyShardedDataParallel, and is whole in its layer's call alone" in said
    return losses


def flat_apart(rank: int) -> None:
    """Matrices that are wrapped by themselves are not read past their wrapper, with shards or without, also where the
    calls before have gone together."""
    for targets, strategy in itertools.product(("qkv", ("gate", "up", "down")), ("FULL_SHARD", "NO_SHARD")):
        config = fastpeft.LoraConfig(target_modules=[f"{name}_proj" for name in targets], r=4)
        model = fastpeft.fuse(fastpeft.patch(work.tiny(), config))
        with counted() as made:
            for _ in range(2):
                model(**work.batches("CAUSAL_LM")[0])
        assert made == ({3: 2} if targets == "qkv" else {"mlp": 4}), (targets, made)
        units = {module for name, module in model.named_modules() if name.endswith("default")}
        wrapped = wrapped_flat(model, units.__contains__, strategy)
        said = fsdp.words(functools.partial(wrapped, **work.batches("CAUSAL_LM")[0]))
        assert said.startswith("a factor of LoRA is in a FullyShardedDataParallel of its own"), said
