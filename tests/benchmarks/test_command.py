"""`fastpeft bench`: what it refuses, what it measures, and what it leaves behind."""

import dataclasses
import json

import pytest
import torch

from fastpeft import cli
from fastpeft.benchmarks import bench_lora_linear, command, lines, report
from fastpeft.benchmarks.benches import BENCHES
from fastpeft.benchmarks.harness import Call

LINEAR = ["lora", "--shape", "64,32,48", "--rank", "8", "--dropout", "0", "--quick", "--device", "cpu"]


def bench(*arguments) -> int:
    return cli.main(["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora", "--shape", "qo"], "neither one of llama3-8b"),
        (["lora", "--shape", "8,0,8"], "must be at least 1"),
        (["lora", "--shape", "8,8"], "--shape 8,8 is not M,K,N"),
        (["lora", "--rank", "0"], "no whole number of at least 1"),
        (["lora", "--dropout", "1"], "0 <= p < 1"),
        (["lora", "--prefix", "3"], "--prefix is for prefix, adapter, prompt, and lora has none"),
        (["prefix", "--rank", "3"], "--rank is for lora, mixed, projections, mlp, experts, dora, and prefix has none"),
        (["prefix", "--per-head"], "--per-head is for adapter"),
        (["step", "--rank", "8"], "--rank is for lora, mixed, projections, mlp, experts, dora, and step has none"),
        (["lora", "--against", "unsloth"], "--against unsloth: the peers here are addmm-algebra, lorafusion, peft"),
        (["lora", "--seconds", "0"], "seconds above 0"),
        (["lora", "--pass", "all"], "invalid choice"),
        (["lora", "--json", "/nowhere/at/all.json"], "no file can be written there"),
        (["lora", "--plot", "/tmp/plot.gif"], "plot.gif"),
        (["lora", "--compare", "/nowhere.json"], "nowhere.json"),
        (["prefix", "--shape", "lorafusion-grid"], "is of linear layers"),
        (["--shape", "1,2,3,4,5,6,7,8"], "is not M,K,N"),
        (["step", "--predict"], "no prediction for whole steps"),
        (["lora", "--predict", "--dtype", "fp32"], "choose --dtype bf16"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_usage_is_refused_in_words_before_anything_runs(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("was measured"))
    assert bench(*arguments, "--device", "cpu") == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.out == ""


def test_a_gpu_that_is_asked_for_must_be_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("lora", "--device", "cuda") == 2
    assert "torch sees no GPU. --device cpu" in capsys.readouterr().err


def test_help_names_models_and_numbers(capsys):
    assert bench("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("usage: fastpeft bench", "qwen3-8b", "lorafusion-grid", "lora: M,K,N", "prefix: B,H,Hkv,S,P,D"):
        assert words in printed


def test_every_pass_is_a_line_of_a_stamped_file(tmp_path, capsys):
    path = tmp_path / "bench.json"
    passes = ["--pass", "fwd", "--pass", "bwd", "--pass", "fwd+bwd"]
    assert bench(*LINEAR, *passes, "--json", path) == 0
    saved = lines.load(path)
    assert lines.problems(saved) == []
    ok = [line for line in saved if line["status"] == "ok"]
    assert {line["pass"] for line in ok} == {"fwd", "bwd", "fwd+bwd"} and len(ok) == 3 * 7
    ours = {line["pass"]: line for line in ok if line["impl"] == "fastpeft"}
    assert all(line["checked"] and line["speedup"].keys() == {"peft-fp32", "peft", "addmm-algebra"}
               for line in ours.values())  # fmt: skip
    assert ours["fwd"]["median"] < ours["fwd+bwd"]["median"] and ours["bwd"]["median"] < ours["fwd+bwd"]["median"]
    assert {line["impl"] for line in saved if line["status"] != "ok"} >= {"peft-compile", "lorafusion"}
    assert ours["fwd"]["stamp"]["gpu"] is None and ours["fwd"]["stamp"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert report.CPU_HEADER in printed and "lorafusion" in printed and str(path) in printed


def test_against_names_the_peers(tmp_path):
    path = tmp_path / "bench.json"
    assert bench(*LINEAR, "--against", "peft", "--json", path) == 0
    measured = [line["impl"] for line in lines.load(path) if line["status"] == "ok"]
    assert measured == ["frozen", "peft", "fastpeft", "fastpeft-fp32", "fastpeft:torch"]


@pytest.mark.parametrize("op", [*BENCHES, "step"])
def test_every_op_is_measured_on_a_cpu(op, tmp_path, capsys):
    path, picture = tmp_path / "bench.json", tmp_path / "plot.svg"
    assert bench(op, "--shape", "tiny", "--quick", "--device", "cpu", "--json", path, "--plot", picture) == 0
    saved = lines.load(path)
    assert any(line["impl"] == "fastpeft" and line["status"] == "ok" for line in saved)
    assert all(line["status"] in ("ok", "missing", "unmeasured") for line in saved)
    assert picture.read_text().startswith("<?xml") and report.CPU_HEADER in capsys.readouterr().out


def test_all_names_the_ops_that_a_shape_is_not_for(tmp_path):
    path = tmp_path / "bench.json"
    assert bench("--shape", "64,32,48", "--quick", "--device", "cpu", "--rank", "4", "--json", path) == 0
    saved = lines.load(path)
    measured = {line["op"] for line in saved if line["status"] == "ok"}
    assert measured == {"lora_linear", "dora_linear", "lora_mlp"}  # M, K and N or H
    notes = {line["op"]: line["note"] for line in saved if line["impl"] == "*"}
    assert "64,32,48 is not B,H,Hkv,S,P,D" in notes["prefix_attention"] and "step" in notes


def scaled(factor: float):
    """Ours with a result that is too large by this factor."""
    found = []
    for implementation in bench_lora_linear.BENCH.implementations:
        if implementation.name == "fastpeft":

            def build(inputs, build=implementation.build) -> Call:
                call = build(inputs)
                return dataclasses.replace(call, forward=lambda: factor * call.forward())

            implementation = dataclasses.replace(implementation, build=build)
        found.append(implementation)
    return dataclasses.replace(bench_lora_linear.BENCH, implementations=found)


def test_a_wrong_kernel_has_no_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(command.BENCHES, "lora", scaled(1.01))
    path = tmp_path / "bench.json"
    assert bench(*LINEAR, "--json", path) == 3
    (line,) = [line for line in lines.load(path) if line["impl"] == "fastpeft"]
    assert line["status"] == "wrong" and line["median"] is line["overhead_over_floor"] is line["gbps"] is None
    assert line["speedup"] == {} and "gain" in line["note"] and not line["checked"]
    assert "gain" in capsys.readouterr().out


def test_what_has_become_slower_is_named_with_exit_status_1(tmp_path, capsys):
    path = tmp_path / "old.json"
    assert bench(*LINEAR, "--json", path) == 0
    old = lines.load(path)
    for line in old:
        if line["impl"] == "fastpeft":
            for name in ("overhead_over_floor", "overhead_p20", "overhead_p80"):
                line[name] = (1 + line[name]) / 100 - 1
            for name in ("median", "p20", "p80"):
                line[name] /= 100
    lines.save(old, path)
    capsys.readouterr()
    assert bench(*LINEAR, "--compare", path) == 1
    assert "fastpeft" in capsys.readouterr().out


def test_predictions_are_marked_and_measure_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("was measured"))
    path = tmp_path / "predicted.json"
    assert bench("--predict", "--shape", "llama3-8b", "--pass", "bwd", "--json", path) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed and all(line.startswith("prediction: ") for line in printed)
    for machine in ("H100 SXM", "H200 SXM", "B200", "MI300X"):
        assert any(machine in line for line in printed)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    without = {"mixed_lora_linear", "expert_lora_linear", "lora_projections", "lora_mlp"}
    assert {entry["op"] for entry in found} == {bench.op for bench in BENCHES.values()} - without
    assert all(f"prediction: none for {op}: no ledger says what it launches" in printed for op in without)
    assert all(entry["prediction"] and entry["pass"] == "bwd" for entry in found)
