"""What the compiler made of the quick set's launches, kept in aot_known.json so that only what has changed is compiled.

A launch goes by a digest of all that its code hangs on: the sources of the kernel and of every function it calls, the
types, constants and options of the launch, the target, Triton's version, and the sources that read and judge the code.
Change one of them and it is compiled anew; `make aot-known` then writes the file again. What the file says is not
believed unseen: with every run a few of its launches, others after every change, are compiled again.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "aot_known.json"
JUDGES = ("aot.py", "ttir.py")
AGAIN = 6


def digest(launch, target: str, case, version: str) -> str:
    """Of a launch for a target, 16 hexadecimal digits."""
    judges = [(HERE / name).read_text() for name in JUDGES]
    whole = (launch.key, launch.kernel.cache_key, target, case.name, case.bounded, version, *judges)
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:16]


def load(file: Path = FILE) -> dict[str, dict]:
    """Facts, without the seconds, by digest."""
    return json.loads(file.read_text())


def save(facts: dict[str, object], file: Path = FILE) -> None:
    """A line for each launch, in the order of the digests."""
    lines = [f'"{key}": {json.dumps(_kept(facts[key]))}' for key in sorted(facts)]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _kept(facts) -> dict:
    found = asdict(facts)
    del found["seconds"]
    return found


def compiled_again(digests: Iterable[str]) -> set[str]:
    """Of these a few, which no one chooses: they are others when any of them is."""
    wanted = sorted(digests)
    salt = "".join(wanted)
    return set(sorted(wanted, key=lambda each: hashlib.sha256((each + salt).encode()).digest())[:AGAIN])


def contradicted(known: dict, facts) -> list[str]:
    """In words, what was found otherwise than it is known."""
    found = _kept(facts)
    return [f"{name} is {found[name]}, known as {known[name]}" for name in found if found[name] != known[name]]
