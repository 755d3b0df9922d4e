"""What the processes of the FSDP2 tests do."""

import contextlib
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastpeft
from tests import distributed_work as work
from tests.models import tiny

HALF = 2  # steps after which training is interrupted
BFLOAT16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


def shard(model: nn.Module, **options) -> nn.Module:
    """Each decoder layer, then the root."""
    for layer in model.base_model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, rank: int, micro: int = 1, **options) -> list[float]:
    @contextlib.contextmanager
    def unsynced():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    world = dist.get_world_size()
    return work.train(model, rank=rank, world=world, micro=micro, unsynced=unsynced, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def everything(rank: int, folder: str, cases: list, saved: list, interrupted: list) -> dict:
    """One pair of processes does it all."""
    return {
        "trained": [trained(rank, method, case) for method, case in cases],
        "saved": [saves(rank, method, Path(folder)) for method in saved],
        "resumed": [resumes(rank, method, Path(folder)) for method in interrupted],
        "state dicts": state_dicts(rank),
        "refused": refusals(rank, folder),
        "half": {method: train(shard(work.patched(method), **BFLOAT16), rank) for method in HALVED},
        "half base": half_bases(rank),
        "verbs": verbs(rank),
    }


HALVED = ("lora", "rslora-dora", "adalora", "prefix", "prompt", "adapter", "lora-head")


def trained(rank: int, method: str, case: dict) -> dict:
    """A case is, of a method's training: micro, checkpointing, and the options of `fully_shard`."""
    options = dict(case)
    micro = options.pop("micro", 1)
    model = work.patched(method)
    work.checkpointing(model, options.pop("checkpointing", None))
    shard(model, **options)
    return work.result_of(model, train(model, rank, micro))


def saves(rank: int, method: str, folder: Path) -> dict[str, torch.Tensor]:
    """Every process calls, one writes; or it is written by the first alone, from a whole state dict."""
    model = shard(work.patched(method))
    train(model, rank, steps=HALF)
    model.save_pretrained(folder / "gathered" / method, is_main_process=rank == 0)
    assert (folder / "gathered" / method / "adapter_config.json").exists()  # in every process
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fastpeft.save_adapter(model, folder / "from state dict" / method, state_dict=full)
        importances = [each for each in said if "saved without the importances" in str(each.message)]
        assert len(importances) == (method == "adalora")
    tensors = fastpeft.adapter_state_dict(model)
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    train(model, rank, first=HALF)  # nothing was changed by it
    return tensors


def resumes(rank: int, method: str, folder: Path) -> dict:
    """Half of the training, an adapter and a checkpoint of the optimizer; a new model, the adapter, then sharding."""
    model = shard(work.patched(method))
    optimizer = sgd(model)
    losses = train(model, rank, steps=HALF, optimizer=optimizer)
    where = folder / "interrupted" / method
    fastpeft.save_adapter(model, where)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=where / "optimizer")
    task, _, _ = work.METHODS[method]
    model = shard(fastpeft.load_adapter(tiny(task=task), where, trainable=True).train())
    optimizer = sgd(model)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=where / "optimizer")
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    losses += train(model, rank, first=HALF, optimizer=optimizer)
    return work.result_of(model, losses)


def state_dicts(rank: int) -> list[str]:
    """Whole and sharded state dicts of a model go into another: the names of what differs then."""
    wrong = []
    for method in ("lora-head", "prefix-projection", "rslora-dora"):
        model, other = shard(work.patched(method)), shard(work.patched(method))
        train(model, rank, steps=1)
        full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        set_model_state_dict(other, whole if rank == 0 else {}, options=full)
        wrong += [f"whole {name}" for name in differing(model, other)]
        third = shard(work.patched(method))
        set_model_state_dict(third, get_model_state_dict(model))
        wrong += [f"sharded {name}" for name in differing(model, third)]
        assert list(differing(model, shard(work.patched(method))))
    return wrong


def differing(model: nn.Module, other: nn.Module):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if not torch.equal(work.whole(mine), work.whole(theirs)):
            yield name


