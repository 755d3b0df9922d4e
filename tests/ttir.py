"""A lint of Triton's IR: no address may hang on a 32-bit product of a size or a stride.

Rows times a stride passes 2**31 in ordinary long batches; in 32 bits it wraps, and the kernel then reads or writes
another place without a word. From every `tt.addptr` the offset is followed back through the IR, and a 32-bit
multiplication on the way is a fault if one of its factors comes from an argument of the kernel. Products of program
ids and constants pass, as does what was divided: a quotient counts tiles.
"""

import re

_RESULT = re.compile(r"^\s*(%[\w-]+)(?::\d+)?(?:,\s*%[\w-]+)*\s*=\s*\"?([\w.]+)\"?\s*(.*)$")
_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_PAIR = re.compile(r"(%[\w-]+)\s*=\s*(%[\w-]+(?:#\d+)?)")
_NARROW = re.compile(r":\s*(?:tensor<[\dx]+x)?i32>?\s*(?:loc\(.*)?$")
# What a size no longer speaks through: a quotient or remainder, a comparison, a value from memory.
_OPAQUE = ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.cmpi", "tt.load", "tt.get_program_id")


class _Graph:
    """Which values each value of one function is made of."""

    def __init__(self, ttir: str):
        self.operation: dict[str, str] = {}
        self.sources: dict[str, list[str]] = {}
        self.text: dict[str, str] = {}
        self.offsets: list[str] = []
        self.arguments: set[str] = set()
        loops: list[list[str] | None] = []  # per open region: the loop's carried values, or None
        for line in ttir.splitlines():
            if "tt.func" in line:
                self.arguments |= set(re.findall(r"(%[\w-]+):\s*i(?:32|64)", line))
            found = _RESULT.match(line)
            if found:
                carried = self._define(line, *found.groups())
            elif (yielded := re.match(r"\s*scf\.yield\s+(.*)$", line)) and loops and loops[-1] is not None:
                values = _VALUE.findall(yielded[1].split(" : ")[0])
                for name, value in zip(loops[-1], values, strict=True):
                    self.sources[name].append(value)
            opened, closed = line.rstrip().endswith("{"), line.strip().startswith("}")
            if closed and loops:
                loops.pop()
            if opened and "module" not in line:
                loops.append(carried if found and self.operation[found[1]] == "scf.for" else None)

    def _define(self, line: str, name: str, operation: str, rest: str) -> list[str]:
        self.operation[name], self.text[name] = operation, re.sub(r"\s*loc\(.*", "", line.strip())
        carried: list[str] = []
        if operation == "scf.for":
            head, _, arguments = rest.partition("iter_args(")
            bounds = _VALUE.findall(head)
            self.sources[bounds[0]] = bounds[1:]
            self.operation[bounds[0]] = "induction"
            for carry, start in _PAIR.findall(arguments.split(") -> ")[0]):
                carried.append(carry)
                self.sources[carry], self.operation[carry] = [start], "carried"
            self.sources[name] = list(carried)
        else:
            self.sources[name] = _VALUE.findall(rest.split(" : ")[0])
            if operation == "tt.addptr":
                self.offsets.append(self.sources[name][1])
        return carried

    def reached(self, value: str, through_quotients: bool) -> set[str]:
        """Every value that `value` is made of."""
        seen, waiting = set(), [value]
        while waiting:
            name = waiting.pop().split("#")[0]
            if name in seen:
                continue
            seen.add(name)
            if through_quotients or self.operation.get(name) not in _OPAQUE:
                waiting += self.sources.get(name, [])
        return seen


def narrow_products(ttir: str) -> list[str]:
    """The offending multiplications, as lines of the IR; empty if there are none."""
    graph = _Graph(ttir)
    behind_addresses = set().union(*(graph.reached(offset, False) for offset in graph.offsets))
    return sorted(
        graph.text[name]
        for name in behind_addresses
        if graph.operation.get(name) == "arith.muli"
        and _NARROW.search(graph.text[name])
        and any(graph.reached(factor, False) & graph.arguments for factor in graph.sources[name])
    )
