"""Arguments of public calls, checked in words before anything is done with them."""

from typing import Any

from fastpeft.errors import PatchError
from fastpeft.untrusted import shown


def names_of(given: Any, where: str) -> tuple[str, ...]:
    """The adapters that a call names: one by its name, several by a list or tuple. Raises PatchError for what is no
    name; whether there are such adapters is not asked."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise PatchError(f"{where}: {shown(given)} names no adapter; give a name, or a list of names")
    return tuple(given)


def check_flags(where: str, **given: Any) -> None:
    """Raises PatchError unless each argument is True or False itself."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise PatchError(f"{where}: {name}={shown(value)} must be True or False")
