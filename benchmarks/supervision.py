"""Processes that may crash or hang: started, watched, ended, and started again without what ended them.

A worker (`python -m benchmarks.checkin --worker FILE`) works the plan in a document off and writes every step into it,
so that the file says what ran when it died, and its age how long ago that was. One that came through its plan waits for
the next: its imports, CUDA and the kernels it has loaded would take a new one many seconds. Its standard input is one
end of a pair of sockets, by which it is told to begin and says that it is done.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import bench_step, report
from .benches import BY_OP
from .harness import Budget
from .report import FLOOR, ROOT
from .runner import DeviceLost, Run, cells_of, key_of, key_of_row
from .step_check import release

STARTS = 4  # the first, and three more after crashes
STALL_S = 75.0  # longer than torch.compile's first compilation, the slowest single step
QUIET_S = 30.0  # whoever has not said a word for that long when the time is up would have hung
GRACE_S = 15.0  # beyond a worker's time, to finish what it is at
DEVICE_LOST_RC = 4
TIME_UP = "the time was up"
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a child must not load anything


def start(command: Sequence[str], environment: Mapping[str, str] | None = None, **streams) -> subprocess.Popen:
    """In its own process group, so that compilers and other children end with it. A checkout is run from its root.

    A shell's background jobs ignore interrupts, and what they start inherits that; this must heed ours.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {})
    folder = ROOT if __package__ == "benchmarks" else None
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, preexec_fn=_begin, **streams)


def _begin() -> None:
    """In the child: interrupts are heeded, and on Linux it ends with its parent, whose GPU it would keep otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(process: subprocess.Popen, patience: float = 0.0) -> None:
    """Kill the group, after an interrupt and `patience` seconds for whoever can still write something down."""
    if patience:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """The process for the plan in `path`, and for those that are put there after it. `command`: in place of ours."""

    def __init__(self, path: Path, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None):
        self.path, self.environment = path, environment
        self.command = command or [sys.executable, "-m", f"{__package__}.checkin", "--worker", str(path)]
        self._process: subprocess.Popen | None = None
        self._line: socket.socket | None = None

    def begin(self) -> subprocess.Popen:
        """The one that waits is told to; else a new one is started."""
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._line, its = socket.socketpair()
            with its:
                self._process = start(self.command, self.environment, stdin=its)
        with contextlib.suppress(OSError):  # it may end this very moment, which its exit status will say
            self._line.send(b"\n")
        return self._process

    def is_done(self, seconds: float) -> bool:
        """Waits up to `seconds` for the process to say so."""
        if not select.select([self._line], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):
            if self._line.recv(1):
                return True
        time.sleep(seconds)  # its end is closed: the process is about to be gone
        return False

    def end(self) -> None:
        """Nothing runs any more, and the device is free."""
        if self._process is not None:
            if self._process.poll() is None:
                end(self._process)
            self._line.close()
        self._process = self._line = None


def watch(worker: Worker, process: subprocess.Popen, budget: Budget, stall_s: float = STALL_S) -> str:
    """Wait for the process, which writes the worker's file at every step. Returns "" or why it ended too early."""
    while process.poll() is None:
        if worker.is_done(0.1):
            return ""
        quiet = time.time() - worker.path.stat().st_mtime
        if quiet > stall_s:
            end(process)
            return f"stood still for {stall_s:.0f} s"
        if budget.left() < -GRACE_S:
            end(process)
            return f"stood still for {quiet:.0f} s, and {TIME_UP}" if quiet > QUIET_S else TIME_UP
    if process.returncode == DEVICE_LOST_RC:
        return "the device stopped answering"
    if process.returncode < 0:
        return f"ended by signal {-process.returncode}"
    return f"exit status {process.returncode}" if process.returncode else ""


def supervise(worker: Worker, budget: Budget) -> str:
    """Work the plan in the worker's file off, anew after each death. Returns "", or why the last process that failed
    ended early."""
    path, trouble = worker.path, ""
    for _ in range(STARTS):
        document = report.load(path)
        document["plan"]["until"] = time.time() + budget.left()  # also the worker's imports take of it
        report.save(document, path)
        reason = watch(worker, worker.begin(), budget)
        if not reason:
            return trouble
        document = report.load(path)
        trouble = f"{reason}, at {document['running']}"
        print(f"the benchmark's process: {trouble}", flush=True)
        avoided = reason != TIME_UP and _avoid(document, reason)
        if avoided or reason == TIME_UP:
            document["running"] = None  # it has been dealt with
        report.save(document, path)
        if not avoided or budget.left() <= 0:
            break
    document = report.load(path)
    _name_unmeasured(document, f"the benchmark's process did not get there ({reason})")
    report.save(document, path)
    return trouble


def serve(path: Path) -> int:
    """The worker: a plan for each time that it is told to begin. Where something failed it ends, and what that may have
    left on the device with it."""
    while os.read(0, 1):
        if code := work(path):
            return code
        document = report.load(path)
        if any(row["status"] == "failed" for row in document["results"]):
            return 0
        release(torch.device(document["plan"]["device"]))
        os.write(0, b"\n")
    return 0


def work(path: Path) -> int:
    """Measures what the plan in `path` still lacks, into the same file."""
    document = report.load(path)
    budget = Budget(document["plan"]["until"] - time.time())

    def save() -> None:
        report.save(document, path)

    try:
        Run(document, save, list(BY_OP.values()), budget).measure()
        if cases := bench_step.cases_of(document["plan"]):
            bench_step.Steps(document, cases, save, budget).measure()
    except DeviceLost as error:
        print(f"device lost: {error}", file=sys.stderr)
        return DEVICE_LOST_RC
    return 0


def _avoid(document: dict, reason: str) -> bool:
    """Change the plan so that what ended the process is not met again. False if nothing is left to measure then."""
    at, plan = document["running"], document["plan"]
    if at is None or at["stage"] in ("ceilings", "profile") or at["impl"] == FLOOR:
        return False
    if at["impl"] is None:
        plan["skip"][at["cell"]] = f"its timing ended the process: {reason}"
    else:
        plan["without"].setdefault(at["op"], {})[at["impl"]] = f"ended the process ({reason}) in {at['cell']}"
    return True


def _name_unmeasured(document: dict, reason: str) -> None:
    done = set(map(key_of_row, document["results"]))
    named = {(entry["op"], entry["cell"]) for entry in document["unmeasured"]}
    for bench, cell in cells_of(document["plan"], BY_OP):
        if key_of(bench, cell) not in done and (bench.op, cell.id) not in named:
            document["unmeasured"].append({"op": bench.op, "cell": cell.id, "impl": None, "reason": reason})