def words(action) -> str:
    try:
        action()
    except fastpeft.FastpeftError as error:
        return str(error)
    return "not refused"


def refusals(rank: int, folder: str) -> dict[str, str]:
    out, sharded = {}, shard(tiny())
    for method in ("lora", "adalora", "prefix", "prompt", "p-tuning", "adapter"):
        task, kind, settings = work.METHODS[method]
        config = kind(task_type=task, **settings)
        out[f"order {method}"] = words(lambda config=config: fastpeft.patch(sharded, config))
    assert not hasattr(sharded, "_fastpeft")
    out["order load"] = words(lambda: fastpeft.load_adapter(sharded, f"{folder}/gathered/lora"))
    model = shard(work.patched("lora"))
    config = fastpeft.LoraConfig(target_modules=["q_proj"])
    out["order add"] = words(lambda: model.add_adapter("b", config))
    out["merge"] = words(lambda: fastpeft.merge(model))
    file = Path(folder, "file")
    if rank == 0:
        file.write_text("in the way")
    dist.barrier()
    out["save"] = words(lambda: fastpeft.save_adapter(model, file))
    out["lacking"] = words(lambda: fastpeft.save_adapter(model, file, state_dict={}))
    parts = {"lora": "lora_A.default", "prefix": "embedding", "prefix-projection": "transform.2", "prompt": "default"}
    for method, part in parts.items():
        model = work.patched(method)
        for module in [module for path, module in model.named_modules() if path.endswith(part)]:
            fully_shard(module)
        shard(model)
        out[f"part {method}"] = words(lambda model=model: train(model, rank))
    out["dtypes"] = words(lambda: train(shard(both()), rank))
    out["head"] = words(lambda: train(shard(work.patched("prefix-head", torch.bfloat16)), rank))
    return out


def both() -> nn.Module:
    """A half-precision model with a gated prompt, in its dtype, and a LoRA in fp32."""
    model = work.patched("adapter", torch.bfloat16)
    model.add_adapter("b", fastpeft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter(["default", "b"])
    return model


def half_bases(rank: int) -> dict[str, list[float]]:
    """On a half-precision base: adapters in fp32 beside it, and what the refusal of two dtypes advises."""
    heads = work.patched("prefix-head", torch.bfloat16)
    fully_shard(heads.score)
    models = {"lora": shard(work.patched("lora", torch.bfloat16)), "prefix-head": shard(heads)}
    widened = both()
    for parameter in widened.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    models["both"] = shard(widened, **BFLOAT16)
    return {name: train(model, rank) for name, model in models.items()}


def verbs(rank: int) -> None:
    """What may be done to a sharded model."""
    inputs = work.batches("CAUSAL_LM")[0]
    with torch.no_grad():
        base, adapted = tiny()(**inputs).logits, work.patched("lora")(**inputs).logits
        model = shard(work.patched("lora"))
        kind = type(model)
        with fastpeft.disable_adapter(model):
            assert torch.equal(model(**inputs).logits, base)
        assert torch.equal(model(**inputs).logits, adapted)
        assert fastpeft.report(model).layers and model.get_nb_trainable_parameters()[0]
        model.set_adapter("default")
        assert type(model) is kind and torch.equal(model(**inputs).logits, adapted)
        # One layer and its parts are sharded by themselves too: a layer's forward makes the factors below it whole.
        finer = work.patched("lora")
        for module in finer.modules():
            if hasattr(module, "lora_A"):
                fully_shard(module)
        assert torch.equal(fully_shard(finer)(**inputs).logits, adapted)
        fastpeft.unpatch(model)
        assert torch.equal(model(**inputs).logits, base) and kind.__name__ == type(model).__name__
    assert hasattr(model, "set_requires_gradient_sync") and not hasattr(model, "peft_config")


def hybrid(rank: int, cases: list[str], folder: str) -> list[dict]:
    """Replicas of two processes each, between which parameters are sharded."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    out = []
    for method in cases:
        model = shard(work.patched(method), mesh=mesh)
        out.append(work.result_of(model, train(model, rank)))
        fastpeft.save_adapter(model, Path(folder, method))
    return out
