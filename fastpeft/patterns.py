"""Regular expressions from a configuration, matched against module names in bounded time and memory.

A configuration is data that somebody else may have written, and `re` backtracks: `(a+)+$` or twenty `.*` in a row can
hold a process for hours. Refusing what looks dangerous would also refuse patterns in daily use (those for multimodal
models have four `.*?` in a row), so nothing is refused for that: the `regex` library, which transformers brings,
matches with a time limit. It has weaknesses of its own, which `pattern_problem` keeps from it: it copies what is
repeated, so that a few nested `{2}` fill the memory, and it reads braces that are text to `re` as leave to misspell.
"""

import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from fastpeft.errors import ConfigError
from fastpeft.scoped import scoped

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser

MAX_LENGTH = 2000
MAX_PARTS = 20_000  # of a field's patterns with their repeats written out: 50 ms and 30 megabytes
MAX_PATTERNS, MAX_EXPRESSIONS = 10_000, 200  # in one field; the second counts what is more than a name
TIMEOUT_S = 0.4  # of the processor, for one module name; a pattern in daily use takes microseconds
FREE_S = 20e-6  # what a match may take without being counted against the time of all

_NAME = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
_TEXT = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # escapes and sets, in which a brace is a brace
_NO_COUNT = re.compile(r"\{(?!\d+(?:,\d*)?\}|,\d+\})")
_left: ContextVar[list[float] | None] = ContextVar("left", default=None)


def patterns_problem(patterns: Collection[str]) -> str | None:
    """Why there are too many patterns in a field, in words that follow a colon; None if there are not."""
    if len(patterns) > MAX_PATTERNS:
        return f"{len(patterns)} patterns are more than {MAX_PATTERNS}, the most that a field may have"
    of_bounded_length = (each for each in patterns if isinstance(each, str) and len(each) <= MAX_LENGTH)
    expressions = [each for each in of_bounded_length if _plain(each) is None]
    if len(expressions) > MAX_EXPRESSIONS:
        return f"{len(expressions)} regular expressions are more than {MAX_EXPRESSIONS}; names have no such limit"
    problems = map(pattern_problem, expressions)
    parts = sum(_size(each) for each, problem in zip(expressions, problems, strict=True) if problem is None)
    return _too_many(parts) if parts > MAX_PARTS else None


def pattern_problem(pattern: str) -> str | None:
    """Why `pattern` cannot be used, in words that follow a colon; None if it can."""
    if len(pattern) > MAX_LENGTH:
        return f"the pattern has {len(pattern)} characters, more than {MAX_LENGTH}; a list of names has no such limit"
    return None if _plain(pattern) else _expression_problem(pattern)


@lru_cache(maxsize=1024)
def _expression_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
        if (parts := _size(pattern)) > MAX_PARTS:
            return _too_many(parts)
        if _NO_COUNT.search(_TEXT.sub("", pattern)):
            return "braces that count nothing are text; write \\{ for one"
        _compile(_at_end(pattern))
    except (re.error, OverflowError, ValueError) as error:
        return f"not a regular expression ({error})"
    except (RecursionError, MemoryError):
        return "groups are nested too deep"
    return None


def _too_many(parts: int) -> str:
    count = parts if parts < 10**9 else "billions of"
    return f"the repeats, written out, have {count} parts, more than {MAX_PARTS}; write * or + less deep"


@lru_cache(maxsize=1024)
def _size(pattern: str) -> int:
    return _parts(parser.parse(pattern))


def _parts(tree) -> int:
    """How many parts a parsed pattern has where each repeat stands as often as it must match, and once more."""
    total = 0
    for operation, argument in tree:
        inner = sum(map(_parts, _trees(argument)))
        total += max(inner, 1) * (argument[0] + 1 if str(operation).endswith("REPEAT") else 1)
    return total


def _trees(argument) -> Iterator[parser.SubPattern]:
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for each in argument:
            yield from _trees(each)


@contextmanager
def in_bounded_time() -> Iterator[None]:
    """Inside, all matches together have the time that one has outside, but for FREE_S each: a pattern that takes a
    little less than the limit for each of a thousand names takes minutes. Not for generators."""
    with scoped(_left, [TIMEOUT_S]):
        yield


def matches_name(pattern: str, name: str) -> bool:
    """Whether the pattern covers the whole module path, as a `target_modules` string must."""
    return _match(rf"(?:{pattern})\Z", pattern, name) is not None


def matches_tail(pattern: str, name: str) -> bool:
    """Whether the pattern covers the end of the path from a dot on, as a `rank_pattern` key must."""
    plain = _plain(pattern)
    if plain is None:
        return _match(_at_end(pattern), pattern, name) is not None
    text, dots, whole = plain
    if not dots:
        return name == text or (not whole and name.endswith(f".{text}"))
    start = len(name) - len(text)
    if start < 0 or start and (whole or name[start - 1] != "."):
        return False
    end = name[start:]
    return all(mine == end[at] or at in dots for at, mine in enumerate(text))


def _at_end(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})$"


@lru_cache(maxsize=2 * MAX_PATTERNS)  # saved rank patterns hold one key per module
def _plain(pattern: str) -> tuple[str, frozenset[int], bool] | None:
    """A pattern that is a name: its text, where in it a dot stands for any character, whether it is a whole path."""
    if not _NAME.fullmatch(pattern):
        return None
    text, whole = pattern.removeprefix("^").removesuffix("$"), pattern.startswith("^")
    if "." not in text:
        return text, frozenset(), whole
    parts = re.findall(r"\\\.|.", text)
    text = "".join(part[-1] for part in parts)
    return text, frozenset(at for at, part in enumerate(parts) if part == "."), whole


def layer_index(pattern: str, name: str) -> int | None:
    """The number right after the part of the path that `pattern` covers, which begins as early as it can: a layer's
    number, not that of an expert in it."""
    found = _match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<fastpeft_index>\d+)\.", pattern, name)
    return int(found["fastpeft_index"]) if found else None


def _match(expression: str, pattern: str, name: str):
    left, start = _left.get() or [TIMEOUT_S], time.process_time()
    try:
        if left[0] <= 0:
            raise TimeoutError
        return _compile(expression).match(name, timeout=left[0])
    except TimeoutError:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
        before = " and those before it" if _left.get() else ""
        raise ConfigError(
            f"the pattern {shown!r} takes more than {TIMEOUT_S} s on the module name {name!r}{before}; simplify it, or "
            "list the names"
        ) from None
    finally:
        left[0] -= max(time.process_time() - start - FREE_S, 0)


@lru_cache(maxsize=4096)
def _compile(pattern: str):
    import regex

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(str(error)) from None
