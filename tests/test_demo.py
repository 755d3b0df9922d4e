"""The demo, whole and in parts: what it shows is measured, what it refuses is said in words."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import fastpeft
from fastpeft import cli, demo_base, demo_corpus
from fastpeft import demo as demo_command
from fastpeft.demo_base import AutocastRun
from fastpeft.demo_train import FrozenBase, Run, Schedule, held_out_loss, paired_ratio, step_memory, train


def demo(*arguments):
    """(exit status, what was printed)"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(["demo", *map(str, arguments)])
    return status, printed.getvalue()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    status, printed = demo("--quick", "--out", out)
    return SimpleNamespace(
        status=status, printed=printed, out=out, result=json.loads((out / "result.json").read_text())
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny model with its tokenizer, a text file and JSON Lines, as a user would have them."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("own")
    documents = demo_corpus.english(40_000).training
    tokenizer = demo_corpus.train_tokenizer(documents, 300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=demo_corpus.END).save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    lines = "".join(json.dumps({"text": document, "id": 1}) + "\n" for document in documents)
    (folder / "lines.jsonl").write_text("\n" + lines, encoding="utf-8")
    return folder


def run_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_perplexity_falls_on_the_code_as_it_does_through_hf_peft(quick):
    assert quick.status == 0
    before, runs = quick.result["before"], quick.result["runs"]
    assert runs["fastpeft"]["perplexity"]["Python"] < 0.95 * before["Python"]
    for text in ("Python", "English"):
        # One schedule, the same start, other draws of dropout.
        assert runs["fastpeft"]["perplexity"][text] == pytest.approx(runs["HF peft"]["perplexity"][text], rel=0.02)
    # Up to the first update the losses differ only by dropout in a term that is zero.
    assert runs["fastpeft"]["losses"][0] == pytest.approx(runs["HF peft"]["losses"][0], rel=1e-6)
    assert len(runs["fastpeft"]["losses"]) == quick.result["steps"] == 40


def test_every_proof_holds_and_is_shown(quick):
    proofs = {proof["what"]: proof for proof in quick.result["proofs"]}
    assert all(proof["ok"] for proof in proofs.values()), proofs
    assert "identical" in proofs["saved, and loaded into a fresh base"]["detail"]
    assert len(proofs) == 6
    for what in proofs:
        assert f"ok  {what}" in quick.printed


def test_the_table_shows_the_figures_of_the_json(quick):
    ours, theirs = quick.result["runs"]["fastpeft"], quick.result["runs"]["HF peft"]
    assert quick.result["trainable"] < quick.result["parameters"]
    assert f"trainable params: {quick.result['trainable']:,d} || all params" in quick.printed
    for run in (ours, theirs):
        assert f"{run['perplexity']['Python']:.1f}" in quick.printed
        assert f"{run['step_ms']:.1f} ms" in quick.printed
        assert f"{run['peak_bytes'] / 2**20:.1f} MiB" in quick.printed
    assert ours["saved_bytes"] < theirs["saved_bytes"]  # HF peft keeps what dropout made of x, and its mask
    assert ours["resident_bytes"] == theirs["resident_bytes"]
    assert (
        quick.result["step_ratio"]["p20"] <= quick.result["step_ratio"]["median"] <= quick.result["step_ratio"]["p80"]
    )


def test_the_corpora_are_recorded(quick):
    for name, read in (("English", demo_corpus.english), ("Python", demo_corpus.python_sources)):
        facts = quick.result["corpora"][name]
        assert {key: facts[key] for key in read(150_000).facts()} == read(150_000).facts()
        assert facts["tokens"] > facts["tokens_held_out"] > 100


def test_the_picture_is_a_picture(quick):
    with Image.open(quick.out / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_the_adapter_is_there(quick):
    assert {path.name for path in (quick.out / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_own_model_and_text_and_the_same_again(own, tmp_path):
    arguments = ("--quick", "--steps", 12, "--model", own / "model", "--data", own / "lines.jsonl", "--out")
    results = []
    for again in ("first", "second"):
        status, printed = demo(*arguments, tmp_path / again)
        assert status == 0, printed
        results.append(run_of(tmp_path / again))
    first, second = results
    assert first["texts"] == ["lines.jsonl"] and "pretrain" not in printed and first["sequence"] == 32
    assert len(first["runs"]["fastpeft"]["losses"]) == 12
    assert first["runs"]["fastpeft"]["perplexity"]["lines.jsonl"] < first["before"]["lines.jsonl"]
    for run in ("fastpeft", "HF peft"):
        assert first["runs"][run]["losses"] == second["runs"][run]["losses"]
    files = [(tmp_path / again / "adapter/adapter_model.safetensors").read_bytes() for again in ("first", "second")]
    assert files[0] == files[1]
    assert demo(*arguments, tmp_path / "third", "--seed", 1)[0] == 0
    assert run_of(tmp_path / "third")["runs"]["fastpeft"]["losses"] != first["runs"]["fastpeft"]["losses"]


def test_without_peft_and_matplotlib_the_rest_runs_and_they_are_named(own, tmp_path, monkeypatch):
    for name in ("peft", "matplotlib", *[name for name in sys.modules if name.startswith("matplotlib.")]):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ("--quick", "--steps", 2, "--model", own / "model", "--data", own / "text.txt", "--out", tmp_path)
    status, printed = demo(*arguments)
    assert status == 0, printed
    assert "peft is not installed" in printed and "pip install matplotlib" in printed
    result = run_of(tmp_path)
    assert list(result["runs"]) == ["fastpeft", "frozen base"] and result["step_ratio"] is None
    assert not (tmp_path / "curves.png").exists()


def test_a_proof_that_fails_is_shown_and_returned(own, tmp_path, monkeypatch):
    monkeypatch.setattr(fastpeft, "load_adapter", lambda model, folder: model)
    arguments = ("--quick", "--steps", 2, "--model", own / "model", "--data", own / "text.txt", "--out", tmp_path)
    status, printed = demo(*arguments)
    assert status == 1
    assert "FAILED  saved, and loaded into a fresh base" in printed
    assert [proof["what"] for proof in run_of(tmp_path)["proofs"] if not proof["ok"]] == [
        "saved, and loaded into a fresh base"
    ]


BAD_DATA = [
    ("missing.txt", None, "there is no such file"),
    ("empty.txt", b"", "there is no text in it"),
    ("blank.txt", b" \n\n", "there is no text in it"),
    ("latin.txt", b"stra\xdfe", "not UTF-8 text"),
    ("short.txt", b"too short", "too little text"),
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ("list.jsonl", b'["text"]', "line 1: a JSON list"),
    ("other.jsonl", b'{"text": "a"}\n{"body": "a"}', "line 2: no \"text\" with a string; the object has 'body'"),
    ("number.jsonl", b'{"text": 7}', 'line 1: no "text" with a string'),
    ("array.json", b'[\n{"text": "a"}\n]', "line 1: not JSON"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_DATA, ids=[case[0] for case in BAD_DATA])
def test_data_that_cannot_be_used(name, content, message, own, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = ["demo", "--model", str(own / "model"), "--data", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastpeft: error: ") and message in error and name in error and error.count("\n") == 1


def test_a_directory_is_no_data(tmp_path, capsys):
    assert cli.main(["demo", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "a directory; give one file" in capsys.readouterr().err


def damage(folder, own, what):
    """A copy of the user's model directory with something wrong."""
    import shutil

    model = shutil.copytree(own / "model", folder / "model")
    if what == "no config":
        (model / "config.json").unlink()
    elif what == "broken config":
        (model / "config.json").write_text("{")
    elif what == "no weights":
        (model / "model.safetensors").unlink()
    elif what == "broken weights":
        (model / "model.safetensors").write_bytes(b"\0" * 64)
    elif what == "no tokenizer":
        for path in model.glob("tokenizer*"):
            path.unlink()
    elif what == "missing weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    elif what == "other tokenizer":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:260].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


BAD_MODELS = [
    ("no config", "no config.json there"),
    ("broken config", "its model cannot be loaded"),
    ("no weights", "its model cannot be loaded"),
    ("broken weights", "its model cannot be loaded"),
    ("no tokenizer", "its tokenizer cannot be loaded"),
    ("missing weights", "the files lack 1 of its weights: model.layers.0.mlp.up_proj.weight"),
    ("other tokenizer", "its model knows 260"),
]


@pytest.mark.parametrize(("what", "message"), BAD_MODELS, ids=[case[0] for case in BAD_MODELS])
def test_a_model_that_cannot_be_used(what, message, own, tmp_path, capsys):
    model = damage(tmp_path, own, what)
    assert cli.main(["demo", "--model", str(model), "--data", str(own / "text.txt"), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastpeft: error: --model {model}: ") and message in error and error.count("\n") == 1


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert "cannot be made a directory" in capsys.readouterr().err


def test_nothing_is_trained_and_held_out_at_once():
    for corpus in (demo_corpus.english(10**9), demo_corpus.python_sources(300_000)):
        assert len(corpus.held_out) > 0.1 * (len(corpus.training) + len(corpus.held_out)) - 1
        trained = " ".join(" ".join(corpus.training).split())
        parts = [" ".join(part.split()) for held in corpus.held_out for part in held.split("\n\n") if len(part) >= 80]
        assert not [part for part in parts if part in trained]
    few = demo_corpus.split("few", ["a\n" * 50, "b\n" * 50])
    assert few.training[0] + few.held_out[0] == "a\n" * 50 + "\n" + "b\n" * 50
    assert len(few.held_out[0]) in range(18, 24) and few.training[0].endswith("\n")
    assert demo_corpus.split("one line", ["x" * 100]).held_out == ["x" * 10]


class Recorder(nn.Module):
    """A model of one weight that notes who is called."""

    def __init__(self, name, calls):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.name, self.calls = name, calls

    def get_input_embeddings(self):
        return self

    def forward(self, input_ids, labels, use_cache):
        self.calls.append((self.name, int(input_ids[0, 0])))
        return SimpleNamespace(loss=self.weight.sum() * 0 + input_ids.float().mean())


def test_runs_take_turns_on_the_same_batches():
    calls = []
    runs = [Run(n, model := Recorder(n, calls), torch.optim.SGD(model.parameters())) for n in "ab"]
    schedule = Schedule(torch.arange(100), torch.arange(6)[:, None] * 10, 2, 1.0, torch.device("cpu"))
    train(runs, schedule, 2, 0, lambda done, note: None)
    assert calls[:2] == [("a", 0), ("b", 0)]  # warming up
    assert calls[2:] == [
        (n, 10 * s) for n, s in [*zip("aabbbbaaaabb", (0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5), strict=True)]
    ]
    assert runs[0].losses == runs[1].losses == [0.5 + 10 * step for step in range(6)]
    assert len(runs[0].block_seconds) == 3


def test_the_ratio_is_that_of_pairs():
    fast, slow = (
        Run(name, None, None, block_seconds=s) for name, s in (("a", [1.0, 10.0, 3.0]), ("b", [2.0, 20.0, 6.0]))
    )
    assert paired_ratio(fast, slow) == (0.5, 0.5, 0.5)
    assert paired_ratio(Run("a", None, None, block_seconds=[3.0]), Run("b", None, None, block_seconds=[4.0]))[0] == 0.75


def test_the_rate_rises_and_falls():
    schedule = Schedule(torch.arange(9), torch.zeros(100, 1), 2, 2.0, torch.device("cpu"))
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.4) and max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_held_out_loss_is_the_mean_over_rows_in_eval_mode():
    model = Recorder("a", [])
    rows = torch.tensor([[1, 1], [2, 2], [9, 9]])
    assert held_out_loss(model, rows, 2) == pytest.approx(4.0)
    assert model.training


class Chain(nn.Module):
    """x·w, relu, times 3, sum: what lives when is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256, 256))

    def forward(self, input_ids, labels, use_cache):
        x = (input_ids * self.weight).relu()
        del input_ids
        return SimpleNamespace(loss=(x * 3.0).sum())


def test_memory_of_a_step_is_that_of_its_live_tensors():
    model, size = Chain(), 256 * 256 * 4
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    memory = step_memory(Run("chain", model, optimizer), torch.ones(256, 256))
    assert memory.resident == pytest.approx(3 * size, abs=64)  # the weight and two moments
    assert memory.saved == pytest.approx(2 * size, abs=64)  # input_ids, relu's result
    # Backward's greatest moment: relu's result, the gradient that came to it, and the one that leaves it.
    assert memory.peak - memory.resident == pytest.approx(3 * size, abs=64)


class Product(nn.Module):
    """The loss is a product with its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, input_ids, labels, use_cache):
        y = input_ids @ self.weight
        return SimpleNamespace(loss=y.float().mean(), dtype=y.dtype)


def test_autocast_sees_every_update_of_the_weights():
    """It keeps what it has cast until its block ends: a block around the whole training would train on old weights."""
    model = Product()
    run = AutocastRun("base", model, torch.optim.SGD(model.parameters(), lr=1.0))
    schedule = Schedule(torch.ones(64), torch.zeros(3, 8, dtype=torch.int64), 8, 1.0, torch.device("cpu"))
    losses = [run.step(schedule, step).item() for step in range(3)]
    assert losses[0] > losses[1] > losses[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(1, 8), None, False).dtype == torch.bfloat16


def test_the_model_fits_the_gpu(monkeypatch):
    arguments = SimpleNamespace(model=None, quick=False, steps=None)
    for gibibytes, expected in ((80, demo_base.ON_GPU), (24, demo_base.ON_SMALL_GPU)):
        memory = SimpleNamespace(total_memory=gibibytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, memory=memory: memory)
        assert demo_command._scale(arguments, torch.device("cuda")) == expected
    assert demo_command._scale(arguments, torch.device("cpu")) == demo_base.ON_CPU


def test_the_floor_uses_the_base_and_leaves_no_gradients(own):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(own / "model")
    ids = torch.arange(16).view(1, -1)
    plain = base(input_ids=ids, labels=ids).loss
    model = fastpeft.patch(base, fastpeft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    floor = FrozenBase("frozen base", model, None)
    assert floor.loss(ids).item() == plain.item() != Run("a", model, None).loss(ids).item()
    schedule = Schedule(torch.arange(20), torch.zeros(1, 1, dtype=torch.int64), 16, 1.0, torch.device("cpu"))
    floor.step(schedule, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
