"""What the tests of `prompt_embedding` have in common: problems, dtypes, layouts, and how a result is judged."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft.ops import prepend_prompt, prepend_prompt_reference, prompt_embedding, prompt_embedding_reference
from fastpeft.oracle import Bounds, compare

# Odd, and with the interpreter's 32 columns and 2 samples every loop takes at least two whole blocks and a tail.
BATCH, TOKENS, COUNT, HIDDEN, ENTRIES = 5, 7, 3, 69, 11
HALF, SINGLE, BRAIN, DOUBLE = torch.float16, torch.float32, torch.bfloat16, torch.float64
DTYPES = {  # table, prompt
    "fp32": (SINGLE, SINGLE),
    "fp16": (HALF, HALF),
    "fp16-fp32": (HALF, SINGLE),
    "bf16": (BRAIN, BRAIN),
    "bf16-fp32": (BRAIN, SINGLE),
    "fp32-fp16": (SINGLE, HALF),
}
# The interpreter truncates where it makes a bf16 of an fp32.
EXACT_IN_INTERPRETER = ("fp32", "fp16", "fp16-fp32", "fp32-fp16")


@dataclass(frozen=True)
class Problem:
    """ids (B, S) and rows (V, H), or None and rows (B, S, H); prompt (P, H) or (B, P, H); dout (B, P + S, H); start
    (B,) or None."""

    ids: torch.Tensor | None
    rows: torch.Tensor
    prompt: torch.Tensor
    dout: torch.Tensor
    start: torch.Tensor | None = None

    def double(self) -> "Problem":
        return dataclasses.replace(self, rows=self.rows.double(), prompt=self.prompt.double(), dout=self.dout.double())


def draw(
    dtypes: str = "fp32", *, batch=BATCH, tokens=TOKENS, count=COUNT, hidden=HIDDEN, entries=ENTRIES, seed=0,
    embeds=False, by_sample=False, ids=torch.int64, device="cpu", starts=False,
) -> Problem:  # fmt: skip
    dtype, adapter = DTYPES[dtypes]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    numbers = torch.randint(entries, (batch, tokens), generator=generator, device=device).to(ids)
    start = (torch.arange(batch, device=device) * 3 + tokens) % (tokens + 1) if starts else None  # none to all
    return Problem(
        None if embeds else numbers,
        normal(*((batch, tokens) if embeds else (entries,)), hidden, dtype=dtype),
        normal(*((batch,) if by_sample else ()), count, hidden, dtype=adapter),
        normal(batch, count + tokens, hidden, dtype=dtype),
        start,
    )


def op_on(problem: Problem, *, learns=False):
    """(the op as a function of its leaves, the leaves); `learns`: a table too."""
    leaves = [problem.prompt.requires_grad_(), problem.rows.requires_grad_(learns or problem.ids is None)]
    if problem.ids is None:
        return (lambda prompt, rows: prepend_prompt(rows, prompt, start=problem.start)), leaves
    return (lambda prompt, rows: prompt_embedding(problem.ids, rows, prompt, start=problem.start)), leaves


def results(problem: Problem, *, reference: bool = False, table: bool = False) -> dict[str, torch.Tensor]:
    """{"out", "dprompt"}, of embeddings also "drows", of a table if `table`: by the op, or by the definition."""
    prompt, rows = (t.detach().requires_grad_() for t in (problem.prompt, problem.rows))
    if problem.ids is None:
        out = (prepend_prompt_reference if reference else prepend_prompt)(rows, prompt, start=problem.start)
    else:
        rows.requires_grad_(table)
        op = prompt_embedding_reference if reference else prompt_embedding
        out = op(problem.ids, rows, prompt, start=problem.start)
    leaves = [prompt, rows] if rows.requires_grad else [prompt]
    names = ("out", "dprompt", "drows")
    return dict(zip(names, [out.detach(), *torch.autograd.grad(out, leaves, problem.dout)], strict=False))


def assert_right(problems: Sequence[Problem], bounds: Bounds = Bounds(), *, exact_out: bool = True) -> None:  # noqa: B008
    """Copies are the definition's, bit for bit (of out, unless it is known not to be), and sums obey the criterion."""
    found = [[results(p), results(p, reference=True), results(p.double(), reference=True)] for p in problems]
    faults = []
    for name in found[0][0]:
        draws = [[each[i][name] for each in found] for i in range(3)]
        if name == "drows" or name == "out" and exact_out:
            assert all(torch.equal(*pair) for pair in zip(*draws[:2], strict=True)), name
        else:
            faults += compare(name, *draws).faults(bounds)
    assert not faults, "\n".join(faults)


def _gappy(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second row and third column of a storage that is otherwise NaN (or far beyond)."""
    fill = float("nan") if t.is_floating_point() else 1 << 30
    storage = torch.full((*t.shape[:-2], 2 * t.shape[-2], 3 * t.shape[-1]), fill, dtype=t.dtype)
    view = storage[..., ::2, ::3]
    view.copy_(t)
    return view


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "gappy": _gappy,
    "batch-last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "one-row": lambda t: t[:1].expand_as(t),
    "one-column": lambda t: t[..., :1].expand_as(t),
}


def with_layout(problem: Problem, name: str, layout: str) -> Problem:
    return dataclasses.replace(problem, **{name: LAYOUTS[layout](getattr(problem, name))})
