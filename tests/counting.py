"""What `make reliability` counts, and how much of it there is: a little in `make test`, all of it there."""

import json
import os

COUNTS = "FASTPEFT_COUNTS"  # the file that counts go to, a line of JSON each; nowhere if it is not set
FULL = "FASTPEFT_FULL"  # "1" for as much as is promised


def count(what: str, number: int = 1) -> None:
    """Add to one of the rows that `make reliability` prints; call it after the assertions that make it true."""
    if path := os.environ.get(COUNTS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({what: number}) + "\n")


def how_many(quick: int, full: int) -> int:
    """`quick` in `make test`, `full` in `make reliability`."""
    return full if os.environ.get(FULL) == "1" else quick
