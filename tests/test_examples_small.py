"""The small examples, whole and short, in one process: what they print, what they leave, and when they fail."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastpeft

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = {"answer_questions": 4, "causal_lm": 12, "dpo": 3, "one_line": 4, "serve_many": 6, "sft": 3, "summarise": 4}


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toys():
    """The module beside the scripts, where they look for it."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import toys

        yield toys
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("toys", None)


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def run(toys, tmp_path, monkeypatch, capsys):
    """Runs a script on few rows: (exit status, what was printed)."""

    def whole(name: str, *arguments):
        script = module_of(name)
        for constant, value in {"TRAIN": 24, "TEST": 6, "HELD_OUT": 2}.items():
            if hasattr(script, constant):
                monkeypatch.setattr(script, constant, value)
        given = ["--steps", STEPS[name], "--out", tmp_path, *arguments]
        return script.main([str(each) for each in given]), capsys.readouterr().out

    return whole


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1])


def trained_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of an adapter that is not neutral any more; peft reads its configuration."""
    assert peft.PeftConfig.from_pretrained(str(folder)).peft_type
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    return tensors


def test_causal_lm_goes_on_from_a_checkpoint(run, tmp_path):
    status, printed = run("causal_lm")
    assert status == 0, printed
    assert "stopped at step 6, went on to step 12" in printed and "14 layers patched" in printed
    base, adapter, reloaded = (number(rf"{name} +loss ([\d.]+)", printed) for name in ("base", "adapter", "reloaded"))
    assert adapter < base - 0.001 and reloaded == adapter
    kept = tmp_path / "checkpoints/checkpoint-6"
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 6
    assert not (kept / "model.safetensors").exists()
    final, half = (trained_tensors(folder) for folder in (tmp_path / "adapter", kept))
    assert final.keys() == half.keys() and not any(torch.equal(final[name], half[name]) for name in final)


def test_answer_questions_learns_its_head_as_well(run, tmp_path, toys):
    tokenizer = toys.tokenizer()
    rows = module_of("answer_questions").rows(tokenizer, toys.trips(4, 5))
    assert len(rows) == 12
    for row in rows:
        words = tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
        assert words.strip() == row["answer"]
    status, printed = run("answer_questions", "--steps", "40")
    assert status == 0, printed
    before, after, reloaded = re.search(r"before ([\d.]+%), after ([\d.]+%), reloaded ([\d.]+%)", printed).groups()
    assert float(before[:-1]) < float(after[:-1]) and after == reloaded
    assert any("qa_outputs" in name for name in trained_tensors(tmp_path / "adapter"))


def test_summarise_generates_and_loads_the_best(run, tmp_path):
    status, printed = run("summarise")
    assert status == 0, printed
    assert number(r"after ([\d.]+)\n", printed) < number(r"loss: before ([\d.]+)", printed) - 0.01
    assert printed.count("->") == 3
    trained_tensors(tmp_path / "adapter")
    best = json.loads((tmp_path / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert best["best_metric"] is not None and "eval_words" in best["log_history"][-1]


def test_summarise_counts_words_at_their_places(toys):
    script, tokenizer = module_of("summarise"), toys.tokenizer()
    found, wanted = (
        tokenizer([f"{who} to Oslo", "Ben to Rome"], padding=True, return_tensors="np")["input_ids"]
        for who in ("Ada", "Eve")
    )
    prediction = type("Prediction", (), {"predictions": found, "label_ids": wanted})
    assert script.words_right(tokenizer)(prediction) == {"words": pytest.approx(5 / 6)}


def test_sft_trains_a_peft_model_under_trl(run, tmp_path):
    status, printed = run("sft")
    assert status == 0, printed
    assert "a peft.peft_model.PeftModelForCausalLM; 14 layers patched" in printed
    assert number(r"after ([\d.]+);", printed) < number(r"before ([\d.]+),", printed) - 0.01
    assert "reloaded without peft: 6 of 6 the same" in printed
    trained_tensors(tmp_path / "adapter")


def test_dpo_has_one_model(run, tmp_path):
    status, printed = run("dpo")
    assert status == 0, printed
    before, after = re.search(r"rewards/margins +before +(-?[\d.]+), after +(-?[\d.]+)", printed).groups()
    assert float(before) == 0 < float(after)
    assert "4 layers patched" in printed and "the model is the base, bit for bit" in printed
    assert "the same after loading" in printed
    trained_tensors(tmp_path / "adapter")


def test_one_line_changes_who_computes_and_nothing_else(run, tmp_path):
    status, printed = run("one_line")
    assert status == 0, printed
    losses = re.findall(r"^ +\d+ +([\d.]+) +([\d.]+)$", printed, re.M)
    assert len(losses) == 4 and all(float(a) == pytest.approx(float(b), abs=2e-5) for a, b in losses)
    assert "14 layers patched; active: default" in printed
    assert re.search(r"seconds for 4 steps here: [\d.]+ without the line, [\d.]+ with it", printed)
    theirs, ours = (trained_tensors(tmp_path / folder) for folder in ("without", "with"))
    assert theirs.keys() == ours.keys() and len(ours) == 28
    settings = [(tmp_path / folder / "adapter_config.json").read_bytes() for folder in ("without", "with")]
    assert settings[0] == settings[1]


def test_serve_many_gives_each_row_what_it_gets_alone(run, tmp_path):
    status, printed = run("serve_many", "--steps", "8")
    assert status == 0, printed
    assert printed.count("16 rows in one batch, 0 other than alone") == 2
    served = re.findall(r"^  (\w+) +\((\w+)\): Ada went to(.*)$", printed, re.M)
    assert [pair[:2] for pair in served[:2]] == [("athens", "athens"), ("berlin", "berlin")]
    assert served[4][:2] == ("athens", "delhi") and served[4][2] != served[0][2]
    assert served[1:4] == served[5:8] and len({text for *_, text in served[:4]}) == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["athens", "berlin", "cairo", "delhi"]


def with_another_head(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """In place of `load_adapter`."""
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    return model


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("causal_lm", r"base +loss ([\d.]+)[^$]+adapter +loss ([\d.]+)[^$]+reloaded +loss (?!\2)"),
        ("sft", r"before ([\d.]+), after ([\d.]+); reloaded without peft: [0-5] of 6 the same"),
    ],
    ids=["causal_lm", "sft"],
)
def test_an_adapter_that_loads_as_another_is_returned(name, learnt, run, monkeypatch):
    monkeypatch.setattr(fastpeft, "load_adapter", with_another_head)
    status, printed = run(name)
    before, after = map(float, re.search(learnt, printed).groups())
    assert status == 1 and after < before


def test_a_line_that_changes_numbers_is_returned(run, monkeypatch):
    def other(model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_A" in name).mul_(1.5)
        return original(model)

    original = fastpeft.patch
    monkeypatch.setattr(fastpeft, "patch", other)
    assert run("one_line")[0] == 1


def test_a_row_that_gets_another_adapter_is_returned(run, monkeypatch):
    original = fastpeft.hotswap_adapter
    monkeypatch.setattr(fastpeft, "hotswap_adapter", lambda model, folder, name: original(model, folder, "berlin"))
    assert run("serve_many", "--steps", "8")[0] == 1


def test_a_model_of_ones_own(toys, run, tmp_path):
    model, tokenizer = toys.load("AutoModelForCausalLM", None, seed=5)
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    (tmp_path / "text").write_text("One line after another. " * 400, encoding="utf-8")
    status, printed = run("causal_lm", "--model", tmp_path / "own", "--data", tmp_path / "text")
    assert status == 0, printed
    with pytest.raises(SystemExit, match="no config.json there"):
        run("causal_lm", "--model", tmp_path)


@pytest.mark.parametrize("name", STEPS)
def test_what_is_asked_for_wrongly(name, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, "--steps", "1")
    assert stopped.value.code == 2 and "1: at least 2 are needed" in capsys.readouterr().err


def test_the_scripts_are_short_and_all_are_run():
    shared = {"toys", "stdlib_text"}
    elsewhere = {"understand_text", "qlora", "train_fsdp"}  # tests of their own
    assert {path.stem for path in EXAMPLES.glob("*.py")} == shared | elsewhere | STEPS.keys()
    for name in STEPS:
        assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 130
