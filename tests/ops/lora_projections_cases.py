"""What the tests of `lora_projections` have in common: problems, and how results are judged."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft.dispatch import backend, choose_backend
from fastpeft.ops import lora_projections, lora_projections_reference
from fastpeft.ops.lora_linear import dropout_mask
from fastpeft.ops.lora_projections import Projection, apply_lora_projections
from fastpeft.oracle import Bounds, compare
from tests.ops.lora_linear_cases import DTYPES

# Odd, and with the interpreter's tiles of 16 x 32 x 32 every loop takes two whole tiles and a tail.
SHAPE, OUTPUTS, RANKS = (3, 13, 69), (71, 40, 33), (5, 17, 3)
SCALINGS, DROPOUTS = (0.5, 0.8, 1.2), (0.3, 0.0, 0.1)  # one projection has no mask
KINDS = ("weight", "bias", "A", "B")


@dataclass(frozen=True)
class Problem:
    """x (..., K); of each projection weight (N, K), bias (N,) or None, A (r, K), B (N, r), and dy (..., N), None where
    nothing uses its result. based: in the place of a weight is a base product (..., N), without a bias."""

    x: torch.Tensor
    weight: tuple[torch.Tensor, ...]
    bias: tuple[torch.Tensor | None, ...]
    A: tuple[torch.Tensor, ...]
    B: tuple[torch.Tensor, ...]
    dy: tuple[torch.Tensor | None, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...] | None
    based: bool = False

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Fresh ones, by name: "x", "weight0", "bias0", "A0", "B0" and so on."""
        given = {"x": self.x}
        for kind in KINDS:
            given |= {f"{kind}{i}": each for i, each in enumerate(getattr(self, kind))}
        return {
            name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items() if t is not None
        }  # fmt: skip

    @property
    def used(self) -> list[int]:
        """The projections whose results something uses."""
        return [i for i, dy in enumerate(self.dy) if dy is not None]


def draw(
    dtypes: str = "fp32", *, shape=SHAPE, outputs=OUTPUTS, ranks=RANKS, dropout=False, unused=(), based=False, seed=0,
    device="cpu",
) -> Problem:  # fmt: skip
    """Base products of unit variance, low-rank terms a quarter of it or more; the second projection has no bias."""
    dtype, adapter = DTYPES[dtypes]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, deviation=1.0, dtype=dtype):
        return (torch.randn(*size, generator=generator, device=device) * deviation).to(dtype)

    inputs, count = shape[-1], len(ranks)
    outputs = [outputs[i % len(outputs)] for i in range(count)]

    def base(n):
        return normal(*shape[:-1], n) if based else normal(n, inputs, deviation=inputs**-0.5)

    return Problem(
        x=normal(*shape),
        weight=tuple(map(base, outputs)),
        bias=tuple(None if based or i == 1 else normal(n) for i, n in enumerate(outputs)),
        A=tuple(normal(r, inputs, deviation=inputs**-0.5, dtype=adapter) for r in ranks),
        B=tuple(normal(n, r, deviation=r**-0.5, dtype=adapter) for n, r in zip(outputs, ranks, strict=True)),
        dy=tuple(None if i in unused else normal(*shape[:-1], n) for i, n in enumerate(outputs)),
        scalings=tuple(SCALINGS[i % 3] + 0.1 * i for i in range(count)),
        dropouts=tuple(DROPOUTS[i % 3] for i in range(count)) if dropout else None,
        based=based,
    )


def masks_of(problem: Problem, lone: bool = False) -> tuple[list[torch.Tensor | None], list[float]]:
    """The masks [M, K] that the op would draw now, or (`lone`) single layers, and their exact probabilities."""
    count, x = len(problem.A), problem.x
    if not problem.dropouts:
        return [None] * count, [0.0] * count
    name = choose_backend(x, x.dtype).backend
    if name == "triton" and not lone:
        drawn = torch.empty(count, dtype=torch.int64, device=x.device).random_().split(1)
    else:
        place = x.device if name == "triton" else "cpu"
        drawn = [torch.empty(1, dtype=torch.int64, device=place).random_() if p else None for p in problem.dropouts]
    shape = (x.shape[:-1].numel(), x.shape[-1])
    keeps = [
        dropout_mask(seed, p, *shape, x.device, name) if p else None
        for seed, p in zip(drawn, problem.dropouts, strict=True)
    ]
    return keeps, [round(p * 65536) / 65536 if name == "triton" else p for p in problem.dropouts]


