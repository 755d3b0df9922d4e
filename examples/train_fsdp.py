"""Train a LoRA of a causal language model that is sharded over many GPUs by FSDP2.

    torchrun --standalone --nproc-per-node 8 examples/train_fsdp.py --model DIR --data FILE

and on four machines of eight GPUs, on each of them, with HOST the first one's name:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-id 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/train_fsdp.py --model DIR --data FILE --replicas 4

Without arguments it trains a tiny model of random weights on the bytes of this file, also without a GPU:

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py

The base is in bfloat16 and frozen, the adapter in fp32. The first process alone loads the weights; the others get their
shards of them. Every `--save-every` steps, and in the end, the adapter goes to `OUT/step-N` in HF peft's format, with
the optimizer's state beside it; the same command again goes on from the newest. With `--replicas N` parameters are
sharded within one of N groups of processes only, for example within each machine.
docs/distributed.md says how much memory and traffic that makes.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import fastpeft

DONE = "done.json"  # written last, into a step's folder


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a causal language model and its tokenizer")
    parser.add_argument("--data", type=Path, default=Path(__file__), help="a text")
    parser.add_argument("--out", type=Path, default=Path("fsdp-output"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, of all processes together")
    parser.add_argument("--sequence", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--replicas", type=int, default=1, help="groups of processes, in each of which all shards are")
    parser.add_argument("--save-every", type=int, default=10)
    return parser.parse_args(argv)


def load(options: argparse.Namespace) -> torch.nn.Module:
    """The model in the first process; in the others one without values, whose memory is never touched."""
    config = tiny_config() if options.model is None else AutoConfig.from_pretrained(options.model)
    if dist.get_rank() == 0 and options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    empty = empty.to_empty(device="cpu")
    empty.tie_weights()
    return empty


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """Each decoder layer by itself, then what is left; the values are those of the first process."""
    values = model.state_dict() if dist.get_rank() == 0 else {}
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    for module in model.modules():
        for name, buffer in module._buffers.items():  # what no state dict has, such as rotary frequencies
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
                dist.broadcast(module._buffers[name], 0)
    return model


def mesh_of(options: argparse.Namespace) -> DeviceMesh:
    kind, world = ("cuda" if torch.cuda.is_available() else "cpu"), dist.get_world_size()
    if world % options.replicas:
        raise SystemExit(
            f"--replicas {options.replicas}: {world} processes are no {options.replicas} groups of one size"
        )
    if options.replicas == 1:
        return init_device_mesh(kind, (world,))
    return init_device_mesh(kind, (options.replicas, world // options.replicas), mesh_dim_names=("replicas", "shards"))


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    if options.model is None:
        return torch.frombuffer(bytearray(options.data.read_bytes()), dtype=torch.uint8).long()
    text = options.data.read_text(encoding="utf-8")
    return torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])


def rows(tokens: torch.Tensor, step: int, options: argparse.Namespace) -> torch.Tensor:
    """This process's share of a step's batch, which depends on nothing but the step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - options.sequence, (options.batch,), generator=generator)
    mine = starts[dist.get_rank() :: dist.get_world_size()]
    return torch.stack([tokens[start : start + options.sequence] for start in mine])


def newest(out: Path) -> tuple[int, Path | None]:
    """The number and the folder of the last step that is complete."""
    done = sorted(out.glob(f"step-*/{DONE}"), key=lambda file: json.loads(file.read_text())["step"])
    return (json.loads(done[-1].read_text())["step"], done[-1].parent) if done else (0, None)


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """Called in every process. The folder counts once it has DONE."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    fastpeft.save_adapter(model, folder)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "optimizer")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "done.tmp").write_text(json.dumps({"step": step}))
        (folder / "done.tmp").rename(folder / DONE)


def train(options: argparse.Namespace) -> list[float]:
    """Losses of the steps that were made."""
    if options.batch % dist.get_world_size():
        raise SystemExit(f"--batch {options.batch}: not a multiple of the {dist.get_world_size()} processes")
    mesh, tokens, model = mesh_of(options), tokens_of(options), load(options)
    first, folder = newest(options.out)
    if folder is None:
        config = fastpeft.LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        fastpeft.patch(model, config)
    else:
        fastpeft.load_adapter(model, folder, trainable=True)
    model = shard(model, mesh).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.rate)
    if folder is not None:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / "optimizer")
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    losses = []
    for step in range(first, options.steps):
        ids = rows(tokens, step, options).to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save(model, optimizer, options.out / f"step-{step + 1}", step + 1)
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    options = arguments(argv)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    losses = train(options)
    if began:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
