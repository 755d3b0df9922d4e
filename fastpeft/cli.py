"""The command line: `fastpeft demo`, `check`, `info`, `tune`, `bench`.

Exit status: 0; 1 if what was checked does not hold; 2 for wrong usage and every refusal, said in one line.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

import fastpeft
from fastpeft import check, demo, info, tune
from fastpeft.errors import FastpeftError

COMMANDS = {
    "demo": (demo, "fine-tune a small language model on this machine and see what it costs, beside HF peft"),
    "check": (check, "measure results and gradients against eager torch, HF peft and float64, on this machine"),
    "info": (info, "versions, devices, and which backend serves them and why"),
}

TUNE = "measure which strategies and tiles are the fastest on this GPU, and write down what the next run will use"

BENCH = "time an op, or whole training steps, beside its peers: `fastpeft bench --help`"


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="fastpeft", description=fastpeft.__doc__.partition("\n\n")[0])
    out.add_argument("--version", action="version", version=f"fastpeft {fastpeft.__version__}")
    commands = out.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__.partition(": ")[2])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    tuning = commands.add_parser("tune", help=TUNE, description=tune.__doc__.partition(": ")[2])
    tune.add_arguments(tuning)
    tuning.set_defaults(run=run_tune)
    commands.add_parser("bench", help=BENCH, add_help=False)  # its options are the benchmarks' own: see main
    return out


def run_tune(arguments: argparse.Namespace) -> int:
    options = tune.options_of(arguments)
    return importlib.import_module("fastpeft.benchmarks.tuning").run(options)


def run_bench(argv: Sequence[str]) -> int:
    return importlib.import_module("fastpeft.benchmarks.command").main(argv, prog="fastpeft bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; argparse itself leaves with 0 or 2. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? and does not raise
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            status = run_bench(argv[1:])
        else:
            arguments = parser().parse_args(argv)
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except FastpeftError as error:
        print(f"fastpeft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastpeft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`fastpeft info | head`); what is buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a file of someone else's
        print(f"fastpeft: error: {error}", file=sys.stderr)
        return 2
