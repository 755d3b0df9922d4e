"""A lint of Triton's IR: no address may hang on a 32-bit product of a size or a stride.

Rows times a stride passes 2**31 in ordinary long batches; in 32 bits it wraps, and the kernel then reads or writes
another place without a word. From every `tt.addptr` the offset is followed back through the IR, and a 32-bit
multiplication on the way is a fault if one of its factors comes from an argument of the kernel. Products of program
ids and constants pass there, as does what was divided: a quotient counts tiles.

Such a product may still count elements, of a tensor that is taken as one long row. So a 32-bit offset from where an
argument points, before anything was added, must hang on no product of a program id or of a loop's counter.
"""

import re

_RESULT = re.compile(r"^\s*(%[\w-]+)(?::\d+)?(?:,\s*%[\w-]+)*\s*=\s*\"?([\w.]+)\"?\s*(.*)$")
_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_PAIR = re.compile(r"(%[\w-]+)\s*=\s*(%[\w-]+(?:#\d+)?)")
_NARROW = re.compile(r":\s*(?:tensor<[\dx]+x)?i32>?\s*(?:loc\(.*)?$")
_NARROW_OFFSET = re.compile(r",\s*(?:tensor<[\dx]+x)?i32>?\s*$")
# What a size no longer speaks through: a quotient or remainder, a comparison, a value from memory.
_OPAQUE = ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.cmpi", "tt.load", "tt.get_program_id")


class _Graph:
    """Which values each value of one function is made of. A name is printed again in a region beside its own, so here
    each has a number."""

    def __init__(self, ttir: str):
        self.operation: dict[str, str] = {}
        self.sources: dict[str, list[str]] = {}
        self.text: dict[str, str] = {}
        self.additions: list[str] = []  # of offsets to pointers
        self.arguments: set[str] = set()
        self.scopes: list[dict[str, str]] = [{}]  # names that are visible, of each open region
        regions: list[list[str] | None] = []  # what the values that a region yields go to, one by one; None: nowhere
        for line in ttir.splitlines():
            if "tt.func" in line:
                self.arguments |= set(re.findall(r"(%[\w-]+):\s*i(?:32|64)", line))
            opened, closed = line.rstrip().endswith("{"), line.strip().startswith("}")
            going_on = []
            if closed and regions:
                going_on = regions.pop()
                self.scopes.pop()
            found = _RESULT.match(line)
            if found:
                inner = self._define(line, *found.groups())
            elif (yielded := re.match(r"\s*scf\.yield\s+(.*)$", line)) and regions and regions[-1] is not None:
                values = self._values(yielded[1].split(" : ")[0])
                receivers = regions[-1] * len(values) if len(regions[-1]) == 1 else regions[-1]
                for name, value in zip(receivers, values, strict=True):
                    self.sources[name].append(value)
            if opened and "module" not in line:
                known = found and self.operation[self._named(found[1])] in ("scf.for", "scf.if")
                regions.append(self.carried if known else going_on if closed else None)
                self.scopes.append(inner if found else {})

    def _named(self, name: str) -> str:
        name = name.split("#")[0]
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _values(self, text: str) -> list[str]:
        return [self._named(name) for name in _VALUE.findall(text)]

    def _new(self, name: str, operation: str, sources: list[str], scope: dict[str, str]) -> str:
        scope[name] = unique = f"{name}@{len(self.operation)}"
        self.operation[unique], self.sources[unique] = operation, sources
        return unique

    def _define(self, line: str, name: str, operation: str, rest: str) -> dict[str, str]:
        """Takes the value in; what a loop's body can name besides. `carried` are what its region yields to."""
        inner: dict[str, str] = {}
        self.carried: list[str] = []
        if operation == "scf.for":
            head, _, arguments = rest.partition("iter_args(")
            index, *bounds = _VALUE.findall(head)
            self._new(index, "induction", [self._named(each) for each in bounds], inner)
            for carry, start in _PAIR.findall(arguments.split(") -> ")[0]):
                self.carried.append(self._new(carry, "carried", [self._named(start)], inner))
            unique = self._new(name, operation, list(self.carried), self.scopes[-1])
        else:
            unique = self._new(name, operation, self._values(rest.split(" : ")[0]), self.scopes[-1])
            self.carried = [unique]
        self.text[unique] = re.sub(r"\s*loc\(.*", "", line.strip())
        if operation == "tt.addptr":
            self.additions.append(unique)
        return inner

    def reached(self, value: str, through_quotients: bool) -> set[str]:
        """Every value that `value` is made of."""
        seen, waiting = set(), [value]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if through_quotients or self.operation.get(name) not in _OPAQUE:
                waiting += self.sources.get(name, [])
        return seen


def narrow_products(ttir: str) -> list[str]:
    """The offending multiplications, as lines of the IR; empty if there are none."""
    graph = _Graph(ttir)
    behind_addresses = set().union(*(graph.reached(graph.sources[name][1], False) for name in graph.additions))
    return sorted(
        graph.text[name]
        for name in behind_addresses
        if graph.operation.get(name) == "arith.muli"
        and _NARROW.search(graph.text[name])
        and any(graph.reached(factor, False) & graph.arguments for factor in graph.sources[name])
    )


def narrow_offsets(ttir: str) -> list[str]:
    """32-bit indices into a whole tensor, as lines of the IR; empty if there are none."""
    graph = _Graph(ttir)

    def counted(name: str) -> bool:
        """A product of how far the grid or a loop is, which no argument has a part in: those are `narrow_products`."""
        behind = graph.reached(name, False)
        kinds = {graph.operation.get(each) for each in behind}
        counts = not kinds.isdisjoint({"tt.get_program_id", "induction"})
        return graph.operation.get(name) == "arith.muli" and counts and behind.isdisjoint(graph.arguments)

    found = []
    for name in graph.additions:
        pointer, offset = graph.sources[name]
        whole = all(graph.operation.get(each) != "tt.addptr" for each in graph.reached(pointer, False))
        if whole and _NARROW_OFFSET.search(graph.text[name]) and any(map(counted, graph.reached(offset, False))):
            found.append(graph.text[name])
    return sorted(found)
