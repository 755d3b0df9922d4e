"""Stand-ins for `os` in the modules that write adapters: they fail, crash or lose power at a chosen step.

A step is one call that changes the disk or makes a change durable. Nothing is really synced, so the tests are fast; the
power-loss model knows what was.
"""

import itertools
import os

STEPS = ("open", "write", "fsync", "replace", "unlink", "makedirs")


class Crash(BaseException):
    """The end of the process: no handler catches it, and every later step ends in it too."""


class FailingOs:
    """`os`, but step `at` (counted from 0) and, unless `once`, all later ones raise what `error` makes."""

    def __init__(self, at=None, error=Crash, once=False):
        self.at, self.error, self.once = at, error, once
        self.count = 0

    def __getattr__(self, name):
        real = getattr(os, name)
        return (lambda *args, **kwargs: self.step(name, real, *args, **kwargs)) if name in STEPS else real

    @property
    def fired(self):
        return self.at is not None and self.count > self.at

    def step(self, name, real, *args, **kwargs):
        now, self.count = self.count, self.count + 1
        if self.at is not None and (now == self.at if self.once else now >= self.at):
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])  # as much as there was room for
            raise self.error()
        return self.done(name, real, *args, **kwargs)

    def done(self, name, real, *args, **kwargs):
        return None if name == "fsync" else real(*args, **kwargs)


class _File:
    """What of a file is on the medium: nothing until it is synced."""

    def __init__(self, durable=b""):
        self.durable = durable


class PowerLossOs(FailingOs):
    """A disk that keeps, of what was not synced, any part: each change of the directory since its last sync or not."""

    def __init__(self, directory, at=None):
        super().__init__(at)
        self.directory = str(directory)
        self.names, self.open_files, self.changes = {}, {}, []
        for name in os.listdir(directory):
            with open(os.path.join(directory, name), "rb") as file:
                self.names[name] = _File(file.read())
        self.synced = dict(self.names)

    def done(self, name, real, *args, **kwargs):
        result = super().done(name, real, *args, **kwargs)
        names = [os.path.basename(path) for path in args if isinstance(path, str)]
        if name == "open" and args[1] & os.O_CREAT:
            self.names[names[0]] = file = _File()
            self.open_files[result] = (args[0], file)
            self.changes.append((None, names[0], file))
        elif name == "open":
            self.open_files[result] = (args[0], None)
        elif name == "fsync":
            path, file = self.open_files[args[0]]
            if file is None:
                self.synced, self.changes = dict(self.names), []
            else:
                with open(path, "rb") as content:
                    file.durable = content.read()
        elif name == "replace":
            file = self.names.pop(names[0])
            self.names[names[1]] = file
            self.changes.append((names[0], names[1], file))
        elif name == "unlink":
            self.changes.append((names[0], None, self.names.pop(names[0])))
        return result

    def survivors(self):
        """Every state of the directory that the loss of power may leave, as {name: content}."""
        for kept in itertools.product([False, True], repeat=len(self.changes)):
            state = dict(self.synced)
            for old, new, file in itertools.compress(self.changes, kept):
                if old is not None and state.get(old) is file:
                    del state[old]
                if new is not None:
                    state[new] = file
            yield {name: file.durable for name, file in state.items()}
