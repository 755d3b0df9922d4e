"""What the tests of `mixed_lora_linear` have in common: problems, and how a result is judged."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft.dispatch import choose_backend
from fastpeft.ops import mixed_lora_linear, mixed_lora_linear_reference
from fastpeft.ops.mixed_lora_linear import apply_mixed_lora, mixed_dropout_mask
from fastpeft.oracle import Bounds, compare
from tests.ops.lora_linear_cases import DTYPES

# Odd, and with the interpreter's tiles of 16 x 32 x 32 every loop takes two whole tiles and a tail: the first adapter's
# samples lie apart, the second's together, and one sample has none.
TOKENS, INPUTS, OUTPUTS = 13, 69, 71
RANKS, ROWS, SCALINGS = (5, 17), (0, 1, 1, -1, 0, 0), (0.5, 0.8)
DROPOUTS = (0.3, 0.1)
SHARED = ("x", "weight", "bias")


@dataclass(frozen=True)
class Problem:
    """x (B, ..., K), weight (N, K), bias (N,) or None, of each adapter lora_A (r, K) and lora_B (N, r), dy (B, ..., N);
    residual (B, ..., N) in the place of weight and bias, or None."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    lora_A: tuple[torch.Tensor, ...]
    lora_B: tuple[torch.Tensor, ...]
    dy: torch.Tensor
    scalings: tuple[float, ...]
    rows: tuple[int, ...]
    dropouts: tuple[float, ...] | None
    residual: torch.Tensor | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Fresh ones, by name; adapters are "A0", "B0", "A1" and so on."""
        given = {name: getattr(self, name) for name in (*SHARED, "residual")}
        for letter, matrices in (("A", self.lora_A), ("B", self.lora_B)):
            given |= {f"{letter}{i}": matrix for i, matrix in enumerate(matrices)}
        return {
            name: t.detach().to(dtype or t.dtype).requires_grad_()  # of its layout
            for name, t in given.items()
            if t is not None
        }

    @property
    def used(self) -> list[int]:
        return sorted({g for g in self.rows if g >= 0})


def draw(
    dtypes: str = "fp32", *, shape=(TOKENS, INPUTS), outputs=OUTPUTS, ranks=RANKS, rows=ROWS, dropout=False, base=True,
    seed=0, device="cpu",
) -> Problem:  # fmt: skip
    """Base product of unit variance, low-rank terms a quarter of it or more; `shape` is that of a sample. Without
    `base` on top of a product made elsewhere."""
    dtype, adapter = DTYPES[dtypes]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, deviation=1.0, dtype=dtype):
        return (torch.randn(*size, generator=generator, device=device) * deviation).to(dtype)

    inputs = shape[-1]
    return Problem(
        x=normal(len(rows), *shape),
        weight=normal(outputs, inputs, deviation=inputs**-0.5) if base else None,
        bias=normal(outputs) if base else None,
        lora_A=tuple(normal(r, inputs, deviation=inputs**-0.5, dtype=adapter) for r in ranks),
        lora_B=tuple(normal(outputs, r, deviation=r**-0.5, dtype=adapter) for r in ranks),
        dy=normal(len(rows), *shape[:-1], outputs),
        scalings=tuple(SCALINGS[i % 2] + 0.1 * i for i in range(len(ranks))),
        rows=tuple(rows),
        dropouts=tuple(DROPOUTS[i % 2] for i in range(len(ranks))) if dropout else None,
        residual=None if base else normal(len(rows), *shape[:-1], outputs),
    )


def mask_of(problem: Problem) -> tuple[torch.Tensor | None, list[float] | None]:
    """The mask [M, K] that the op would draw now, and its exact probabilities of dropping."""
    if not problem.dropouts or not problem.used:
        return None, None
    x, used = problem.x, problem.used
    triton = choose_backend(x, x.dtype, max(map(len, problem.lora_A))).backend == "triton"
    place = x.device if triton else "cpu"
    seeds = torch.empty(1 if triton else len(used), dtype=torch.int64, device=place).random_()
    rows = [used.index(g) if g >= 0 else -1 for g in problem.rows]
    shape = (x.shape[:-1].numel(), x.shape[-1])
    found = mixed_dropout_mask(seeds, rows, [problem.dropouts[g] for g in used], shape, x.device, "triton" * triton)
    return found, [round(p * 65536) / 65536 if triton else p for p in problem.dropouts]


def matrices_of(leaves: dict[str, torch.Tensor], letter: str) -> list[torch.Tensor]:
    return [leaf for name, leaf in leaves.items() if name[0] == letter and name[1:].isdigit()]


def call(problem: Problem, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """The op on these leaves."""
    a, b = matrices_of(leaves, "A"), matrices_of(leaves, "B")
    if problem.residual is None:
        shared = [leaves.get(name) for name in SHARED]
        options = {"dropouts": problem.dropouts, "training": True}
        return mixed_lora_linear(*shared, a, b, problem.scalings, problem.rows, **options)
    adapters = list(zip(a, b, problem.scalings, problem.dropouts or [0.0] * len(a), strict=True))
    return apply_mixed_lora(leaves["x"], None, None, leaves["residual"], adapters, problem.rows)


def reference(problem: Problem, leaves: dict[str, torch.Tensor], keep, dropouts) -> torch.Tensor:
    """The definition, sample by sample."""
    a, b = matrices_of(leaves, "A"), matrices_of(leaves, "B")
    more = (problem.scalings, problem.rows, keep, dropouts)
    if problem.residual is None:
        return mixed_lora_linear_reference(*(leaves.get(name) for name in SHARED), a, b, *more)
    x, residual = leaves["x"], leaves["residual"]
    nothing = torch.zeros(residual.shape[-1], x.shape[-1], dtype=a[0].dtype)  # so that the term alone is not rounded
    term = mixed_lora_linear_reference(x.to(a[0].dtype), nothing, None, a, b, *more)
    return (residual + term).to(residual.dtype)


def results(function, problem: Problem, wanted, dtype=None) -> dict[str, torch.Tensor]:
    """{"y": result, "dx": gradient, ...} of function(leaves); an adapter that no sample has is left out."""
    leaves = problem.leaves(dtype)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    y = function(leaves)
    unused = {f"{letter}{g}" for letter in "AB" for g in range(len(problem.lora_A)) if g not in problem.used}
    names = [name for name in leaves if name in wanted and name not in unused]
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], problem.dy.to(y.dtype)) if names else ()
    return {"y": y.detach(), **{f"d{name}": each for name, each in zip(names, gradients, strict=True)}}


def outcomes(problem: Problem, wanted=None, seed: int = 0) -> tuple[dict, dict, dict]:
    """Of the op, of the definition in the same dtypes and in float64, with the op's mask."""
    wanted = list(problem.leaves()) if wanted is None else wanted
    with torch.random.fork_rng([problem.x.device] if problem.x.is_cuda else []):
        torch.manual_seed(seed)
        keep, dropouts = mask_of(problem)
        torch.manual_seed(seed)
        got = results(lambda leaves: call(problem, leaves), problem, wanted)
    definition = lambda leaves: reference(problem, leaves, keep, dropouts)  # noqa: E731
    return got, results(definition, problem, wanted), results(definition, problem, wanted, torch.float64)


