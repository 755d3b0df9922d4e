"""What a run prints: every figure once, nothing wrong beside a time, and inside a terminal of 120 or 80 columns."""

import io

import pytest

from benchmarks import report, screen
from fastpeft.console import Console
from tests.benchmarks.test_lines import Q_O, document, result

NAMES = {"frozen": 0.0, "peft-fp32": 2.1, "peft": 0.62, "addmm-algebra": 0.24, "fastpeft:prewrite": 0.118}
SHAPES = [Q_O, {**Q_O, "name": "gate/up", "N": 14336}]


def rows_of(shape, names=NAMES, ms=0.7, **changes):
    """An op's cell, with the speed-ups over the peers in it."""
    times = {name: ms * (1 + over) for name, over in names.items()}
    peers = [name for name in names if name != report.FLOOR and not name.startswith("fastpeft")]
    return [
        result(
            name, times[name], over, shape=shape,
            speedup_vs={p: times[p] / times[name] for p in peers if p != name and name != report.FLOOR}, **changes,
        )
        for name, over in names.items()
    ]  # fmt: skip


OURS = result(
    "fastpeft", 0.75, 0.071, shape=SHAPES[0], speedup_vs={"addmm-algebra": 0.868 / 0.75, "peft": 1.134 / 0.75}
)


def plain(made):
    """As it is written into a file."""
    stream = io.StringIO()
    screen.show(made, Console(stream))
    return stream.getvalue()


def on_terminal(made, width):
    """rich's record of it: .export_text() with the colours or without."""
    from rich.console import Console as RichConsole

    console = Console(io.StringIO())
    console.rich = RichConsole(file=io.StringIO(), force_terminal=True, width=width, record=True, highlight=False)
    screen.show(made, console)
    return console.rich


def line_of(text, name):
    """The row of an implementation, in words."""
    table = text[text.index("implementation") :]
    return next(line for line in table.splitlines() if f" {name} " in f" {line} " and ": " not in line).split()


def test_a_row_has_every_figure():
    text = plain(document(*rows_of(SHAPES[0]), OURS))
    title = text.index("lora_linear, fwd+bwd, M=8192 K=4096 N=4096 r=16 bf16\n")
    headings = text[title:].splitlines()[1]
    assert headings.split("  ")[0] == "cell" and "ms (p20-p80)  over floor  vs best" in headings
    assert headings.endswith("GB/s    TFLOP/s  saved MB  peak MB  check")
    assert line_of(text, "frozen")[2:6] == ["0.700", "(0.686-0.714)", "floor", "714"]
    ours = ["fastpeft", "0.750", "(0.735-0.765)", "+7.1%", "1.16x", "667", "(67%)", "533", "(67%)", "70.3", "315"]
    assert line_of(text, "fastpeft") == [*ours, "1.02"]
    assert line_of(text, "addmm-algebra")[4] == "best" and line_of(text, "peft")[4] == "0.77x"
    assert "\nfastpeft: fastpeft in words\n" in text and text.startswith(report.headline(document(OURS)))


@pytest.mark.parametrize("width", [120, 80])
def test_a_table_fits_a_terminal(width):
    made = document(*(row for shape in SHAPES for row in rows_of(shape)), OURS)
    text = on_terminal(made, width).export_text()
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text and text.count("714 (71%)") == 2, "nothing is folded or cut"
    tables = [line for line in text.splitlines() if line.split()[:2] == ["cell", "implementation"]]
    assert len(tables) == (1 if width == 120 else 2)
    if width == 80:
        assert "saved MB" not in tables[0] and "check" in tables[0] and tables[1].split()[2:4] == ["GB/s", "TFLOP/s"]
    assert "gate/up" in text and "N=14336" in text, "what tells the cells apart"


def test_names_that_are_too_long_are_cut_in_the_table_and_whole_below():
    name = "a-peer-with-a-very-long-name-indeed:eager"
    made = document(*rows_of({"name": "a-model-of-a-very-long-name-70b"}, {"frozen": 0.0, name: 0.5, "fastpeft": 0.1}))
    text = on_terminal(made, 120).export_text()
    assert f"{name[:23]}… " in text and f"{name}: {name} in words" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def styles_of(console):
    """The styled words: {words: style}."""
    return {segment.text.strip(): str(segment.style) for segment in console._record_buffer if segment.text.strip()}


def test_the_best_of_ours_is_bold_and_wrong_is_red_without_a_time():
    wrong = result("fastpeft:fused", status="wrong", note="dA: gain 0.9900", shape=SHAPES[0])
    console = on_terminal(document(*rows_of(SHAPES[0]), OURS, wrong), 120)
    styles = styles_of(console)
    assert styles["fastpeft"] == styles["+7.1%"] == "bold"
    assert "bold" not in styles["fastpeft:prewrite"] + styles["+24.0%"]
    assert styles["wrong"] == styles["fastpeft:fused"] == "red"
    text = console.export_text(clear=False)
    assert line_of(text, "fastpeft:fused") == ["fastpeft:fused", "wrong"]
    assert "lora_linear: fastpeft:fused: wrong: dA: gain 0.9900" in text


