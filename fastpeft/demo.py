"""`fastpeft demo`: train a small Llama on the English that ships with Python, fine-tune it with LoRA on Python's
sources through `fastpeft.patch` and, where it is installed, the same way through HF peft, and show what that brought
and cost. With --model and --data: your model, your text."""

import argparse
import contextlib
import dataclasses
import io
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fastpeft
from fastpeft import demo_base, demo_corpus, demo_report, info
from fastpeft.console import Console
from fastpeft.demo_report import FLOOR, OURS, PEFT, Proof
from fastpeft.demo_train import FrozenBase, Run, Schedule, held_out_loss, step_memory, train, trainable
from fastpeft.errors import FastpeftError
from fastpeft.local_model import quiet_transformers

# Of the held-out loss, between forms that round differently; weights merged in half precision are themselves rounded.
SINGLE_BOUND, HALF_BOUND = 1e-4, 2e-2


def _whole(least: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least {least} is wanted")
        return int(text)

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    own_model = "your own causal model with its tokenizer, as save_pretrained wrote them; it is not changed"
    own_data = 'your own text: UTF-8, or JSON Lines (.jsonl) with a "text" in each object'
    scales = (demo_base.ON_CPU.steps, demo_base.ON_GPU.steps, demo_base.OWN_MODEL_STEPS)
    steps = "fine-tuning steps; default {}, on a GPU {}, with --model {}".format(*scales)
    parser.add_argument("--model", type=Path, metavar="DIR", help=own_model)
    parser.add_argument("--data", type=Path, metavar="FILE", help=own_data)
    parser.add_argument("--steps", type=_whole(1), metavar="N", help=steps)
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="default 0")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: a few seconds")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default demo-output")


class Subject(NamedTuple):
    """What is fine-tuned, and on what: the last of the texts is trained on, all are scored."""

    base: demo_base.Base
    texts: list[demo_corpus.Tokens]
    scale: demo_base.Scale
    device: torch.device
    seed: int

    def loss(self, model: nn.Module, text: demo_corpus.Tokens | None = None) -> float:
        """The held-out loss of one text, by default the last."""
        rows = (text or self.texts[-1]).rows(self.scale.sequence, self.scale.held_out_rows)
        return held_out_loss(model, rows, self.scale.batch)

    def losses(self, model: nn.Module) -> dict[str, float]:
        return {text.corpus.name: self.loss(model, text) for text in self.texts}

    def schedule(self) -> Schedule:
        """The batches of the fine-tuning."""
        text, scale = self.texts[-1], self.scale
        starts = text.starts(scale.steps, scale.batch, scale.sequence, self.seed + 1)
        return Schedule(text.training, starts, scale.sequence, scale.rate, self.device)


def run(arguments: argparse.Namespace) -> int:
    """The whole demo. Returns 0, or 1 if one of its proofs failed; raises FastpeftError for what cannot be used."""
    start = time.perf_counter()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastpeftError(f"--out {arguments.out}: cannot be made a directory: {error.strerror}") from None
    console, peft = Console(), _peft()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else info.cpu_name()
    with quiet_transformers(), _threads(1 if device.type == "cpu" and not arguments.model else None) as threads:
        console.line((f"fastpeft {fastpeft.__version__}", "bold"), f" on {name}, {threads} thread{'s' * (threads > 1)}")
        subject = _subject(arguments, device, console)
        before = subject.losses(subject.base.make())
        runs, same_start = _adapted(subject, peft, console)
        schedule = subject.schedule()
        beside = f" and, in turns, through HF peft {peft.__version__}" if peft else ""
        with (
            _stage(console, f"fine-tuned on {subject.texts[-1].corpus.name}, {len(schedule)} steps{beside}"),
            console.progress("fine-tuning", len(schedule)) as advance,
        ):
            train(runs, schedule, subject.scale.block, subject.seed, advance)
        after = {one.name: subject.losses(one.model) for one in runs if one.optimizer}
        memory = {one.name: step_memory(one, schedule.batch(0)) for one in runs if one.optimizer}
        result = demo_report.result_of(subject, before, after, runs, memory) | {"device": name}
        proofs = _proofs(subject, runs[0].model, before, arguments.out / "adapter", peft)
    if same_start is not None:
        proofs.insert(0, Proof("HF peft starts from the same adapters", same_start, "bit for bit, under one seed"))
    result |= {"proofs": [proof._asdict() for proof in proofs], "seconds": time.perf_counter() - start}
    demo_report.show(console, result, peft)
    demo_report.write(console, result, arguments.out)
    return 0 if all(proof.ok for proof in proofs) else 1


