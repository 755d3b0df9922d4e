"""How much is tried: a few examples, always the same, in the tests; random ones in `make fuzz`."""

import os
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, note, settings
from hypothesis.strategies import SearchStrategy

from tests.counting import how_many

EXAMPLES = "FASTPEFT_FUZZ_EXAMPLES"  # of each property in a round of `make fuzz`, from random seeds
UNTIL = "FASTPEFT_FUZZ_UNTIL"  # the second of time.time() from which on no property is begun


def tried(quick: int, full: int) -> settings:
    """For a property: `quick` examples in `make test`, `full` in `make reliability`, the same in every run; in `make
    fuzz` as many as it says, different ones."""
    random = os.environ.get(EXAMPLES)
    return settings(
        max_examples=int(random) if random else how_many(quick, full),
        derandomize=not random,
        deadline=None,  # an interpreted kernel takes as long as it takes
        print_blob=True,
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # to explain takes as long as to shrink
    )


def shown(*case) -> None:
    """Of the smallest case that fails, the line to paste above the property is printed with it."""
    note(f"@example({', '.join(map(repr, case))})")


def assert_shown(cases: SearchStrategy, holds: Callable[[object], None], words: str) -> None:
    """One of a hundred cases, always the same ones, does not hold, in these words: what a property has to say of a
    mistake that is planted."""

    @settings(max_examples=100, derandomize=True, deadline=None, phases=(Phase.generate,))
    @given(cases)
    def tried_on(case):
        holds(case)

    with pytest.raises(AssertionError, match=words):
        tried_on()
