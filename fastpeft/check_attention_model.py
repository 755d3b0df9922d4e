"""A whole model with virtual tokens: logits, adapter gradients and greedy decoding computed by fastpeft's ops, by the
plain formula in the same dtype, by the plain formula in float64, and by HF peft, from the same weights."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

import fastpeft
from fastpeft import check_model
from fastpeft.attention import interface
from fastpeft.attention.sites import find_sites
from fastpeft.attention_oracle import plain_attention
from fastpeft.check_batches import Batch
from fastpeft.check_model import Outcome
from fastpeft.configs import TaskType
from fastpeft.local_model import task_of

KINDS = {"prefix": "PrefixTuningConfig", "adapter": "AdaptionPromptConfig"}
FIELDS = {
    "prefix": ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    "adapter": ("adapter_len", "adapter_layers", "target_modules"),
}
TABLE = "prompt_encoder.default.embedding.weight"
STEPS = 8  # tokens that are decoded
GATE = 0.7  # they begin at zero, where prompts do nothing


class Decoded(NamedTuple):
    """Of greedy decoding with a cache: the logits of every step, (B · STEPS, vocabulary), and the tokens (B, STEPS)."""

    logits: torch.Tensor
    tokens: torch.Tensor


def patched(method: str, base: nn.Module, tokens: int) -> nn.Module:
    """A copy with that many virtual tokens in every layer, which computes what HF peft does, to be compared with it.
    Raises FastpeftError where the method does not serve it."""
    settings = {"num_virtual_tokens": tokens}
    if method == "adapter":
        settings = {"adapter_len": tokens, "adapter_layers": len(find_sites(base).attention)}
    config = getattr(fastpeft, KINDS[method])(**settings, task_type=task_of(type(base).__name__).value)
    torch.manual_seed(0)
    model = fastpeft.patch(copy.deepcopy(base), config, hf_quirks=True).eval()
    with torch.no_grad():
        for name, parameter in trained(method, model).items():
            if "gate" in name:
                parameter.fill_(GATE)
    return model


def peft_model(peft, method: str, base: nn.Module, model: nn.Module) -> nn.Module:
    """HF peft's model of this base with the virtual tokens of ours."""
    config = model.peft_config["default"]
    settings = {name: getattr(config, name) for name in FIELDS[method]}
    kind = getattr(peft, KINDS[method])
    other = peft.get_peft_model(copy.deepcopy(base), kind(**settings, task_type=config.task_type.value)).eval()
    values = trained(method, model)
    with torch.no_grad():
        for name, parameter in trained(method, other).items():
            parameter.copy_(values[name])
    return other


def trained(method: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The virtual tokens' parameters, under the same names in peft's model and in ours."""
    if method == "prefix":
        return {TABLE: model.get_parameter(TABLE)}
    found = {}
    for kind in ("adaption_prompt", "adaption_gate"):
        own = [parameter for name, parameter in model.named_parameters() if f".{kind}" in name]
        found |= {f"{kind}.{layer}": parameter for layer, parameter in enumerate(own)}
    return found


def outcome(method: str, model: nn.Module, batch: Batch) -> Outcome:
    """Logits and gradients. A prefix's by layer; the gates, one number each, in one tensor."""
    found = check_model.outcome(model, batch, trained(method, model))
    if method == "prefix":
        length, columns = found[TABLE].shape
        blocks = columns // model.peft_config["default"].token_dim
        both = found.pop(TABLE).view(length, blocks // 2, 2, -1).unbind(2)
        for name, grad in zip(("prefix_key", "prefix_value"), both, strict=True):
            found |= {f"{name}.{layer}": each for layer, each in enumerate(grad.unbind(1))}
        return found
    gates = [found.pop(name) for name in list(found) if name.startswith("adaption_gate")]
    return {**found, "adaption_gate": torch.cat(gates)}


@contextlib.contextmanager
def plain(by_sdpa: bool = False) -> Iterator[None]:
    """Within the block attention over virtual tokens is the plain formula; `by_sdpa`: torch's own attention, where that
    serves it."""
    kept = interface.prefix_attention, interface.gated_prompt_attention
    function = functools.partial(plain_attention, by_sdpa=by_sdpa)
    interface.prefix_attention = interface.gated_prompt_attention = function
    try:
        yield
    finally:
        interface.prefix_attention, interface.gated_prompt_attention = kept


def decodes(batch: Batch) -> bool:
    return batch.task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)


@torch.no_grad()
def decode(model: nn.Module, batch: Batch, forced: torch.Tensor | None = None) -> Decoded:
    """Greedy, or of the tokens that are `forced`, so that the logits of several models can be compared."""
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    ended = None if forced is None else [Forced(forced)]
    out = model.generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1, output_logits=True,
        return_dict_in_generate=True, logits_processor=ended,
    )  # fmt: skip
    return Decoded(torch.stack(out.logits, 1).flatten(0, 1), out.sequences[:, -STEPS:])


class Forced:
    """A logits processor of transformers' generation: at each step the given token (B, STEPS)."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.step = tokens, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