@contextlib.contextmanager
def _threads(count: int | None):
    """torch's threads, which are left alone if None. The small model gets one: on two cores a second one made a step
    30 % faster while nothing else ran, and three times slower while something did."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def _peft():
    """HF peft, or None where it is not installed."""
    try:
        import peft
    except ImportError:
        return None
    return peft


@contextlib.contextmanager
def _stage(console: Console, done: str):
    """Says at the end what was done and how long it took."""
    start = time.perf_counter()
    yield
    console.line(("  done  ", "green"), done, (f"  {time.perf_counter() - start:.1f} s", "dim"))


def _scale(arguments: argparse.Namespace, device: torch.device) -> demo_base.Scale:
    scale = demo_base.ON_CPU
    if device.type == "cuda":
        large = torch.cuda.get_device_properties(device).total_memory > demo_base.LARGE_GPU_BYTES
        scale = demo_base.ON_GPU if large else demo_base.ON_SMALL_GPU
    if arguments.model:
        scale = dataclasses.replace(scale, rate=demo_base.OWN_MODEL_RATE, steps=demo_base.OWN_MODEL_STEPS)
    if arguments.quick:
        quick = demo_base.QUICK
        scale = quick if not arguments.model else dataclasses.replace(scale, sequence=quick.sequence, steps=quick.steps)
    return dataclasses.replace(scale, steps=arguments.steps or scale.steps)


def _subject(arguments: argparse.Namespace, device: torch.device, console: Console) -> Subject:
    scale = _scale(arguments, device)
    corpora = [] if arguments.model else [demo_corpus.english(scale.characters)]
    own = demo_corpus.from_file(arguments.data) if arguments.data else None
    corpora.append(own or demo_corpus.python_sources(scale.characters))
    for corpus in corpora:
        facts = corpus.facts()
        parts = f"{facts['documents']} documents, {facts['documents_held_out']} of them held out"
        console.line(("  text  ", "green"), f"{corpus.name}: {facts['characters']:,} characters in {parts}")
    if arguments.model:
        base, encode, end, longest = demo_base.own_model(arguments.model, device)
        scale = dataclasses.replace(scale, sequence=min(scale.sequence, longest))
        texts = [demo_corpus.tokenized(corpus, encode, end, scale.sequence) for corpus in corpora]
        return Subject(base, texts, scale, device, arguments.seed)
    tokenizer = demo_corpus.train_tokenizer([text[:20_000] for c in corpora for text in c.training], scale.vocabulary)

    def encode(documents) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(documents)]

    texts = [demo_corpus.tokenized(corpus, encode, 0, scale.sequence) for corpus in corpora]
    llama = f"a Llama, {scale.layers} layers of {scale.hidden}, with a tokenizer of {scale.vocabulary:,}"
    with (
        _stage(console, f"brought up {llama} on {corpora[0].name}, {scale.pretraining_steps} steps"),
        console.progress("the base model", scale.pretraining_steps) as advance,
    ):
        base = demo_base.pretrained_llama(texts[0], scale, device, arguments.seed, advance)
    return Subject(base, texts, scale, device, arguments.seed)


def _adapted(subject: Subject, peft, console: Console) -> tuple[list[Run], bool | None]:
    """The runs, ours first, and whether HF peft's adapters are ours, bit for bit (None without HF peft)."""
    rank = subject.scale.rank
    settings = {
        "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05, "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    torch.manual_seed(subject.seed)
    model = fastpeft.patch(subject.base.make(), fastpeft.LoraConfig(**settings))
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    console.line(("  call  ", "green"), (f"fastpeft.patch(model, fastpeft.LoraConfig({options}))", "bold"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fastpeft.print_trainable_parameters(model)
    for line in (printed.getvalue() + str(fastpeft.report(model))).splitlines():
        console.line(f"        {line}")
    runs = [Run(OURS, model, torch.optim.AdamW(trainable(model)))]
    same = None
    if peft:
        torch.manual_seed(subject.seed)
        other = peft.get_peft_model(subject.base.make(), peft.LoraConfig(**settings))
        ours, theirs = fastpeft.adapter_state_dict(model), peft.get_peft_model_state_dict(other)
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        runs.append(Run(PEFT, other, torch.optim.AdamW(trainable(other))))
    return [*runs, FrozenBase(FLOOR, model, None)], same


def _proofs(subject: Subject, model: nn.Module, before: dict[str, float], folder: Path, peft) -> list[Proof]:
    """Save, reload, switch off, merge and take out the trained adapter, each time asking the held-out loss."""
    loss = subject.loss(model)
    bound = SINGLE_BOUND if next(model.parameters()).dtype == torch.float32 else HALF_BOUND

    def identical(what: str, now: float, then: float = loss) -> Proof:
        detail = f"held-out loss {now:.6f}, identical" if now == then else f"held-out loss {now!r}, not {then!r}"
        return Proof(what, now == then, detail)

    def close(what: str, now: float) -> Proof:
        difference = abs(now - loss)
        return Proof(what, difference <= bound, f"held-out loss within {difference:.1e}, bound {bound:.0e}")

    fastpeft.save_adapter(model, folder)
    reloaded = fastpeft.load_adapter(subject.base.make(), folder)
    proofs = [identical("saved, and loaded into a fresh base", subject.loss(reloaded))]
    del reloaded
    if peft:
        loaded = peft.PeftModel.from_pretrained(subject.base.make(), folder)
        proofs.append(close("the same files, loaded by HF peft", subject.loss(loaded)))
        del loaded
    with fastpeft.disable_adapter(model):
        proofs.append(identical("switched off: the base again", subject.loss(model), list(before.values())[-1]))
    fastpeft.merge(model)
    proofs.append(close("merged into the weights", subject.loss(model)))
    weights = fastpeft.unpatch(model).state_dict()
    base = subject.base.make().state_dict()
    same = weights.keys() == base.keys() and all(torch.equal(weights[key], base[key]) for key in base)
    proofs.append(Proof("taken out by unpatch", same, "every weight of the base as before, bit for bit"))
    return proofs