def faults_of(problems: Sequence[Problem], bounds: Bounds = Bounds(), wanted=None) -> list[str]:  # noqa: B008
    """What the criterion of `fastpeft.oracle` has to say, pooled over problems of one shape."""
    draws = [outcomes(problem, wanted, seed) for seed, problem in enumerate(problems)]
    found = []
    for name in draws[0][0]:
        found += compare(name, *([each[i][name] for each in draws] for i in range(3))).faults(bounds)
    return found


def assert_right(problems: Sequence[Problem], bounds: Bounds = Bounds(), wanted=None) -> None:  # noqa: B008
    faults = faults_of(problems, bounds, wanted)
    assert not faults, "\n".join(faults)


def _gappy(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second row and third column of a storage that is otherwise NaN."""
    storage = torch.full((*t.shape[:-2], 2 * t.shape[-2], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
    view = storage[..., ::2, ::3]
    view.copy_(t)
    return view


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "gappy": _gappy,
    "samples last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "one row": lambda t: t[..., :1, :].expand_as(t),
}


def with_layout(problem: Problem, name: str, layout: str) -> Problem:
    change = LAYOUTS[layout]
    given = getattr(problem, name)
    return dataclasses.replace(
        problem, **{name: tuple(map(change, given)) if name in ("lora_A", "lora_B") else change(given)}
    )
