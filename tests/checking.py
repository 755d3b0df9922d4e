"""`fastpeft check` called in this process, and a mistake to plant in what it calls."""

import contextlib
import io
import json

from fastpeft import cli


def run_check(*arguments):
    """(exit status, what was printed)"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(["check", *map(str, arguments)])
    return status, printed.getvalue()


def document_of(tmp_path, *arguments):
    """(exit status, what was printed, the figures)"""
    status, printed = run_check(*arguments, "--json", tmp_path / "check.json")
    return status, printed, json.loads((tmp_path / "check.json").read_text())


def scaled(function, position, factor=0.99):
    """The function with one positional argument, its scaling, off by a factor."""

    def wrong(*arguments, **options):
        changed = list(arguments)
        changed[position] *= factor
        return function(*changed, **options)

    return wrong
