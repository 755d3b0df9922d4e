"""What a prompt in front of embeddings is measured against, and ours: a table of named implementations.

Timed is what the model's entrance does with the tokens' numbers, the frozen table and the learned rows, forward and
backward: the look-up, the prompt's cast and repetition, and their concatenation. HF peft extends masks and labels
besides, which is little and the same for all.
"""

import torch
import torch.nn.functional as F

from .baselines import Implementation, Missing, in_force
from .harness import Call
from .prompt_embedding_truth import Inputs, concatenated
from .report import FLOOR

ADAPTER = torch.float32


class _Anchored(torch.autograd.Function):
    """The look-up in a frozen table, hung on one number that wants a gradient, as there is no other leaf: backward sets
    it to zero, and has nothing else to do."""

    @staticmethod
    def forward(ctx, anchor, ids, table):
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(1, dtype=ADAPTER), None, None


def call_of(forward, leaves, inputs: Inputs, **options) -> Call:
    return Call(forward, leaves, inputs.grad, {"ids": inputs.ids, "table": inputs.table}, activations=(), **options)


def build_floor(inputs: Inputs) -> Call:
    """The tokens' embeddings alone."""
    leaves = {"anchor": torch.zeros(1, device=inputs.table.device, requires_grad=True)}
    call = call_of(lambda: _Anchored.apply(leaves["anchor"], inputs.ids, inputs.table), leaves, inputs)
    call.grad = inputs.grad[:, len(inputs.prompt) :]
    return call


def build_peft(inputs: Inputs) -> Call:
    """peft's PromptEmbedding, get_prompt and PeftModelForCausalLM.forward, up to the base model."""
    leaves, batch = inputs.leaves(), len(inputs.ids)
    numbers = torch.arange(len(inputs.prompt), device=inputs.ids.device)

    def forward():
        embeds = F.embedding(inputs.ids, inputs.table)
        tokens = numbers.unsqueeze(0).expand(batch, -1)
        prompts = F.embedding(tokens[:1], leaves["prompt"]).repeat(batch, 1, 1)
        return torch.cat((prompts.to(embeds.dtype), embeds), dim=1)

    return call_of(forward, leaves, inputs)


def build_cat(inputs: Inputs, concatenate=concatenated) -> Call:
    leaves = inputs.leaves()
    return call_of(lambda: concatenate(inputs.ids, inputs.table, leaves["prompt"]), leaves, inputs)


def build_compiled(inputs: Inputs) -> Call:
    torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
    return build_cat(inputs, torch.compile(concatenated, dynamic=False))


def prompted(inputs: Inputs, prompt: torch.Tensor) -> torch.Tensor:
    from fastpeft.ops import prompt_embedding

    return prompt_embedding(inputs.ids, inputs.table, prompt)


def build_fastpeft(inputs: Inputs, *, backend: str = "auto", op=prompted) -> Call:
    """Ours: op(inputs, prompt)."""
    context, leaves = in_force(backend, None), inputs.leaves()
    from fastpeft.errors import BackendError

    def forward():
        try:
            return op(inputs, leaves["prompt"])
        except BackendError as error:
            raise Missing(str(error)) from error

    return call_of(forward, leaves, inputs, context=context)


def ours(name: str, label: str, *, backend: str = "auto", strategy: str | None = None, op=prompted) -> Implementation:
    """`strategy`: what it is called where it is forced, of which there is but one for each backend."""

    def build(inputs: Inputs) -> Call:
        return build_fastpeft(inputs, backend=backend, op=op)

    options = {"needs_gpu": backend == "triton", "peer": False, "adapter_dtype": ADAPTER}
    return Implementation(name, label, build, strategy=strategy or backend, **options)


def peer(name: str, label: str, build, **options) -> Implementation:
    return Implementation(name, label, build, adapter_dtype=ADAPTER, **options)


IMPLEMENTATIONS = (
    Implementation(FLOOR, "the tokens' embeddings alone", build_floor),
    peer("peft", "HF peft: the prompt looked up, repeated, cast and concatenated with the embeddings", build_peft),
    peer("cat", "the prompt expanded, cast and concatenated with the embeddings", build_cat),
    peer("compile", "the same under torch.compile", build_compiled, compiled=True),
    ours("fastpeft", "fastpeft, its own choice"),
    ours("fastpeft:fused", "one kernel writes both kinds of rows", backend="triton", strategy="fused"),
    ours("fastpeft:torch", "fastpeft, torch backend", backend="torch"),
)
