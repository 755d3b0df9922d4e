"""What the processes of the distributed tests of PeftModels do."""

import torch
import torch.distributed as dist
from torch import nn

import fastpeft
from tests import distributed_work as work
from tests.distributed_fused import counted
from tests.models import tiny
from tests.peft_pair import quietly, randomise

METHODS = list(work.METHODS)


def patched(method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny PeftModel with our arithmetic, in training mode; the same numbers at every call."""
    task, kind, settings = work.METHODS[method]
    torch.manual_seed(3)
    model = quietly(fastpeft.get_peft_model, tiny(task=task, dtype=dtype), kind(task_type=task, **settings))
    randomise(model)
    return model.train()


def train(model: nn.Module, method: str, wrapped=None, rank: int = 0, world: int = 1) -> dict:
    """Losses, trained parameters and AdaLoRA's ranks, of the whole batch of each step."""
    wrapped = model if wrapped is None else wrapped
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for step, inputs in enumerate(work.batches(work.METHODS[method][0])):
        loss = wrapped(**{key: value[rank::world] for key, value in inputs.items()}).loss
        loss.backward()
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        total = loss.detach().float()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return work.result_of(model, losses)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def sharded_names(model: nn.Module) -> list[str]:
    """The classes that `fully_shard` has given."""
    return [kind for module in model.modules() if (kind := type(module).__name__).startswith("FSDP")]


def everything(rank: int, folder: str) -> dict[str, dict]:
    """Each method under DDP, and sharded layer by layer; the adapters that both have in the end as peft saves them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    out, world = {}, dist.get_world_size()
    for method in METHODS:
        model = patched(method)
        out[f"ddp {method}"] = train(model, method, DistributedDataParallel(model), rank, world)
        if method == "adalora":
            continue  # whose allocator writes to parameters by itself
        model = patched(method)
        for layer in layers_of(model):
            fully_shard(layer)
        fully_shard(model)
        out[f"fsdp {method}"] = train(model, method, None, rank, world)
        sharded = sharded_names(model)
        fastpeft.unpatch(model)
        assert sharded_names(model) == sharded and len(sharded) == len(layers_of(model)) + 1
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0 and "prompt_encoder" not in model._modules:
            model.save_pretrained(f"{folder}/{method}", state_dict=full)
    return out | {f"{engine} lora": fused(rank, engine) for engine in ("fused-ddp", "fused-fsdp")}


def fused(rank: int, engine: str) -> dict:
    """Fused before it is wrapped, or after it is sharded."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = patched("lora")
    if engine == "fused-ddp":
        wrapped = DistributedDataParallel(fastpeft.fuse(model))
    else:
        for layer in layers_of(model):
            fully_shard(layer)
        wrapped = fastpeft.fuse(fully_shard(model))
    with counted() as made:
        result = train(model, "lora", wrapped, rank, dist.get_world_size())
    assert made == {3: 6, "mlp": 8}, (engine, made)
    return result