def test_columns_that_nothing_fills_are_left_out():
    rows = [row | {"peak_bytes": None, "overhead_over_floor": None} for row in rows_of(SHAPES[0], {"fastpeft": 0.1})]
    made = document(*rows, gpu=None)
    made["stamp"]["ceilings"] = dict.fromkeys(("copy_gbps", "matmul_tflops"))
    text = plain(made)
    headings = next(line for line in text.splitlines() if line.startswith("cell"))
    assert " ".join(headings.split()) == "cell implementation ms (p20-p80) GB/s TFLOP/s saved MB check"
    assert report.CPU_HEADER in text and "%" not in line_of(text, "fastpeft")[5]


def test_steps_have_tokens_gigabytes_and_utilisation():
    step = {"op": "step", "pass": "step", "gbps": None, "tflops": None, "peak_bytes": 24_200_000_000}
    rows = rows_of({"name": "llama3-8b lora", "batch": 4}, {"frozen": 0.0, "peft": 0.5, "fastpeft": 0.1}, 300.0, **step)
    rows = [row | {"tokens_per_s": 3.6e6 / row["median_ms"], "mfu": 0.41, "checked": {"problems": []}} for row in rows]
    text = plain(document(*rows))
    headings = next(line for line in text.splitlines() if line.startswith("cell"))
    assert "tokens/s  MFU %" in headings and "peak GB  check" in headings
    assert "GB/s" not in headings and "peak MB" not in headings
    assert "\nstep, batch=4 bf16\n" in text
    assert line_of(text, "fastpeft")[:6] == ["fastpeft", "330", "(323-337)", "+10.0%", "1.36x", "10,909"]
    assert line_of(text, "fastpeft")[6:] == ["41.0", "70.3", "24.2", "right"]


def test_every_pass_has_its_table():
    rows = [row | {"pass": passed} for passed in ("fwd", "bwd") for row in rows_of(SHAPES[0])]
    text = plain(document(*rows))
    assert "lora_linear, fwd, M=" in text and "lora_linear, bwd, M=" in text


def test_each_reason_is_said_once():
    missing = [
        result("peft", status="missing", note="peft is not installed", shape=shape, **{"pass": passed})
        for passed in ("fwd", "bwd")
        for shape in SHAPES
    ]
    gaps = [
        {"op": "lora_linear", "cell": "all cells", "impl": name, "reason": "its kernels need a GPU"}
        for name in ("fastpeft:fused", "fastpeft:addmm")
    ]
    gaps += [{"op": "lora_linear", "cell": cell, "impl": None, "reason": "the budget was spent"} for cell in ("a", "b")]
    assert screen.remarks(document(*missing, unmeasured=gaps)) == [
        "lora_linear: peft (2 cells): missing: peft is not installed",
        "not measured: lora_linear: all cells: fastpeft:fused, fastpeft:addmm: its kernels need a GPU",
        "not measured: lora_linear: every implementation: a, b: the budget was spent",
    ]


def test_nothing_measured_is_said_too():
    gap = {"op": "lora_linear", "cell": "q/o", "impl": None, "reason": "the budget was spent"}
    text = plain(document(unmeasured=[gap]))
    assert text.splitlines()[1:] == ["not measured: lora_linear: every implementation: q/o: the budget was spent"]


def test_a_real_run_is_shown(run, named):
    made = run(named("frozen", "fastpeft", "peft"))
    text = plain(made)
    ours = next(row for row in made["results"] if row["impl"] == "fastpeft")
    assert f"{100 * ours['overhead_over_floor']:+.1f}%" in line_of(text, "fastpeft")
    assert text.splitlines()[1] == report.CPU_HEADER


def test_a_name_that_means_two_things_says_where():
    rows = [result("peft", op=op, label=f"{op}'s") for op in ("lora_linear", "prefix_attention")]
    text = plain(
        document(*rows, result("fastpeft", label="ours"), result("fastpeft", op="prefix_attention", label="ours"))
    )
    assert "peft: lora_linear's (lora_linear)\npeft: prefix_attention's (prefix_attention)\nfastpeft: ours\n" in text


# Progress


@pytest.mark.parametrize("total", [0, 3])
def test_progress_is_told_in_lines_where_there_is_no_terminal(total):
    stream = io.StringIO()
    with screen.progress(total, Console(stream)) as advance:
        for done in range(total + 1):
            advance(done, "lora_linear q/o timing")
    told = stream.getvalue().splitlines()
    assert told == [f"  cells  {done}/3  lora_linear q/o timing" for done in (1, 2, 3)][:total]


def test_progress_on_a_terminal_is_one_line():
    from rich.console import Console as RichConsole

    console = Console(io.StringIO())
    console.rich = RichConsole(file=console.stream, force_terminal=True, width=80, record=True)
    with screen.progress(4, console) as advance:
        advance(2, "prefix_attention llama-2048 B=8 H=32 Hkv=8 S=2048 P=30 D=128 bf16 fastpeft:merge check")
    frames = [frame for line in console.rich.export_text().splitlines() for frame in line.split("  cells ")[1:]]
    assert any("2/4" in frame and "prefix_at…" in frame for frame in frames)
    assert all(len("  cells " + frame) <= 80 for frame in frames) and "left" in frames[-1]
