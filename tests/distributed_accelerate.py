"""What the processes of the tests with accelerate, the older FSDP and transformers' tensor parallelism do."""

import functools
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import DataLoader

import fastpeft
from tests import distributed_work as work


def accelerator(engine: str) -> Accelerator:
    """One of the engines: "ddp", "fsdp2", or "fsdp2-efficient", where the values are those of the first process. FSDP2
    it has on GPUs and their like alone, so it is told to be there."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if engine != "ddp":
        settings = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT"}
        settings["cpu_ram_efficient_loading"] = engine == "fsdp2-efficient"
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def rows(task: str) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value[row] for key, value in batch.items()} for batch in work.batches(task) for row in range(work.ROWS)
    ]


STATES = (("lora-head", "ddp"), ("lora-head", "fsdp2"), ("prefix-projection", "fsdp2"))
FLAT = ("lora", "embedding", "adalora", "prefix", "p-tuning", "adapter", "lora-head")


def everything(rank: int, folder: str, cases: list[tuple[str, str]]) -> dict:
    """One pair of processes does it all. Each case is a method and an engine of accelerate's."""
    return {
        "accelerated": [one(rank, Path(folder, engine, method), method, engine) for method, engine in cases],
        "states": {each: goes_on_from_a_state(rank, Path(folder, "states", *each), *each) for each in STATES},
        "flat": {method: flat(rank, method, folder) for method in FLAT},
        "tensor parallel": tensor_parallel(rank, Path(folder, "base")),
    }


def one(rank: int, folder: Path, method: str, engine: str) -> dict:
    """Each batch is accumulated in two parts."""
    efficient, engine = engine == "fsdp2-efficient", accelerator(engine)
    model = work.patched(method)
    for parameter in model.parameters() if efficient and rank else ():
        parameter.data.zero_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    loader = DataLoader(rows(work.METHODS[method][0]), batch_size=work.ROWS // engine.num_processes // 2)
    wrapped, optimizer, loader = engine.prepare(model, optimizer, loader)
    inner, losses, step = engine.unwrap_model(wrapped), [], 0
    for inputs in loader:
        with engine.accumulate(wrapped):
            loss = wrapped(**inputs).loss
            engine.backward(loss)
            optimizer.step()
            if engine.sync_gradients and isinstance(inner.peft_config["default"], fastpeft.AdaLoraConfig):
                step += 1
                fastpeft.update_and_allocate(inner, step)
            optimizer.zero_grad()
        losses.append(engine.gather(loss.detach()).mean().item())
    parts = torch.tensor(losses).view(-1, 2)
    result = work.result_of(inner, parts.mean(1).tolist()) | {"class": type(wrapped).__name__}
    full = engine.get_state_dict(wrapped)
    if engine.is_main_process:
        work.quietly(fastpeft.save_adapter, inner, folder, state_dict=full)
    engine.wait_for_everyone()
    return result


def goes_on_from_a_state(rank: int, folder: Path, method: str, engine: str) -> bool:
    """Whether two steps after accelerate's `load_state` have the losses of those after its `save_state`."""
    engine = accelerator(engine)
    model = work.patched(method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    wrapped, optimizer = engine.prepare(model, optimizer)
    inputs = {key: value[rank::2] for key, value in work.batches(work.METHODS[method][0])[0].items()}

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = wrapped(**inputs).loss
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    steps(1)
    engine.save_state(folder)
    expected = steps(2)
    engine.load_state(folder)
    return steps(2) == expected and expected[0] != expected[1]


def flat(rank: int, method: str, folder: str) -> list:
    """The losses under the class FullyShardedDataParallel, with what fastpeft refuses; on a CPU, where torch does not
    let it begin."""
    model = work.patched(method)
    layers = {type(layer) for layer in model.base_model.layers}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
    cpu = torch.device("cpu")
    with mock.patch("torch.distributed.fsdp._init_utils._get_compute_device", lambda *args: cpu):
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    said = [refusal(lambda: fastpeft.save_adapter(model, folder))]
    try:
        return [*work.train(model, wrapped, rank=rank, world=dist.get_world_size()), *said]
    except fastpeft.PatchError as error:
        return [str(error), *said]


def refusal(action) -> str:
    try:
        action()
    except fastpeft.FastpeftError as error:
        return str(error)
    return "not refused"


def tensor_parallel(rank: int, folder: Path) -> list[str]:
    if rank == 0:
        work.tiny().save_pretrained(folder)
    dist.barrier()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    configs = [kind(task_type=task, **settings) for task, kind, settings in work.METHODS.values()]
    said = [refusal(lambda config=config: fastpeft.patch(model, config)) for config in configs]
    assert not hasattr(model, "_fastpeft")
    return said
