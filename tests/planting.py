"""Mistakes planted in a source, for the tests of the tests."""

import ast


def mutated(source: str, function: str, old: str, new: str) -> str | None:
    """The source with the mistake in that function (or class), None if it has no such function."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if getattr(node, "name", None) == function:
            body = "".join(lines[node.lineno - 1 : node.end_lineno])
            assert body.count(old) == 1, f"{function}: {old!r} occurs {body.count(old)} times, not once"
            return "".join([*lines[: node.lineno - 1], body.replace(old, new), *lines[node.end_lineno :]])
    return None
