"""Attention modules that carry virtual tokens: what they add to their own class, and where the tokens come from.

A prefix shares the softmax of the sequence. A gated prompt (LLaMA-Adapter, Zhang et al., arXiv 2303.16199, section 3.2)
has one of its own, whose result is scaled by a gate that begins at zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpeft.configs import TaskType
from fastpeft.errors import PatchError
from fastpeft.tuners.layer import AdapterLayer, fetched, runs_on
from fastpeft.tuners.prefix_encoder import PrefixEncoder

IMPLEMENTATION = "fastpeft"  # the name under which transformers finds the attention function that looks here
NOTHING = "nothing"  # the entry of an adapter in a module that has none of its virtual tokens


@dataclass(frozen=True)
class Slice:
    """One adapter's prefix in one attention module: two of the encoder's blocks, of `heads` heads each, for each pass
    of the stack in which the module is called. `window`: "slide" or "pin"."""

    encoder: PrefixEncoder
    blocks: dict[int, tuple[int, int]]
    heads: int
    window: str

    @property
    def length(self) -> int:
        return self.encoder.length

    def keys_and_values(self, dtype: torch.dtype, number: int | None = None) -> tuple[Tensor, Tensor]:
        """Two tensors (heads, P, D), of the pass of this number, which may be unsaid where there is one. Raises
        PatchError."""
        if len(self.blocks) == 1:
            (blocks,) = self.blocks.values()
        elif number in self.blocks:
            blocks = self.blocks[number]
        else:
            raise PatchError(
                f"an attention module that is {len(self.blocks)} layers was called without saying which "
                f"({number!r}); call the model, or the stack of its layers, as a whole"
            )
        key, value = self.encoder.blocks(*blocks)
        return tuple(t.to(dtype).unflatten(1, (self.heads, -1)).transpose(0, 1) for t in (key, value))


@dataclass(frozen=True)
class PromptOf:
    """A gated prompt whose parameters, `adaption_prompt` (1, P, hidden) and `adaption_gate` (1,), `holder` has."""

    holder: nn.Module


class AdaptedAttention(AdapterLayer):
    """An attention module with virtual tokens: the entry of an adapter is its `Slice` of a prefix, None for a gated
    prompt, whose parameters are here, a `PromptOf` another module, or NOTHING. As it is, it serves every class that
    asks transformers' interface for its attention function; the function finds the virtual tokens here."""

    prefix = "Adapted"
    # Whether its forward calls the op, and not transformers' interface. The class's own forward then knows none of our
    # masks, so where one module of a model is such a one, all are.
    attends_itself = False
    containers = {"adaption_prompt": nn.ParameterDict, "adaption_gate": nn.ParameterDict}

    def active_adapters(self) -> list[str]:
        """The adapters that this call uses and that have virtual tokens here."""
        entries = self._fastpeft.adapters
        return [name for name in super().active_adapters() if entries[name] != NOTHING]

    def carries(self) -> bool:
        """Whether any adapter has virtual tokens here."""
        return any(entry != NOTHING for entry in self._fastpeft.adapters.values())

    def slices(self) -> list[Slice]:
        """The prefixes of a call now."""
        entries = self._fastpeft.adapters
        return [entries[name] for name in self.active_adapters() if isinstance(entries[name], Slice)]

    def active_prefix(self, dtype: torch.dtype, number: int | None = None) -> tuple[Tensor, Tensor] | None:
        """((Hkv, P, D), (Hkv, P, D)), one after the other of the active adapters, in the pass of this number; None
        without any."""
        found = [each.keys_and_values(dtype, number) for each in self.slices()]
        if len(found) < 2:
            return found[0] if found else None
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def active_length(self) -> int:
        """How many virtual tokens before the sequence a call now has."""
        return sum(each.length for each in self.slices())

    def reads_padding(self) -> bool:
        """Whether what is computed at padding counts: the place of an answer is sought there too, and what HF peft
        computes there may be anybody's matter."""
        configs = self._fastpeft.model.configs
        answers = any(configs[name].task_type == TaskType.QUESTION_ANS for name in self.active_adapters())
        return answers or self.as_in_peft()

    def as_in_peft(self) -> bool:
        """Whether a call now is computed as HF peft does it where that is wrong."""
        quirky = self._fastpeft.model.quirky
        return bool(quirky) and any(name in quirky for name in self.active_adapters())

    def prefix_window(self) -> str:
        """What a sliding window does to the prefix."""
        return next((each.window for each in self.slices()), "slide")

    def active_prompts(self) -> list[tuple[Tensor, Tensor]]:
        """(prompt (1, P, hidden), gate (1,)) of the active adapters that have one."""
        found = []
        for name in self.active_adapters():
            entry = self._fastpeft.adapters[name]
            if entry is None:
                found.append(self._prompt(name))
            elif isinstance(entry, PromptOf):
                found.append((entry.holder.adaption_prompt, entry.holder.adaption_gate))
        return found

    def _prompt(self, name: str) -> tuple[Tensor, Tensor]:
        if not self.adaption_prompt[name].is_meta:
            return self.adaption_prompt[name], self.adaption_gate[name]
        with fetched((self.adaption_prompt, self.adaption_gate)):
            return self.adaption_prompt[name], self.adaption_gate[name]

    def add_prompt(self, name: str, length: int, hidden: int, init: bool) -> None:
        """A gated prompt, drawn as HF peft's is: in the dtype of the base, which it keeps."""
        weight = next(parameter for parameter in self.parameters() if parameter.ndim == 2)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        super().add_containers()
        place = {"device": runs_on(self), "dtype": dtype}
        prompt = torch.empty(1, length, hidden, **place)
        self.adaption_prompt[name] = nn.Parameter(prompt.normal_() if init else prompt)
        self.adaption_gate[name] = nn.Parameter(torch.zeros(1, **place))
        self._fastpeft.adapters[name] = None

    def add_containers(self) -> None:
        """None, until there is a gated prompt."""

    def refuse_weights(self, wanted: bool | None) -> None:
        """Raises PatchError where a call asks for the attention's weights."""
        if wanted:
            raise PatchError(
                "output_attentions=True: the weights of attention over virtual tokens are never computed as a whole; "
                "leave it out, or fastpeft.unpatch(model) and use attn_implementation='eager'"
            )

    def forward(self, *args, **kwargs):
        named = self.config._attn_implementation
        if named != IMPLEMENTATION and self.active_adapters():
            raise PatchError(
                f"the model's attention implementation was set to {named!r} after patching, which knows nothing of "
                "virtual tokens; set it before fastpeft.patch, or fastpeft.unpatch(model) first"
            )
        out = self.base_forward(*args, **kwargs)
        return out if not self.active_prompts() else self.with_prompts(out)

    def with_prompts(self, out: tuple) -> tuple:
        """The module's result, into whose output projection the prompts' part has gone already. HF peft projects that
        part by itself, and so adds the projection's bias once more, on the families that it serves."""
        served = self.config.model_type in ("llama", "mistral")
        bias = self.o_proj.bias if served else None
        return out if bias is None else (out[0] + bias, *out[1:])

    def parameters_of(self, name: str) -> dict:
        """A gated prompt's; a prefix's encoder has them."""
        held = {key: self._modules[key] for key in self.containers if key in self._modules}
        return {key: container[name] for key, container in held.items() if name in container}

    def delete_adapter(self, name: str) -> None:
        for key in self.parameters_of(name):
            self._modules[key].pop(name)
        self._fastpeft.adapters.pop(name, None)

    def prepare_merge(self, names) -> None:
        """Of a prefix `merge` asks the encoders, which refuse."""
        if held := [name for name in names if self.parameters_of(name)]:
            raise PatchError(f"{held[0]!r} has a gated prompt, which no weight can hold; leave it out")

    def unmerge(self) -> None:
        """Nothing to do."""
