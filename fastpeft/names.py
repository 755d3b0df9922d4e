"""Dotted module paths: their parts, and which of them a reader of an error message may have meant."""

from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches

from fastpeft.untrusted import shown

_SHOWN = 12
_LONGEST = 200  # of a name that is compared with others


def leaf(name: str) -> str:
    """The part after the last dot."""
    return name.rpartition(".")[2]


def dotted_ends(name: str) -> Iterator[str]:
    """The path itself and every end of it after a dot, longest first: a.b.c, b.c, c."""
    while name:
        yield name
        name = name.partition(".")[2]


def shortest_ends(chosen: Iterable[str], others: Iterable[str]) -> set[str]:
    """The fewest, shortest ends that name every path in `chosen` and none in `others`."""
    taken = {end for name in others for end in dotted_ends(name)}
    return {min((e for e in dotted_ends(name) if e == name or e not in taken), key=len) for name in chosen}


def listed(items: Collection[object]) -> str:
    """'a', 'b', 'c' ... for a message, cut after some."""
    first = ", ".join(map(shown, list(items)[:_SHOWN]))
    return first if len(items) <= _SHOWN else f"{first} and {len(items) - _SHOWN} more"


def nearest(wanted: str | Iterable[str], paths: Iterable[str]) -> str:
    """ "; did you mean 'q_proj'?" for a message, or nothing. Compares last parts, where misspellings are."""
    leaves = sorted({leaf(path) for path in paths if not leaf(path).isdigit()})
    close = []
    for each in [wanted] if isinstance(wanted, str) else sorted(wanted)[:_SHOWN]:
        close += get_close_matches(leaf(each)[:_LONGEST], leaves, n=3)
    return f"; did you mean {listed(dict.fromkeys(close))}?" if close else ""
