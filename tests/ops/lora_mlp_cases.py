"""What the tests of `lora_mlp` have in common: problems, and how a result is judged."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft.dispatch import choose_backend
from fastpeft.ops import dropout_mask, lora_mlp, lora_mlp_reference
from fastpeft.ops.lora_mlp import Projection
from fastpeft.oracle import Bounds, compare
from tests.ops.lora_linear_cases import DTYPES

# Odd, and with the interpreter's tiles of 16 x 32 x 32 every loop takes two whole tiles and a tail.
ROWS, INPUTS, INNER, OUTPUTS = 37, 41, 69, 35
RANKS, SCALINGS, DROPOUTS = (5, 17, 3), (0.5, 0.8, 0.6), (0.3, 0.1, 0.2)
SIDES = ("gate", "up", "down")
FIELDS = ("bias", "lora_A", "lora_B")


@dataclass(frozen=True)
class Problem:
    """x (..., K), gate, up and down, dy (..., N)."""

    x: torch.Tensor
    projections: tuple[Projection, Projection, Projection]
    dy: torch.Tensor
    activation: str = "silu"
    recompute: bool = False

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What may want a gradient, by name."""
        named = {"x": self.x}
        for side, each in zip(SIDES, self.projections, strict=True):
            named |= {f"{side}.{field}": getattr(each, field) for field in FIELDS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def leaves(self, wanted=None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Fresh ones, of their layouts."""
        wanted = list(self.tensors) if wanted is None else wanted
        return {
            name: tensor.detach().to(dtype or tensor.dtype).requires_grad_(name in wanted)
            for name, tensor in self.tensors.items()
        }

    def with_leaves(self, leaves: dict[str, torch.Tensor]) -> tuple:
        """x, gate, up, down of these leaves, weights in their dtype."""
        out = [leaves["x"]]
        for side, each in zip(SIDES, self.projections, strict=True):
            named = {field: leaves[f"{side}.{field}"] for field in FIELDS if f"{side}.{field}" in leaves}
            out.append(each._replace(weight=each.weight.to(leaves["x"].dtype), **named))
        return tuple(out)


def draw(
    dtypes: str = "fp32", *, shape=(ROWS, INPUTS), inner=INNER, outputs=OUTPUTS, ranks=RANKS, dropout=False, bias=True,
    activation="silu", recompute=False, seed=0, device="cpu",
) -> Problem:  # fmt: skip
    """Base products of unit variance, low-rank terms a quarter of that or more. Rank 0: no LoRA; dropout: False, True
    for DROPOUTS, or three probabilities."""
    dtype, adapter = DTYPES[dtypes]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, deviation=1.0, dtype=dtype):
        return (torch.randn(*size, generator=generator, device=device) * deviation).to(dtype)

    probabilities = DROPOUTS if dropout is True else dropout or (0.0, 0.0, 0.0)
    projections = []
    for i, (n, k) in enumerate(((inner, shape[-1]), (inner, shape[-1]), (outputs, inner))):
        matrices = (None, None)
        if ranks[i]:
            matrices = (
                normal(ranks[i], k, deviation=k**-0.5, dtype=adapter),
                normal(n, ranks[i], deviation=ranks[i] ** -0.5, dtype=adapter),
            )
        weight = normal(n, k, deviation=k**-0.5)
        projections.append(Projection(weight, normal(n) if bias else None, *matrices, SCALINGS[i], probabilities[i]))
    return Problem(
        normal(*shape), tuple(projections), normal(*shape[:-1], outputs), activation=activation, recompute=recompute
    )


def masks_of(problem: Problem) -> tuple[list, tuple]:
    """The masks that the op would draw now, and the projections with the exact probabilities."""
    x = problem.x
    width = max(len(each.lora_A) for each in problem.projections if each.lora_A is not None)
    name = choose_backend(x, x.dtype, width).backend
    rows = x.shape[:-1].numel()
    keeps, exact = [], []
    for each in problem.projections:
        p = each.dropout if each.lora_A is not None else 0.0
        seed = (
            torch.empty(1, dtype=torch.int64, device=x.device if name == "triton" else "cpu").random_() if p else None
        )
        keeps.append(dropout_mask(seed, p, rows, each.weight.shape[1], x.device, name) if p else None)
        exact.append(each._replace(dropout=round(p * 65536) / 65536 if name == "triton" else p))
    return keeps, tuple(exact)


def call(problem: Problem, leaves: dict[str, torch.Tensor], training: bool = True) -> torch.Tensor:
    """The op on these leaves."""
    given = problem.with_leaves(leaves)
    return lora_mlp(*given, problem.activation, training=training, recompute=problem.recompute)


def results(function, problem: Problem, wanted, dtype=None) -> dict[str, torch.Tensor]:
    """{"y": result, "dx": gradient, ...} of function(leaves)."""
    leaves = problem.leaves(wanted, dtype)
    y = function(leaves)
    names = [name for name in leaves if name in wanted]
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], problem.dy.to(y.dtype)) if names else ()
    return {"y": y.detach(), **{f"d{name}": each for name, each in zip(names, gradients, strict=True)}}


def outcomes(problem: Problem, wanted=None, seed: int = 0) -> tuple[dict, dict, dict]:
    """Of the op, of the definition in the same dtypes and in float64, with the op's masks."""
    wanted = list(problem.tensors) if wanted is None else wanted
    with torch.random.fork_rng([problem.x.device] if problem.x.is_cuda else []):
        torch.manual_seed(seed)
        keeps, exact = masks_of(problem)
        torch.manual_seed(seed)
        got = results(lambda leaves: call(problem, leaves), problem, wanted)
    defined = dataclasses.replace(problem, projections=exact)

    def definition(leaves):
        return lora_mlp_reference(*defined.with_leaves(leaves), problem.activation, keeps)

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
    "one row": lambda t: t[..., :1, :].expand_as(t),
}


def with_layout(problem: Problem, name: str, layout: str) -> Problem:
    """`name`: x, dy, or a projection's field as "down.weight"."""
    change, (side, _, field) = LAYOUTS[layout], name.partition(".")
    if not field:
        return dataclasses.replace(problem, **{name: change(getattr(problem, name))})
    projections = [
        each._replace(**{field: change(getattr(each, field))}) if own == side else each
        for own, each in zip(SIDES, problem.projections, strict=True)
    ]
    return dataclasses.replace(problem, projections=tuple(projections))
