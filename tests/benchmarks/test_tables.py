"""README's performance tables: made from what GPUs measured, the newest, never from a CPU's figures or predictions."""

import json

import pytest

from benchmarks import bench_lora_linear, predict, report
from benchmarks.tables import BEGIN, END, NONE, BadResults, main, put, read, text

GPU = "NVIDIA H100 80GB HBM3"
README = f"before\n\n{BEGIN}\n{NONE}{END}\n\nafter\n"


def row(impl, median=1.0, overhead=0.0, **changes):
    """A result as a document holds it."""
    blank = dict.fromkeys(
        ("strategy", "adapter_dtype", "median_ms", "p20_ms", "p80_ms", "forward_ms", "host_ms", "first_s", "gbps",
         "tflops", "overhead_over_floor", "overhead_p20", "overhead_p80", "peak_bytes", "held_bytes", "saved_bytes",
         "checked", "tokens_per_s", "mfu")
    )  # fmt: skip
    shape = {"name": "q/o", "M": 8192, "K": 4096, "N": 4096, "r": 16}
    return {
        **blank, "op": "lora_linear", "impl": impl, "label": impl, "shape": shape, "dtype": "bf16", "dropout": 0.05,
        "pass": "fwd+bwd", "status": "ok", "note": "", "rounds": 10, "speedup_vs": {}, "median_ms": median,
        "overhead_over_floor": overhead, **changes,
    }  # fmt: skip


def document(*rows, device="cuda", date="2026-12-01T10:00:00+00:00", **stamp):
    """A check-in's, of a GPU unless said otherwise."""
    made = report.new_document({"device": device})
    made["stamp"] = report.stamp("cpu") | {
        "device": GPU, "driver": "570.1", "torch": "2.13.0", "triton": "3.7.1", "peft": "0.21.2", "header": "",
        "commit": "0123456789abcdef", "dirty": False, "date": date, **stamp,
    }  # fmt: skip
    made["results"] = list(rows)
    assert report.problems(made) == []
    return made


