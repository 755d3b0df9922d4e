"""Pictures: what they must say stands in them, inside their edges; a path that cannot be written is refused first."""

import re
import sys

import pytest

from benchmarks import lines, plot, report
from fastpeft.errors import FastpeftError
from tests.benchmarks.test_lines import GPU, document, result

SEQUENCES = (512, 1024, 2048, 4096, 8192)


def cell(shape, overheads, ms=1.0, **changes):
    """A row for each implementation."""
    return [result(name, ms * (1 + over), over, shape=shape, **changes) for name, over in overheads.items()]


def attention(seq, prefix=30):
    return {"name": f"llama-{seq}", "B": 8, "H": 32, "S": seq, "P": prefix, "D": 128}


LORA = {"frozen": 0.0, "peft": 2.1, "addmm-algebra": 0.4, "fastpeft": 0.07, "fastpeft:fused": 0.12}
ONE = cell({"name": "q/o", "M": 8192, "K": 4096, "N": 4096, "r": 16}, LORA)
SWEEP = [row for s in SEQUENCES for row in cell(attention(s), LORA, s / 1000, op="prefix_attention")]
MANY = [
    row
    for name in ("q/o", "k/v", "up", "down")
    for r in (8, 16, 32, 64, 128)
    for row in cell({"name": name, "K": len(name), "r": r}, LORA)
]


def steps(**changes):
    taken = {"op": "training_step", "pass": "step", "mfu": 0.4, **changes}
    return [
        row | {"tokens_per_s": 1e4 / (1 + over), "peak_bytes": int(2e10 * (1 + over))} | changes
        for name in ("llama3-8b", "bert-base")
        for over, row in ((o, result(i, 300 * (1 + o), o, **taken)) for i, o in (("frozen", 0.0), ("fastpeft", 0.1)))
        for row in [row | {"shape": {"name": name, "batch": 4}}]
    ]


def drawn(*rows, **options):
    return plot.figure(lines.of(document(*rows, **options)))


def texts(made):
    """Everything that is written in a figure, where it is seen."""
    from matplotlib.text import Text

    made.canvas.draw()
    return [text for text in made.findobj(Text) if text.get_visible() and text.get_text().strip()]


def fields_of(made):
    return made.findobj(lambda found: hasattr(found, "get_xaxis"))


def said(made):
    return [text.get_text() for text in texts(made)]


def bars(axes):
    return [patch.get_width() for patch in axes.patches]


def test_one_cell_has_a_bar_for_each_with_its_figure_and_its_spread():
    made = drawn(*ONE, unmeasured=[{"op": "lora_linear", "cell": "all cells", "impl": "flex", "reason": "none here"}])
    (axes,) = fields_of(made)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "frozen", "fastpeft", "fastpeft:fused", "peft", "addmm-algebra"
    ]  # fmt: skip
    assert bars(axes) == pytest.approx([0.0, 7.0, 12.0, 210.0, 40.0])
    assert [line.get_xdata() for line in axes.lines[1:]][0] == pytest.approx([5.0, 9.0])
    words = said(made)
    assert {"floor: 1 ms", "+7.0", "+12.0", "+210", "+40.0"} <= set(words)
    assert axes.get_xlabel() == "overhead over the floor, %\n(logarithmic beyond ±10)"
    assert "lora_linear, forward and backward: M=8192 K=4096 N=4096 r=16 bf16" in words
    heading = next(text for text in words if text.startswith("fastpeft benchmarks")).replace("\n", " ")
    for stamped in (GPU, "driver 570.1", "torch 2.13.0", "peft 0.21.2", "commit 0123456789ab", "2026-12-01"):
        assert stamped in heading
    assert heading.endswith("not measured, or not everywhere: flex") and report.CPU_HEADER not in heading
    assert {"fastpeft", "others", "floor: no adapter", "p20 to p80 of the rounds"} <= set(words)


def test_a_cpu_is_called_one():
    assert any(report.CPU_HEADER in text for text in said(drawn(*ONE, gpu=None)))


def test_a_narrow_range_stays_linear_and_shares_its_scale():
    rows = [row for s in (512, 2048) for row in cell(attention(s), {"frozen": 0.0, "peft": 0.3, "fastpeft": s / 2e4})]
    first, second = fields_of(drawn(*rows))
    assert first.get_xscale() == "linear" and first.get_xlabel() == "overhead over the floor, %"
    assert first.get_xlim() == second.get_xlim()
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in (first, second)]
    assert names == [["frozen", "fastpeft", "peft"], [""] * 3]


def test_a_sweep_is_a_line_for_each_over_the_size():
    made = drawn(*SWEEP)
    (axes,) = [field for field in fields_of(made) if field.get_xlabel() == "S (logarithmic)"]
    assert axes.get_xscale() == "log" and axes.get_ylabel().startswith("overhead over the floor, %")
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map(str, SEQUENCES))
    _, names = axes.get_legend_handles_labels()
    assert sorted(names) == sorted(LORA)
    ours = next(found for found in axes.containers if found.get_label() == "fastpeft")
    assert list(ours[0].get_xdata()) == list(SEQUENCES) and ours[0].get_ydata() == pytest.approx([7.0] * 5)