def of_kind(leaves: dict[str, torch.Tensor], kind: str, count: int) -> list[torch.Tensor | None]:
    return [leaves.get(f"{kind}{i}") for i in range(count)]


def call(problem: Problem, leaves: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The op on these leaves."""
    if problem.based:
        projections = projections_of(problem, leaves, problem.dropouts)
        return apply_lora_projections(leaves["x"], projections, based=True)
    each = (of_kind(leaves, kind, len(problem.A)) for kind in KINDS)
    return lora_projections(leaves["x"], *each, problem.scalings, dropouts=problem.dropouts, training=True)


def projections_of(problem: Problem, leaves: dict[str, torch.Tensor], dropouts) -> list[Projection]:
    each = (of_kind(leaves, kind, len(problem.A)) for kind in KINDS)
    return list(map(Projection, *each, problem.scalings, dropouts or [0.0] * len(problem.A)))


def reference(problem: Problem, leaves: dict[str, torch.Tensor], keeps, dropouts) -> list[torch.Tensor]:
    return lora_projections_reference(leaves["x"], projections_of(problem, leaves, dropouts), keeps, problem.based)


def results(function, problem: Problem, wanted, dtype=None) -> dict[str, torch.Tensor]:
    """{"y0": result, ..., "dx": gradient, ...} of function(leaves), without the gradients of what is not used."""
    leaves = problem.leaves(dtype)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    ys = function(leaves)
    unused = {f"{kind}{i}" for kind in KINDS for i in range(len(problem.A)) if i not in problem.used}
    names = [name for name in leaves if name in wanted and name not in unused]
    ends = [i for i in problem.used if ys[i].requires_grad]
    given = [leaves[name] for name in names], [problem.dy[i].to(ys[i].dtype) for i in ends]
    gradients = torch.autograd.grad([ys[i] for i in ends], *given) if names and ends else ()
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | {f"d{name}": each for name, each in zip(names, gradients, strict=True)}


def outcomes(problem: Problem, wanted=None, seed: int = 0) -> tuple[dict, dict, dict]:
    """Of the op, of the definition in the same dtypes and in float64, with the op's masks."""
    wanted = list(problem.leaves()) if wanted is None else wanted
    with torch.random.fork_rng([problem.x.device] if problem.x.is_cuda else []):
        torch.manual_seed(seed)
        masks = masks_of(problem)
        torch.manual_seed(seed)
        got = results(lambda leaves: call(problem, leaves), problem, wanted)
    definition = lambda leaves: reference(problem, leaves, *masks)  # noqa: E731
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


def assert_as_single_layers(problem: Problem, alone) -> None:
    """On the torch path the op gives what alone(leaves), layer by layer, gives under the same seed, and has drawn as
    much."""
    found = []
    with backend("torch"):
        for function in (alone, lambda leaves: call(problem, leaves)):
            torch.manual_seed(3)
            found.append(results(function, problem, list(problem.leaves())))
            found[-1]["the generator"] = torch.rand(1)
    assert torch.equal(found[0].pop("the generator"), found[1].pop("the generator"))
    exact = problem.x.dtype == torch.float32
    for key, expected in found[0].items():
        bound = {} if exact else {"rtol": 0.02, "atol": 0.02 * float(expected.float().abs().max())}
        torch.testing.assert_close(found[1][key], expected, **bound)


def _gappy(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second row and third column of a storage that is otherwise NaN."""
    storage = torch.full((*t.shape[:-2], 2 * t.shape[-2], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
    view = storage[..., ::2, ::3]
    view.copy_(t)
    return view


def _offset(t: torch.Tensor) -> torch.Tensor:
    """The same values behind one that is NaN, so that no row begins at an even place."""
    storage = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    storage[1:] = t.flatten()
    return storage[1:].view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "gappy": _gappy,
    "offset": _offset,
    "one row": lambda t: t[..., :1, :].expand_as(t),
}


def with_layout(problem: Problem, name: str, layout: str) -> Problem:
    given = getattr(problem, name)
    changed = LAYOUTS[layout](given) if name == "x" else tuple(map(LAYOUTS[layout], given))
    return dataclasses.replace(problem, **{name: changed})