def line(impl, median=1.0, overhead=0.0, gpu=GPU, date="2026-12-02T10:00:00+00:00", **changes):
    """A result as JSON lines hold it."""
    stamp = {"gpu": gpu, "driver": "570.1", "torch": "2.13.0", "triton": "3.7.1", "commit": "fedcba9876543210"}
    return {
        "op": "prefix_attention", "impl": impl, "shape": "llama3-8b S=2048", "dtype": "bf16", "pass": "bwd",
        "median": median, "overhead_over_floor": overhead, "status": "ok", "stamp": stamp | {"date": date}, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Writes files into a folder of results: documents as .json, lists of lines as .jsonl."""
    results = tmp_path / "results"
    results.mkdir()

    def write(**files):
        for name, content in files.items():
            if isinstance(content, list):
                (results / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in content))
            else:
                (results / f"{name}.json").write_text(json.dumps(content))
        return results

    return write


def test_the_readme_is_up_to_date():
    assert main(["--check"]) == 0


def test_without_results_one_sentence_says_so(folder):
    assert text(read(folder())) == NONE
    assert NONE.count(". ") == 0 and NONE.startswith("No GPU figures are published yet")


def test_a_document_becomes_a_table_with_its_stamp(folder):
    rows = row("frozen", 0.7), row("fastpeft", 0.78, 0.112), row("peft", status="missing", median=None, overhead=None)
    made = text(read(folder(first=document(*rows))))
    assert "| shape | dtype | dropout | pass | floor, ms | fastpeft | peft |\n| --- | --- | --- | --- | ---: |" in made
    assert "| q/o M=8192 K=4096 N=4096 r=16 | bf16 | 0.05 | fwd+bwd | 0.700 | +11.2 | missing |\n" in made
    for stamped in (GPU, "driver 570.1", "torch 2.13.0", "triton 3.7.1", "commit 0123456789ab", "2026-12-01"):
        assert stamped in made
    assert "with changes" not in made
    assert "commit 0123456789ab with changes" in text(read(folder(first=document(*rows, dirty=True))))


def test_what_ran_on_a_cpu_is_left_out(folder):
    a_cpu = document(row("frozen"), device="cpu", header=report.CPU_HEADER, driver=None)
    assert text(read(folder(cpu=a_cpu, lines=[line("frozen", gpu=None), line("fastpeft", gpu=None)]))) == NONE
    disguised = document(row("frozen"), device="cuda", header=report.CPU_HEADER)
    assert text(read(folder(cpu=disguised, lines=[]))) == NONE


def test_what_was_not_measured_is_no_row(folder):
    made = text(read(folder(lines=[line("frozen"), line("flex", status="unmeasured", median=None)])))
    assert "frozen" not in made and "flex" not in made and "1.000" in made


def test_what_a_run_on_this_machine_writes_is_left_out(run, named, folder):
    made = run(named("frozen", "fastpeft"))
    assert [entry["status"] for entry in made["results"]] == ["ok", "ok"]
    results = folder()
    report.save(made, results / "here.json")
    assert text(read(results)) == NONE


def test_of_each_gpu_and_op_the_newest_run_is_shown_whole(folder):
    old = document(row("frozen", 9.0), row("peft", 9.9, 0.1), date="2026-11-30T23:59:59+00:00")
    new = document(row("frozen", 0.7), row("fastpeft", 0.75, 0.07))
    other = document(row("frozen", 0.6), date="2026-01-01T00:00:00+00:00")
    other["stamp"]["device"] = "AMD Instinct MI300X"
    made = text(read(folder(old=old, new=new, other=other, lines=[line("frozen", 2.0), line("fastpeft", 2.2, 0.1)])))
    assert "9.000" not in made and "peft 0.21.2" in made and "| peft |" not in made
    assert made.index("MI300X") < made.index("H100") < made.index("**prefix_attention**")
    assert "| llama3-8b S=2048 | bf16 | 0 | bwd | 2.000 | +10.0 |" in made


def test_an_implementation_that_some_cells_lack_has_an_empty_place(folder):
    wide = {"shape": {"name": "k/v", "M": 1}}
    rows = row("frozen"), row("fastpeft", 1.1, 0.1), row("frozen", **wide), row("peft", 1.2, None, **wide)
    made = text(read(folder(one=document(*rows))))
    assert "| q/o M=8192 K=4096 N=4096 r=16 | bf16 | 0.05 | fwd+bwd | 1.000 | +10.0 |  |\n" in made
    assert "| k/v M=1 | bf16 | 0.05 | fwd+bwd | 1.000 |  | 1.200 ms |\n" in made


def prediction():
    cell = bench_lora_linear.BENCH.cell(name="q/o", M=8192, K=4096, N=4096, r=16, dropout=0.0, dtype="bf16")
    return predict.predictions(bench_lora_linear.BENCH, [cell])[0]


BAD = {
    "no results": ({"results": []}, "document.schema is missing|document.kernels is missing"),
    "prediction": ([prediction()], "line 1 is a prediction, and no result"),
    "another kind of lines": ([{"op": "x", "stamp": {"gpu": GPU}}], "line 1 lacks 'status'"),
    "no stamp": ([{"op": "x"}], "line 1 lacks 'stamp'"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_result_is_named(content, said, folder, tmp_path, capsys):
    results = folder(bad=content)
    with pytest.raises(BadResults, match=rf"bad\.jsonl?: .*({said})"):
        read(results)
    (tmp_path / "README.md").write_text(README)
    assert main(["--results", str(results), "--readme", str(tmp_path / "README.md")]) == 2
    assert "bad.json" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == README


def test_half_a_file_is_named(folder):
    results = folder(whole=document(row("frozen")))
    half = (results / "whole.json").read_text()[:100]
    (results / "half.json").write_text(half)
    with pytest.raises(BadResults, match=r"half\.json: "):
        read(results)


def test_writing_and_checking(folder, tmp_path, capsys):
    results, readme = folder(one=document(row("frozen"), row("fastpeft", 1.1, 0.1))), tmp_path / "README.md"
    readme.write_text(README)
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert main([*arguments, "--check"]) == 1
    assert "run `make tables`" in capsys.readouterr().err and readme.read_text() == README
    assert main(arguments) == 0
    written = readme.read_text()
    assert written.startswith("before\n\n") and written.endswith("\n\nafter\n") and "+10.0" in written
    assert NONE not in written
    assert main([*arguments, "--check"]) == 0 and main(arguments) == 0 and readme.read_text() == written


@pytest.mark.parametrize("readme", ["", BEGIN, END + BEGIN, BEGIN + END + END])
def test_a_readme_without_its_markers_is_refused(readme):
    with pytest.raises(BadResults, match="README.md must hold once, and in this order"):
        put(readme, NONE)


def test_wrong_usage_is_status_two(capsys):
    assert main(["--what"]) == 2
    assert main(["--readme", "nowhere/README.md"]) == 2
    assert "nowhere/README.md" in capsys.readouterr().err
