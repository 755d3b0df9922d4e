"""A training step in the harness's form, and the row that is left of one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .harness import Memory
from .report import FLOOR
from .rows import PASS_MS, times_of
from .step_cases import Case
from .step_models import LABELS, LIGER, OF_PEFT, Model, adapted, frozen, inputs_of, trained

OP = "step"
PEERS = (*OF_PEFT, LIGER)
RATE = 1e-4


class Step:
    """A whole step in the harness's form: its forward ends with the loss, its backward with the optimizer's step.
    `frozen`: everything that the model holds, which is not counted as kept for backward."""

    leaves: dict[str, torch.Tensor] = {}
    activations = ()

    def __init__(self, model: Model, inputs: Mapping[str, torch.Tensor]):
        self.model, self.inputs = model, dict(inputs)
        module = model.module
        self.frozen = {**dict(module.named_parameters()), **dict(module.named_buffers()), **self.inputs}
        parameters = list(trained(module).values())
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE) if parameters else None

    def run(self) -> None:
        self.run_backward(self.run_forward())

    def run_forward(self) -> torch.Tensor:
        return self.model.loss(self.inputs)

    def run_backward(self, loss: torch.Tensor) -> tuple:
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return ()

    def own_bytes(self) -> int:
        """The adapter and what the optimizer keeps for it."""
        if self.optimizer is None:
            return 0
        tensors = [*trained(self.model.module).values()]
        tensors += [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(t.nbytes for t in tensors)


def step_of(name: str, base: nn.Module, case: Case, device: torch.device) -> Step:
    """Of one of IMPLEMENTATIONS, on the parameters of `base`. Raises Missing."""
    return Step(frozen(base) if name == FLOOR else adapted(name, base, case), inputs_of(case, device))


@dataclass
class Found:
    """What is known of one implementation in one case."""

    name: str
    status: str = "ok"
    note: str = ""
    checked: dict | None = None
    adapter_dtype: str | None = None
    step: Step | None = None
    memory: Memory = Memory(None, None, None)
    first_s: float | None = None
    host_ms: float | None = None


def row_of(case: Case, found: Found, samples: dict[str, list], flops: int, ceiling: float | None) -> dict:
    """One entry of the results, without any time unless the implementation was found right. flops: of a step; ceiling:
    TFLOP/s of a product in the case's type, None where it was not measured."""
    row = {
        "op": OP,
        "impl": found.name,
        "label": LABELS[found.name],
        "strategy": None,
        "adapter_dtype": found.adapter_dtype,
        "shape": case.shape(),
        "dtype": case.dtype,
        "dropout": case.dropout,
        "pass": "step",
        "status": found.status,
        **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "forward_ms", "gbps", "tflops", "tokens_per_s", "mfu")),
        **dict.fromkeys(("overhead_over_floor", "overhead_p20", "overhead_p80")),
        "rounds": 0,
        "speedup_vs": {},
        "host_ms": found.host_ms,
        "first_s": found.first_s,
        "peak_bytes": found.memory.peak,
        "held_bytes": found.memory.held,
        "saved_bytes": found.memory.saved,
        "checked": found.checked,
        "note": found.note,
    }
    return row | _times(case, found.name, samples, flops, ceiling) if found.status == "ok" else row


def _times(case: Case, name: str, samples: dict[str, list], flops: int, ceiling: float | None) -> dict:
    times = times_of(name, samples, PASS_MS["fwd+bwd"], PEERS)
    milliseconds = times["median_ms"]
    mfu = flops / milliseconds / 1e9 / ceiling if ceiling else None
    return times | {"tokens_per_s": 1e3 * case.batch * case.seq / milliseconds, "mfu": mfu}


def words(case: Case, rows: list[dict]) -> str:
    """`step: llama3-8b lora, ...: frozen 1.0 ms; fastpeft 1.2 ms, +20% (+18 to +23) over it, 1.31x peft; ...`"""
    parts = []
    for row in rows:
        text = f"{row['impl']} {row['status']}"
        if row["status"] == "ok":
            text = f"{row['impl']} {row['median_ms']:.1f} ms"
            if row["impl"] != FLOOR and row["overhead_over_floor"] is not None:
                over, low, high = (100 * row[f"overhead_{name}"] for name in ("over_floor", "p20", "p80"))
                text += f", {over:+.1f}% ({low:+.1f} to {high:+.1f}) over frozen"
            if row["impl"] not in OF_PEFT:
                text += "".join(f", {ratio:.2f}x the speed of {peer}" for peer, ratio in row["speedup_vs"].items())
        parts.append(text)
    return f"{OP}: {case.id}: {'; '.join(parts)}"
