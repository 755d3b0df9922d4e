"""What a training step keeps for backward, byte by byte: a model of it for decoders with a gated MLP (Llama, Mistral,
Qwen3, ...) in half precision with LoRA on every linear layer, and how many tokens fit without activation checkpointing.

    python -m benchmarks.memory [--shape llama3-8b] [--tokens 16384] [--rank 16] [--gib 139]

The tests hold it against the storages that autograd saves, and against those that are alive at the peak of a step. It
counts transformers' own modules beside the linear layers: RMS norms (an fp32 copy of their input and a number for each
token), attention through a flash kernel (q, k, v, its result, the log-sum-exp), the loss over fp32 logits. The peak is
taken to be at the beginning of backward, in the loss, where all that is kept is still there; the buffers of a layer's
backward are smaller than what the logits of a large vocabulary take. Not in it: what an allocator rounds up, and the
adapters (fp32, with a gradient and Adam's moments: 16 bytes a parameter).
"""

import argparse
from dataclasses import dataclass

from .geometry import GEOMETRIES, Geometry

HALF, FP32 = 2, 4
KEPT_OF_MLP = {  # tensors of its width: gate and up; act(gate) and the product too where it is not one op
    "fastpeft": 4,
    "fastpeft, MLP fused": 2,
    "fastpeft, recompute": 0,  # fuse(model, "mlp", recompute=True)
}
IMPLEMENTATIONS = (*KEPT_OF_MLP, "peft")


@dataclass(frozen=True)
class Sizes:
    """Numbers of a decoder layer. queries, keys: heads times depth; layers and vocabulary of the model."""

    hidden: int
    queries: int
    keys: int
    heads: int
    mlp: int
    layers: int
    vocabulary: int

    @property
    def inputs(self) -> int:
        """Of all seven linear layers."""
        return 3 * self.hidden + self.queries + 2 * self.hidden + self.mlp


def sizes_of(geometry: Geometry) -> Sizes:
    """Raises KeyError for a model without the linear layers that are counted here."""
    hidden, mlp = geometry.linears["gate/up"]
    queries, keys = geometry.linears["q/o"][1], geometry.linears["k/v"][1]
    layers = geometry.arguments["num_hidden_layers"]
    return Sizes(hidden, queries, keys, geometry.heads, mlp, layers, geometry.vocabulary)


def per_token(sizes: Sizes, implementation: str, rank: int, dropout: bool, mask_bytes: int = 1) -> int:
    """Bytes that one layer keeps of one token. The adapters are fp32, as HF peft makes them.

    Ours keep each distinct input once, in half precision, and S; of dropout nothing but a seed a layer. peft keeps an
    fp32 copy of its input for each linear layer, and with dropout a mask of `mask_bytes` an element (1 on a GPU, where
    torch's mask is boolean; 4 on a CPU). That the first layer has no masks for q, k and v is left out.
    """
    norms = 2 * (FP32 * sizes.hidden + FP32)
    attention = HALF * (2 * sizes.queries + 2 * sizes.keys) + FP32 * sizes.heads
    low_rank = 7 * FP32 * rank
    if implementation == "peft":
        copies = FP32 * sizes.inputs + (mask_bytes * sizes.inputs if dropout else 0)
        return norms + attention + low_rank + copies + 3 * HALF * sizes.mlp
    return norms + attention + low_rank + 2 * HALF * sizes.hidden + KEPT_OF_MLP[implementation] * HALF * sizes.mlp


def outside(sizes: Sizes) -> int:
    """Bytes that a token keeps beside the layers: log-probabilities in fp32, its label, and the rotary embedding. The
    last norm's are those that the first norm of all does not keep, in front of which nothing is trained."""
    return FP32 * sizes.vocabulary + 8 + 2 * HALF * (sizes.queries // sizes.heads)


def logits(sizes: Sizes) -> int:
    """Bytes of a token that are alive at the peak beside what is kept: the model's own logits, which its output holds,
    and in fp32 the gradients of the log-probabilities and of the logits, of which the loss makes one from the other."""
    return (HALF + 2 * FP32) * sizes.vocabulary


def weights(sizes: Sizes) -> int:
    """Bytes of the frozen model in half precision, head and embeddings apart."""
    attention = 2 * sizes.hidden * (sizes.queries + sizes.keys)
    return HALF * (
        sizes.layers * (attention + 3 * sizes.hidden * sizes.mlp) + 2 * sizes.vocabulary * sizes.hidden
    )  # fmt: skip


def most_tokens(sizes: Sizes, implementation: str, rank: int, dropout: bool, memory: int) -> int:
    """How many tokens' activations fit beside the weights in `memory` bytes."""
    each = sizes.layers * per_token(sizes, implementation, rank, dropout) + outside(sizes) + logits(sizes)
    return max(0, (memory - weights(sizes)) // each)


def table(shape: str, tokens: int, rank: int, memory: int) -> list[str]:
    """Lines in which every implementation stands with and without dropout."""
    sizes = sizes_of(GEOMETRIES[shape])
    lines = [
        f"{shape}, LoRA of rank {rank} on every linear layer, {tokens} tokens, no checkpointing; weights "
        f"{weights(sizes) / 2**30:.1f} GiB of {memory / 2**30:.0f} (a model of it, tested against counted bytes)",
        f"{'':20}  dropout  kB/token/layer  peak GiB  with weights  most tokens",
    ]
    for implementation in IMPLEMENTATIONS:
        for dropout in (False, True):
            layer = per_token(sizes, implementation, rank, dropout)
            peak = tokens * (sizes.layers * layer + outside(sizes) + logits(sizes))
            most = most_tokens(sizes, implementation, rank, dropout, memory)
            lines.append(
                f"{implementation:20}  {'yes' if dropout else 'no':>7}  {layer / 1e3:14.1f}  {peak / 2**30:8.1f}  "
                f"{(peak + weights(sizes)) / 2**30:12.1f}  {most:11,}"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    shapes = [name for name, each in GEOMETRIES.items() if "gate/up" in each.linears]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", choices=shapes, default="llama3-8b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gib", type=float, default=139.0, help="of the GPU (default: an H200's)")
    options = parser.parse_args(arguments)
    print("\n".join(table(options.shape, options.tokens, options.rank, int(options.gib * 2**30))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