def test_sizes_that_differ_together_are_no_sweep():
    rows = [row for s in SEQUENCES for row in cell(attention(s, prefix=s // 8), LORA)]
    assert len(fields_of(drawn(*rows))) == len(SEQUENCES)


def test_without_a_floor_there_are_milliseconds_and_what_is_not_right_has_no_bar():
    rows = [result("frozen", status="failed", note="no"), result("fastpeft", 1.1), result("peft", status="wrong")]
    made = drawn(*rows, result("peft", 2.0, shape={"name": "k/v"}), result("fastpeft", 1.0, shape={"name": "k/v"}))
    first, second = fields_of(made)
    assert bars(first) == [1.1] and bars(second) == [1.0, 2.0] and first.get_xlabel() == "time, ms"
    assert {"failed", "wrong", "not measured", "1.1"} <= set(said(made))


def test_steps_are_tokens_and_peak_memory():
    made = drawn(*steps())
    fields = fields_of(made)
    assert [axes.get_xlabel() for axes in fields] == ["tokens per second"] * 2 + ["peak memory, GB"] * 2
    assert bars(fields[0]) == pytest.approx([10_000, 10_000 / 1.1]) and bars(fields[3]) == pytest.approx([20, 22])
    assert {"10,000", "9,091", "22", "training_step: batch=4 bf16"} <= set(said(made))
    on_cpu = fields_of(drawn(*steps(peak_bytes=None)))
    assert [axes.get_xlabel() for axes in on_cpu] == ["tokens per second"] * 2


def test_of_several_passes_the_whole_is_drawn():
    made = drawn(*(row | {"pass": passed} for passed in ("fwd", "bwd", "fwd+bwd") for row in ONE))
    assert len(fields_of(made)) == 1
    assert "lora_linear, backward: M=8192 K=4096 N=4096 r=16 bf16" in said(drawn(*(r | {"pass": "bwd"} for r in ONE)))


LONG = {
    "frozen": 0.0,
    "a-peer-with-a-very-long-name-indeed:eager-and-compiled": 0.9,
    "fastpeft:a_strategy_of_many_words_that_goes_on": -0.12,
}
NAMED = {"device": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 52 threads", "gpu": None, "dirty": True}
PICTURES = {
    "one": (ONE, {}),
    "long names": ([r for n in ("a-model-of-a-long-name-70b", "b") for r in cell({"name": n, "B": 16}, LONG)], NAMED),
    "many and all kinds": ([*MANY, *SWEEP, *steps()], {}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_cut_off_and_no_two_names_overlap(name):
    rows, options = PICTURES[name]
    made = drawn(*rows, **options)
    edges, fields = made.bbox, fields_of(made)
    numbers = re.compile("[\u2212-]?[0-9.]+")  # at an axis, also beyond its ends, where they are not drawn
    for text in (text for text in texts(made) if hasattr(text, "xy") or not numbers.fullmatch(text.get_text())):
        box = text.get_window_extent()
        inside = edges.x0 - 2 <= box.x0 and box.x1 <= edges.x1 + 2 and edges.y0 - 2 <= box.y0 and box.y1 <= edges.y1 + 2
        assert inside, text.get_text()
    for axes in fields:
        boxes = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 + 2 for below, above in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("SVG", b"<?xml")])
def test_a_file_is_written(suffix, begins, tmp_path):
    path = tmp_path / f"a.{suffix}"
    plot.save(lines.of(document(*ONE)), path)
    assert path.read_bytes().startswith(begins) and path.stat().st_size > 5000


def test_a_real_run_is_drawn(run, named):
    made = plot.figure(lines.of(run(named("frozen", "fastpeft", "peft"))))
    assert {"fastpeft", "peft", "frozen"} <= set(said(made))


def test_a_path_that_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    plot.check_path(tmp_path / "a.png")
    for name in ("a.jpg", "a", "a.png.gz"):
        with pytest.raises(FastpeftError, match=r"give FILE\.png or FILE\.svg"):
            plot.check_path(tmp_path / name)
    with pytest.raises(FastpeftError, match="there is no folder"):
        plot.check_path(tmp_path / "nowhere" / "a.png")


def test_without_matplotlib_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for refused in (lambda: plot.check_path(tmp_path / "a.png"), lambda: plot.save([], tmp_path / "a.png")):
        with pytest.raises(FastpeftError, match=r'pip install "fastpeft\[demo\]"'):
            refused()


def test_nothing_measured_is_nothing_to_draw():
    gap = {"op": "lora_linear", "cell": "all cells", "impl": "flex", "reason": "none here"}
    with pytest.raises(FastpeftError, match="nothing to draw"):
        drawn(unmeasured=[gap])
    assert "wrong" in said(drawn(result("fastpeft", status="wrong"))), "what is wrong was measured, and is shown"
