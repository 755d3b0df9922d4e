"""pytest's capture of logs without what it does six times a test: to look through all of some thousand loggers for
those that do not hand on what they are told. They are looked for again when there are more loggers. And without torch's
traces of what it compiles: it writes them, some of a graph's every tensor, as soon as anyone listens."""

import functools
import logging

from _pytest.logging import catching_logs

_shipped = catching_logs.__enter__


def install() -> None:
    catching_logs.__enter__ = _enter


def _enter(self):
    if self.level is not None:
        return _shipped(self)
    root = logging.getLogger()
    self.attached_loggers += [root, *_apart(len(root.manager.loggerDict))]
    for logger in self.attached_loggers:
        logger.addHandler(self.handler)
    return self.handler


@functools.lru_cache(maxsize=1)
def _apart(count: int) -> list[logging.Logger]:
    """The loggers that do not propagate, of so many."""
    loggers = logging.getLogger().manager.loggerDict.values()
    apart = [each for each in loggers if isinstance(each, logging.Logger) and not each.propagate]
    return [each for each in apart if each.name != "torch.__trace"]
