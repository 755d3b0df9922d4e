"""What a command line may ask of an op's bench, in the same words for every op."""

from dataclasses import dataclass, replace
from itertools import product

from fastpeft.errors import FastpeftError

from .geometry import GEOMETRIES, Geometry

Shape = str | tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Empty or None: the bench's own choice. shapes: names of geometries, or an op's numbers. tiny: on a CPU, where the
    usual shapes take hours. quick: the first shape alone, unless some are named."""

    shapes: tuple[Shape, ...] = ()
    batches: tuple[int, ...] = ()
    seqs: tuple[int, ...] = ()
    dtype: str | None = None
    ranks: tuple[int, ...] = ()
    dropouts: tuple[float, ...] = ()
    prefixes: tuple[int, ...] = ()
    per_head: bool = False
    tiny: bool = False
    quick: bool = False

    @property
    def data_type(self) -> str:
        return self.dtype or ("fp32" if self.tiny else "bf16")

    def first(self, usual: list) -> list:
        """Of what is usual, as much as is wanted."""
        return usual[:1] if self.quick else usual

    def named(self, *usual: str) -> list[tuple[str, Geometry]]:
        """(name, geometry) of each shape by name, at every batch and length asked for; of `usual` where no shape is."""
        names = [shape for shape in self.shapes or self.first(list(usual)) if shape in GEOMETRIES]
        found = []
        for name in names:
            geometry = GEOMETRIES[name]
            for batch, seq in product(self.batches or (geometry.batch,), self.seqs or (geometry.seq,)):
                found.append((name, replace(geometry, batch=batch, seq=seq)))
        return found

    def numbers(self, names: str) -> list[tuple[int, ...]]:
        """The shapes by numbers. Raises FastpeftError unless they are the numbers `names`, and have no others beside
        them that say the same."""
        found = [shape for shape in self.shapes if not isinstance(shape, str)]
        for shape in found:
            given = ",".join(map(str, shape))
            if len(shape) != names.count(",") + 1:
                raise FastpeftError(f"--shape {given} is not {names}")
            if self.batches or self.seqs:
                raise FastpeftError(f"--batch and --seq are for shapes by name: {given} is {names} already")
        return found
