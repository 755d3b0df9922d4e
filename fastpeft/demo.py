"""`fastpeft demo`: train a small Llama on the English that ships with Python, fine-tune it with LoRA on Python's sources
through `fastpeft.patch` and, where it is installed, the same way through HF peft, and show what that brought and cost.
With --model and --data: your model, your text."""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import fastpeft
from fastpeft import demo_base, demo_corpus, demo_plot, info
from fastpeft.console import Console
from fastpeft.demo_train import (
    FrozenBase,
    Memory,
    Run,
    Schedule,
    held_out_loss,
    paired_ratio,
    step_memory,
    train,
    trainable,
)
from fastpeft.errors import FastpeftError

OURS, PEFT, FLOOR = "fastpeft", "HF peft", "frozen base"
MERGED_BOUND = {torch.float32: 1e-4}  # of the loss; merged half-precision weights are rounded, so more there:
HALF_MERGED_BOUND = 2e-2


def _whole(least: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least {least} is wanted")
        return int(text)

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="your own model and tokenizer, as save_pretrained wrote them"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help='your own text: UTF-8, or JSON Lines with a "text" field'
    )
    parser.add_argument("--steps", type=_whole(1), help="fine-tuning steps (default: what takes about a minute)")
    parser.add_argument("--seed", type=_whole(0), default=0)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: seconds")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is fine-tuned and on what: the last of the texts is trained on, all are scored."""

    base: demo_base.Base
    texts: list[demo_corpus.Tokens]
    scale: demo_base.Scale
    device: torch.device
    seed: int

    def perplexities(self, model: nn.Module) -> dict[str, float]:
        return {text.corpus.name: _perplexity(self.loss(model, text)) for text in self.texts}

    def loss(self, model: nn.Module, text: demo_corpus.Tokens | None = None) -> float:
        rows = (text or self.texts[-1]).rows(self.scale.sequence, self.scale.held_out_rows)
        return held_out_loss(model, rows, self.scale.batch)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def run(arguments: argparse.Namespace) -> int:
    """The whole demo. Returns 0, or 1 if one of its proofs failed."""
    start = time.perf_counter()
    console = Console()
    _make_directory(arguments.out)
    with _quiet_libraries():
        return _run(arguments, console, start)


def _run(arguments, console: Console, start: float) -> int:
    peft = _peft()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else info.cpu_name()
    console.line((f"fastpeft {fastpeft.__version__}", "bold"), f" on {name}, {torch.get_num_threads()} threads")
    subject = _subject(arguments, device, console)
    before = subject.perplexities(subject.base.make())
    runs, same_start = _runs(subject, peft, console)
    text = subject.texts[-1]
    starts = text.starts(subject.scale.steps, subject.scale.batch, subject.scale.sequence, subject.seed + 1)
    schedule = Schedule(text.training, starts, subject.scale.sequence, subject.scale.rate, device)
    with _stage(
        console, f"fine-tuned on {text.corpus.name}: {len(schedule)} steps, run about with {', '.join(list(runs)[1:])}"
    ):
        with console.progress("fine-tuning", len(schedule)) as advance:
            train(list(runs.values()), schedule, subject.scale.block, subject.seed, advance)
    memory = {key: step_memory(one, schedule.batch(0)) for key, one in runs.items()}
    result = _result(subject, before, runs, memory, name, peft)
    model = runs[OURS].model
    del runs
    result["proofs"] = _proofs(subject, model, arguments.out, peft, same_start)
    _show(console, result)
    result["seconds"] = time.perf_counter() - start
    _write(result, arguments.out, console)
    return 0 if all(proof["ok"] for proof in result["proofs"]) else 1


@contextlib.contextmanager
def _quiet_libraries():
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _peft():
    """HF peft, or None where it is not installed."""
    try:
        import peft
    except ImportError:
        return None
    return peft


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastpeftError(f"--out {path}: cannot be made a directory: {error.strerror}") from None


@contextlib.contextmanager
def _stage(console: Console, done: str):
    """Says at the end what was done and how long it took."""
    start = time.perf_counter()
    yield
    console.line(("  done  ", "green"), done, (f"  {time.perf_counter() - start:.1f} s", "dim"))


def _subject(arguments, device: torch.device, console: Console) -> Subject:
    scale = _scale(arguments, device)
    corpora = [] if arguments.model else [demo_corpus.english(scale.characters)]
    own = arguments.data and demo_corpus.from_file(arguments.data)
    corpora.append(own or demo_corpus.python_sources(scale.characters))
    for corpus in corpora:
        facts = corpus.facts()
        of_which = f"{facts['documents']} documents, {facts['documents_held_out']} of them held out"
        console.line(f"  text  {corpus.name}: {facts['characters']:,} characters in {of_which}")
    if arguments.model:
        base, encode, end, longest = demo_base.own_model(arguments.model, device)
        scale = dataclasses.replace(scale, sequence=min(scale.sequence, longest))
        return Subject(
            base,
            [demo_corpus.tokenized(c, encode, end, scale.sequence) for c in corpora],
            scale,
            device,
            arguments.seed,
        )
    tokenizer = demo_corpus.train_tokenizer([d[:20_000] for c in corpora for d in c.training], scale.vocabulary)
    texts = [
        demo_corpus.tokenized(c, lambda docs: [e.ids for e in tokenizer.encode_batch(docs)], 0, scale.sequence)
        for c in corpora
    ]
    label = (
        f"a Llama of {scale.layers} layers of {scale.hidden} on English, {scale.pretraining_steps} steps from random"
    )
    with _stage(console, f"trained {label}"), console.progress("training the base", scale.pretraining_steps) as advance:
        base = demo_base.pretrained_llama(texts[0], scale, device, arguments.seed, advance)
    return Subject(base, texts, scale, device, arguments.seed)
