"""Regular expressions from a configuration, matched against module names in bounded time.

A configuration is data that somebody else may have written, and `re` backtracks: `(a+)+$` or twenty `.*` in a row can
hold a process for hours. Refusing what looks dangerous would also refuse patterns in daily use (the ones that unsloth
and ms-swift write for multimodal models have four `.*?` in a row), so nothing is refused for its looks. A pattern of
plain characters goes to `re`; any other is walked with the *set of positions* reached so far, which never explores a
position twice: the time is polynomial for every pattern, and `MAX_STEPS` bounds it. The patterns named above take 70 to
250 steps a name; a hostile one is given up after some milliseconds.

The rule, as users meet it: at most `MAX_LENGTH` characters and `MAX_DEPTH` nested groups; no backreferences,
conditions, atomic or possessive groups and inline flags, which a walk over position sets cannot express.
"""

import re
from collections.abc import Callable
from functools import lru_cache

from fastpeft.errors import ConfigError

try:  # `re` keeps its parser under these names since 3.11
    from re import _constants as sre
    from re import _parser as sre_parser
except ImportError:
    import sre_constants as sre
    import sre_parse as sre_parser

MAX_LENGTH = 2000
MAX_DEPTH = 20
MAX_STEPS = 4000

# Characters, dots and escaped punctuation between optional anchors: nothing in it can be tried in two ways.
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?")

_CATEGORIES: dict[object, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
_ASSERTIONS = (sre.ASSERT, sre.ASSERT_NOT)
_CHARACTERS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)


def pattern_problem(pattern: str) -> str | None:
    """Why `pattern` cannot be used, in words that follow a colon; None if it can."""
    if len(pattern) > MAX_LENGTH:
        return f"the pattern has {len(pattern)} characters, more than {MAX_LENGTH}; a list of names has no such limit"
    try:
        _parse(pattern)
    except (re.error, OverflowError) as error:
        return f"not a regular expression ({error})"
    except RecursionError:
        return f"groups are nested deeper than {MAX_DEPTH}"
    except ValueError as error:
        return str(error)
    return None


def matches_name(pattern: str, name: str) -> bool:
    """Whether the pattern covers the whole module path, as a `target_modules` string must."""
    if _PLAIN.fullmatch(pattern):
        return _compile(pattern).fullmatch(name) is not None
    return len(name) in _ends(pattern, name)


def matches_tail(pattern: str, name: str) -> bool:
    """Whether the pattern covers the end of the path from a dot on, as a `rank_pattern` key must."""
    whole = rf"(.*\.)?({pattern})$"
    if _PLAIN.fullmatch(pattern):
        return _compile(whole).match(name) is not None
    return bool(_ends(whole, name))


def layer_index(pattern: str, name: str) -> int | None:
    """The number right after the part of the path that `pattern` covers, which begins as early as it can: a layer's
    number, not that of an expert in it."""
    for start in [0, *(dot.end() for dot in re.finditer(r"\.", name))]:
        for end in sorted(_ends(rf"(?:{pattern})\.", name, start), reverse=True):
            if number := re.match(r"(\d+)\.", name[end:]):
                return int(number[1])
    return None


@lru_cache(maxsize=4096)  # `re` itself remembers 512; saved rank patterns hold one key per module
def _compile(pattern: str) -> re.Pattern:
    return re.compile(pattern)


@lru_cache(maxsize=1024)
def _parse(pattern: str) -> sre_parser.SubPattern:
    tree = sre_parser.parse(pattern)
    if tree.state.flags & ~re.UNICODE.value:
        raise ValueError("inline flags are not supported; write the letters out, as in [Qq]")
    _check(tree, MAX_DEPTH)
    return tree


def _check(nodes, depth: int) -> None:
    """Raises ValueError unless `_Walk` can follow every node of the tree."""
    if depth < 0:
        raise ValueError(f"groups are nested deeper than {MAX_DEPTH}")
    for op, argument in nodes:
        if op in _REPEATS:
            _check(argument[2], depth - 1)
        elif op is sre.BRANCH:
            for branch in argument[1]:
                _check(branch, depth - 1)
        elif op is sre.SUBPATTERN and not (argument[1] or argument[2]):
            _check(argument[3], depth - 1)
        elif op in _ASSERTIONS:
            _check(argument[1], depth - 1)
        elif op not in _CHARACTERS and op is not sre.AT:
            word = "inline flags" if op is sre.SUBPATTERN else str(op).lower().replace("_", " ")
            raise ValueError(f"{word} in a pattern is not supported; write the alternatives out, or list the names")


