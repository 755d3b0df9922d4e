"""Regular expressions from a configuration, matched against module names in bounded time.

A configuration is data that somebody else may have written, and `re` backtracks: `(a+)+$` or twenty `.*` in a row can
hold a process for hours. Refusing what looks dangerous would also refuse patterns in daily use (those for multimodal
models have four `.*?` in a row), so nothing is refused for its looks: the `regex` library, which transformers brings,
matches with a time limit.
"""

import re
from functools import lru_cache

from fastpeft.errors import ConfigError

MAX_LENGTH = 2000
TIMEOUT_S = 0.5  # for one module name; a pattern in daily use takes microseconds


def pattern_problem(pattern: str) -> str | None:
    """Why `pattern` cannot be used, in words that follow a colon; None if it can."""
    if len(pattern) > MAX_LENGTH:
        return f"the pattern has {len(pattern)} characters, more than {MAX_LENGTH}; a list of names has no such limit"
    try:
        re.compile(pattern)
        _compile(pattern)
    except (re.error, OverflowError, ValueError) as error:
        return f"not a regular expression ({error})"
    except (RecursionError, MemoryError):
        return "groups are nested too deep"
    return None


def matches_name(pattern: str, name: str) -> bool:
    """Whether the pattern covers the whole module path, as a `target_modules` string must."""
    return _match(rf"(?:{pattern})\Z", name) is not None


def matches_tail(pattern: str, name: str) -> bool:
    """Whether the pattern covers the end of the path from a dot on, as a `rank_pattern` key must."""
    return _match(rf"(?:.*\.)?(?:{pattern})$", name) is not None


def layer_index(pattern: str, name: str) -> int | None:
    """The number right after the part of the path that `pattern` covers, which begins as early as it can: a layer's
    number, not that of an expert in it."""
    found = _match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<fastpeft_index>\d+)\.", name)
    return int(found["fastpeft_index"]) if found else None


def _match(pattern: str, name: str):
    try:
        return _compile(pattern).match(name, timeout=TIMEOUT_S)
    except TimeoutError:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
        raise ConfigError(
            f"the pattern {shown!r} takes more than {TIMEOUT_S} s on the module name {name!r}; simplify it, or list "
            "the names"
        ) from None


@lru_cache(maxsize=4096)  # saved rank patterns hold one key per module
def _compile(pattern: str):
    import regex

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(str(error)) from None
