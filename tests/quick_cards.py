"""Model cards, which peft writes with every adapter, from a template that is compiled once and not for each: that takes
longer than all the rest of saving a tiny one."""

import functools

import jinja2


def install() -> None:
    """The code of a template is kept, by its environment and its text."""
    jinja2.Environment.compile = functools.lru_cache(maxsize=64)(jinja2.Environment.compile)