def _ends(pattern: str, text: str, start: int = 0) -> set[int]:
    """Where the matches that begin at `start` end. Raises ConfigError beyond MAX_STEPS."""
    return _Walk(pattern, text).run(_parse(pattern), {start})


class _Walk:
    """One text, and for each node of a pattern the positions that it leads to."""

    def __init__(self, pattern: str, text: str):
        self.pattern = pattern
        self.text = text
        self.size = len(text)
        self.steps = 0
        self.images: dict[tuple[int, int], set[int]] = {}

    def run(self, nodes, starts: set[int]) -> set[int]:
        for op, argument in nodes:
            if not starts:
                break
            self.steps += 1
            if self.steps > MAX_STEPS:
                shown = self.pattern if len(self.pattern) <= 80 else f"{self.pattern[:80]}..."
                raise ConfigError(
                    f"the pattern {shown!r} takes more than {MAX_STEPS} steps on the module name {self.text!r}; "
                    f"simplify it, or list the names"
                )
            starts = self._step(op, argument, starts)
        return starts

    def _step(self, op, argument, starts: set[int]) -> set[int]:
        if op in _CHARACTERS:
            return {i + 1 for i in starts if i < self.size and _accepts(op, argument, self.text[i])}
        if op is sre.SUBPATTERN:
            return self.run(argument[3], starts)
        if op is sre.BRANCH:
            return set().union(*(self.run(branch, starts) for branch in argument[1]))
        if op in _REPEATS:
            return self._repeat(*argument, starts)
        if op is sre.AT:
            return {i for i in starts if self._stands_at(argument, i)}
        direction, body = argument
        return {i for i in starts if self._holds(direction, body, i) is (op is sre.ASSERT)}

    def _repeat(self, low: int, high: int, body, starts: set[int]) -> set[int]:
        # Positions never go back, so among size + 1 rounds one stands still or nothing is left: more change nothing.
        reached = starts
        for _ in range(min(low, self.size + 1)):
            reached = self._image(body, reached)
        frontier, rounds = reached, high - low
        while frontier and rounds > 0:
            frontier = self._image(body, frontier) - reached
            reached = reached | frontier
            rounds -= 1
        return reached

    def _image(self, body, starts: set[int]) -> set[int]:
        image: set[int] = set()
        for start in starts:
            key = (id(body), start)
            if key not in self.images:
                self.images[key] = self.run(body, {start})
            image |= self.images[key]
        return image

    def _holds(self, direction: int, body, position: int) -> bool:
        if direction > 0:
            return bool(self._image(body, {position}))
        start = position - body.getwidth()[0]  # `re` takes lookbehinds of one width only
        return start >= 0 and position in self._image(body, {start})

    def _stands_at(self, anchor, i: int) -> bool:
        if anchor in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return i == 0
        if anchor is sre.AT_END:
            return i == self.size or (i == self.size - 1 and self.text[i] == "\n")
        if anchor is sre.AT_END_STRING:
            return i == self.size
        is_word = _CATEGORIES[sre.CATEGORY_WORD]
        boundary = (i > 0 and is_word(self.text[i - 1])) != (i < self.size and is_word(self.text[i]))
        return boundary is (anchor is sre.AT_BOUNDARY)


def _accepts(op, argument, character: str) -> bool:
    if op is sre.LITERAL:
        return ord(character) == argument
    if op is sre.NOT_LITERAL:
        return ord(character) != argument
    if op is sre.ANY:
        return character != "\n"
    negated = argument[0][0] is sre.NEGATE
    return any(_in_class(kind, value, character) for kind, value in argument[negated:]) is not negated


def _in_class(kind, value, character: str) -> bool:
    if kind is sre.LITERAL:
        return ord(character) == value
    if kind is sre.RANGE:
        return value[0] <= ord(character) <= value[1]
    return _CATEGORIES[value](character)
