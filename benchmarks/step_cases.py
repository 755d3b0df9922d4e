"""Which training steps are timed: a model, a method and a batch each, the most valuable first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from fastpeft.errors import FastpeftError

from .geometry import GEOMETRIES, Geometry
from .request import Request

RANK, VIRTUAL_TOKENS, ADAPTER_LEN, DROPOUT = 16, 30, 10, 0.05
LORA = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}

_SMALL = GEOMETRIES["small"]
_WIDER = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 1408}
MODELS: dict[str, Geometry] = GEOMETRIES | {
    "llama-512": replace(
        _SMALL,
        linears={"q/o": (512, 512), "gate/up": (512, 1408), "k/v": (512, 128), "down": (1408, 512)},
        depth=64,
        batch=4,
        seq=256,
        arguments={**_SMALL.arguments, **_WIDER},
    ),
}
# What fits into 80 GB beside 16 GB of weights: HF peft's LoRA keeps 19 GB for a sample of 2048 tokens of Llama-3-8B.
BATCHES = dict.fromkeys(("llama3-8b", "qwen3-8b", "mistral-7b", "llama2-7b"), 2)


@dataclass(frozen=True)
class Method:
    """What a method is called in peft (`peft_type` and its configuration class), and its options."""

    peft_type: str
    config: str
    options: dict


METHODS = {
    "lora": Method("LORA", "LoraConfig", LORA),
    "dora": Method("LORA", "LoraConfig", {**LORA, "use_dora": True}),
    "prefix": Method("PREFIX_TUNING", "PrefixTuningConfig", {"num_virtual_tokens": VIRTUAL_TOKENS}),
    "adapter": Method("ADAPTION_PROMPT", "AdaptionPromptConfig", {"adapter_len": ADAPTER_LEN}),
    "prompt": Method("PROMPT_TUNING", "PromptTuningConfig", {"num_virtual_tokens": VIRTUAL_TOKENS}),
}


@dataclass(frozen=True)
class Case:
    """One kind of step. `model` is a name of MODELS, `method` one of METHODS, `dropout` LoRA's; plain data, which a
    plan keeps as asdict(case) and reads back as Case(**entry)."""

    model: str
    method: str
    batch: int
    seq: int
    dtype: str
    dropout: float = 0.0

    @property
    def id(self) -> str:
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.model} {self.method}{dropout}, batch {self.batch} of {self.seq} tokens, {self.dtype}"

    @property
    def geometry(self) -> Geometry:
        return MODELS[self.model]

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def key(self) -> tuple:
        """What identifies it among results, as `runner.key_of` does a cell."""
        return "step", tuple(self.shape().values()), self.dropout, self.dtype

    def shape(self) -> dict:
        return {"name": f"{self.model} {self.method}", "batch": self.batch, "seq": self.seq}

    def options(self) -> dict:
        """The adapter's configuration. LLaMA-Adapter is put into every layer, so that its backward is as long as the
        frozen model's."""
        found = {**METHODS[self.method].options, "task_type": self.geometry.task}
        if self.method in ("lora", "dora"):
            found["lora_dropout"] = self.dropout
        if self.method == "adapter":
            arguments = self.geometry.arguments
            found["adapter_layers"] = arguments.get("num_hidden_layers", arguments.get("n_layer"))
        return found


ALL_METHODS = (("lora", 0.0), ("prefix", 0.0), ("lora", DROPOUT), ("adapter", 0.0), ("prompt", 0.0))
# As many tokens as the benches' linear layers have rows, without checkpointing, for GPUs of more than 80 GB.
LARGE = Case("llama3-8b", "lora", 2, 4096, "bf16")
# (model, method, dropout) on a GPU, after it; neighbours share a base where that costs no value.
WANTED = (
    *(("llama3-8b", *each) for each in (*ALL_METHODS[1:4], ALL_METHODS[0])),
    *(("llama3.2-1b", *each) for each in ALL_METHODS[:4]),
    *(("qwen3-8b", *each) for each in ALL_METHODS[:2]),
    *(("bloom-560m", *each) for each in ALL_METHODS[:3]),
    *(("bert-base", *each) for each in ALL_METHODS[:3]),
    *(("mistral-7b", *each) for each in ALL_METHODS[:2]),
    *((model, "prompt", 0.0) for model in ("llama3.2-1b", "llama3-8b")),
    *(("qwen3-8b", *each) for each in ALL_METHODS[2:4]),
)
QUICK = (("llama3.2-1b", "lora", 0.0), ("llama3.2-1b", "prefix", 0.0))
ON_CPU = (
    Case("llama-512", "lora", 4, 256, "fp32"),
    Case("llama-512", "lora", 4, 256, "fp32", DROPOUT),
    Case("small", "prefix", 2, 1024, "fp32"),
    Case("small", "prefix", 1, 2048, "fp32"),
    Case("small", "adapter", 2, 512, "fp32"),
    Case("small", "prompt", 2, 512, "fp32"),
)
ON_DEMAND = (Case("llama-512", "dora", 4, 256, "fp32"), Case("llama-512", "dora", 4, 256, "fp32", DROPOUT))


def cases(request: Request, methods: Sequence[str] = ()) -> list[Case]:
    """The cases asked for, in order of value; without shapes, the plan of the device. `methods`: these alone.

    Raises FastpeftError for a shape that is no model, and for sizes of adapters, which are the same in every step.
    """
    for shape in request.shapes:
        if shape not in GEOMETRIES:
            given = shape if isinstance(shape, str) else ",".join(map(str, shape))
            raise FastpeftError(f"--shape {given}: a step is one of a whole model: {', '.join(GEOMETRIES)}")
    if request.ranks or request.prefixes or request.per_head:
        sizes = f"rank {RANK}, {VIRTUAL_TOKENS} virtual tokens, {ADAPTER_LEN} of LLaMA-Adapter with one gate a layer"
        raise FastpeftError(f"--rank, --prefix and --per-head are for single ops: steps have {sizes}")
    found = []
    for case in _usual(request, methods):
        for batch, seq in product(request.batches or (case.batch,), request.seqs or (case.seq,)):
            found.append(replace(case, batch=batch, seq=seq, dtype=request.data_type))
    if request.dropouts:
        undropped = [replace(case, dropout=0.0) for case in found]
        drawn = request.dropouts
        found = [replace(c, dropout=p) for c in undropped for p in (drawn if c.method in ("lora", "dora") else (0.0,))]
    return [case for case in dict.fromkeys(found) if not methods or case.method in methods]


def _usual(request: Request, methods: Sequence[str]) -> list[Case]:
    if request.shapes:
        wanted = [(model, *each) for model in request.shapes for each in ALL_METHODS]
    elif request.tiny:
        if not request.quick:
            return [*ON_CPU, *(case for case in ON_DEMAND if case.method in methods)]
        wanted = [("tiny", *each) for each in ALL_METHODS]
    else:
        wanted = QUICK if request.quick else WANTED
    first = [LARGE] if wanted is WANTED else []
    return first + [
        Case(model, method, BATCHES.get(model, MODELS[model].batch), MODELS[model].seq, request.data_type, dropout)
        for model, method, dropout in wanted
    ]


def cases_of(plan: dict) -> list[Case]:
    """The cases of a plan, read back."""
    return [Case(**entry) for entry in plan.get("cases", ())]
