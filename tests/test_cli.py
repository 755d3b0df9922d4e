"""The command line: what it prints, what it returns, and that a refusal is one line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft
from fastpeft import cli, info
from fastpeft.console import Console
from fastpeft.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def run_main(*arguments, **environment):
    """A process of its own at the root of the checkout."""
    command = [sys.executable, "-m", "fastpeft", *arguments]
    settings = {name: value for name, value in os.environ.items() if name != "FASTPEFT_BACKEND"} | environment
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)


def test_version():
    done = run_main("--version")
    assert (done.returncode, done.stdout) == (0, f"fastpeft {fastpeft.__version__}\n")


def test_help_says_what_each_command_is_for(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"{name} {summary}" in printed
    assert "bench" in printed


@pytest.mark.parametrize("command", [*cli.COMMANDS, "tune"])
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fastpeft {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["info", "--fast"], ["demo", "--steps", "0"], ["demo", "--seed", "-1"]]
)
def test_wrong_usage_leaves_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("r is 0;\n  choose at least 1"), 2, "fastpeft: error: r is 0; choose at least 1\n"),
        (OSError(28, "No space left on device"), 2, "fastpeft: error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "fastpeft: interrupted\n"),
    ],
)
def test_a_refusal_is_one_line(error, status, line, monkeypatch, capsys):
    def refuse(arguments):
        raise error

    monkeypatch.setattr(info, "run", refuse)
    assert cli.main(["info"]) == status
    assert capsys.readouterr() == ("", line)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(info, "run", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_info_tells_versions_devices_backends_and_variables(capsys, monkeypatch, environment_backend):
    environment_backend("torch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["info"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    first_words = {words[0]: words[1:] for words in reversed(lines) if len(words) > 1}
    assert first_words["fastpeft"][0] == fastpeft.__version__
    for name, version in info.versions().items():
        assert first_words[name][0] == version.split()[0]
    assert ["cpu", "torch", "asked for"] in lines
    assert first_words["FASTPEFT_BACKEND"] == ["torch"]
    assert first_words["TRITON_INTERPRET"][0] == "1:"


def test_info_survives_a_backend_that_does_not_exist(capsys, environment_backend):
    environment_backend("vulkan")
    assert cli.main(["info"]) == 0
    assert "FASTPEFT_BACKEND: unknown backend 'vulkan'" in capsys.readouterr().out


def test_info_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(info, "LIBRARIES", ("no_such_library",))
    assert info.versions()["no_such_library"] == "not installed"


def test_why_triton_does_not_serve_the_cpu():
    done = run_main("info", TRITON_INTERPRET="0")
    assert done.returncode == 0 and "cannot: CPU tensors need TRITON_INTERPRET=1" in done.stdout


def test_bench_reaches_the_benchmarks_of_a_checkout(capsys):
    done = run_main("bench", "lora", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: fastpeft bench")
    assert cli.main(["bench", "--quick", "lora", "--rank", "none"]) == 2
    assert "no whole number" in capsys.readouterr().err


def test_a_reader_that_left_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "fastpeft", "info"], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_an_ascii_terminal_is_no_error():
    done = run_main("info", PYTHONIOENCODING="ascii", FASTPEFT_BACKEND="größer")
    assert done.returncode == 0 and "gr??er" in done.stdout.replace("\\xf6", "?").replace("\\xdf", "?")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_in_plain_text_is_aligned():
    stream = io.StringIO()
    Console(stream).table(("what", "n"), [["one", ("1", "bold")], [], ["hundred", "100"]], title="Counts")
    assert stream.getvalue() == "\nCounts\nwhat       n\n-------  ---\none        1\n\nhundred  100\n"


def test_a_terminal_without_rich_gets_plain_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    console = Console(stream)
    with console.progress("training", 20) as advance:
        for done in range(1, 21):
            advance(done, f"loss {done}")
    assert stream.getvalue().splitlines() == [f"  training  {done:>2}/20  loss {done}" for done in range(2, 21, 2)]


def test_a_terminal_with_rich_gets_a_table_and_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = Console(stream)
    console.table(("what", "n"), [["[bold]path", "1"], [], ["b", ("2", "green")]], title="Counts")
    with console.progress("training", 4) as advance:
        advance(4, "loss 1.5")
    text = stream.getvalue()
    assert "[bold]path" in text and "─" in text  # brackets are not markup
    assert "4/4" in text and "loss 1.5" in text and "\x1b[" in text
