"""The truth of a prompt in front of embeddings: the result is made of copies, which must be the concatenation's, bit
for bit; the prompt's gradient, a sum over the batch, is judged against float64."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .accuracy import MAX_RMS_RATIO, Expected, Tensors, Verdict, judge, poison
from .harness import Call

# fp32 sums in another order differ by tens of percent in their few roundings; this is far from any lower precision.
FP32_FLOOR = 1e-6


@dataclass
class Inputs:
    """Tensors of one cell: ids (B, S) int64, table (V, hidden), grad (B, P + S, hidden) in the data's dtype, and prompt
    (P, hidden) in fp32, as HF peft keeps it."""

    ids: torch.Tensor
    table: torch.Tensor
    prompt: torch.Tensor
    grad: torch.Tensor

    def leaves(self) -> Tensors:
        return {"prompt": self.prompt.detach().clone().requires_grad_()}


def concatenated(ids: torch.Tensor, table: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """The plain form: each sample's rows of the prompt, cast, in front of its tokens'."""
    return torch.cat((prompt.expand(len(ids), -1, -1).to(table.dtype), F.embedding(ids, table)), 1)


class PromptTruth:
    """The concatenation, and the prompt's gradient in float64 and as autograd has it, made once."""

    def __init__(self, inputs: Inputs):
        leaf = inputs.leaves()["prompt"]
        out = concatenated(inputs.ids, inputs.table, leaf)
        (eager,) = torch.autograd.grad(out, leaf, inputs.grad)
        self.out = out.detach()
        truth = inputs.grad[:, : len(inputs.prompt)].double().sum(0)
        self.gradient = Expected("dprompt", eager, truth, floor=FP32_FLOOR)

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """The result and the prompt's gradient of `call`, which must be bound to these tensors."""
        verdict = Verdict()
        poison([self.out, self.gradient.eager])
        out, (gradient,) = call.run()
        if out.shape != self.out.shape or out.dtype != self.out.dtype:
            wanted = f"{tuple(self.out.shape)} {self.out.dtype}"
            verdict.problems.append(f"out: {tuple(out.shape)} {out.dtype}, expected {wanted}")
        elif not torch.equal(out, self.out):
            verdict.problems.append(f"out: {int((out != self.out).sum())} numbers are not those of the concatenation")
        judge(verdict, "prompt", gradient, self.gradient, max_rms_ratio, "the prompt's part")
        return verdict
