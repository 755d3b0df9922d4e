"""A process whose forks save and load adapters, and die, run out of room or lose their rights on the way.

Each line on its standard input is a task: {"do": "save" or "read", "directory", "source", ...}. The answer is a line
too: {"signal": what killed the fork, or None, "error": the class of what was raised, "message": its words}.
"""

import json
import os
import resource
import signal
import sys

from fastpeft import durable, journal
from fastpeft.files import read_adapter, write_adapter
from tests.failing_disk import FailingOs

NOBODY = 65534


class StrickenOs(FailingOs):
    """`os`, really syncing and writing, but before step `at` something happens."""

    def __init__(self, at, strike):
        super().__init__(at)
        self.strike = strike

    def step(self, name, real, *args, **kwargs):
        if self.count == self.at:
            if self.strike is kill_this and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            self.strike()
        self.count += 1
        return None if name == "fsync" else real(*args, **kwargs)


def kill_this():
    os.kill(os.getpid(), signal.SIGKILL)


def take_rights(directory):
    return lambda: os.chmod(directory, 0o555)


def save(directory, source, kill_at=None, chmod_at=None, times=1):
    found = read_adapter(source)
    at, strike = (kill_at, kill_this) if kill_at is not None else (chmod_at, take_rights(directory))
    durable.os = journal.os = disk = StrickenOs(at, strike)
    for _ in range(times):
        write_adapter(directory, found.tensors, found.config, found.side, found.encoder)
    return {"fired": at is not None and disk.count > at}


def read(directory):
    found = read_adapter(directory)
    return {"config": found.config, "tensors": {key: tensor.tolist() for key, tensor in found.tensors.items()}}


def answer(do, nobody=False, bytes_in_a_file=None, **task):
    if nobody and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if bytes_in_a_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_in_a_file, bytes_in_a_file))
    try:
        return {"error": None, **{"save": save, "read": read}[do](**task)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main():
    for line in sys.stdin:
        task = json.loads(line)
        outside, inside = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(outside)
            data = json.dumps(answer(**task)).encode()
            with os.fdopen(inside, "wb") as pipe:
                pipe.write(data)
            os._exit(0)
        os.close(inside)
        with os.fdopen(outside, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        ended = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None}
        print(json.dumps({**ended, **(json.loads(said) if said else {})}), flush=True)


if __name__ == "__main__":
    main()
