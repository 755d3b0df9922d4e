"""The demo's texts: the English and the Python that every CPython brings along, or the user's own file.

A text is a list of documents; every tenth is held out. Which documents there are depends on the Python, so a run
records their number, length and hash.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastpeft.errors import FastpeftError

MOST_CHARACTERS = 4_000_000  # of the user's file: about a million tokens, more than the demo's steps look at
LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
END = "<|end|>"

# Tests and vendored copies are no typical source; the tables of encodings are no prose; pydoc_data is the English text.
NOT_SOURCES = {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "site-packages", "dist-packages"}
NOT_SOURCES |= {"pydoc_data", "__pycache__"}

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out."""

    name: str
    training: list[str]
    held_out: list[str]

    def facts(self) -> dict:
        """Counts, and a hash of all documents in their order."""
        documents = [*self.training, *self.held_out]
        digest = hashlib.sha256("\0".join(documents).encode("utf-8", "surrogatepass"))
        return {
            "documents": len(documents),
            "documents_held_out": len(self.held_out),
            "characters": sum(map(len, documents)),
            "sha256": digest.hexdigest(),
        }


def split(name: str, documents: list[str]) -> Corpus:
    """Hold out every tenth document, or of fewer than ten the last tenth of the characters, cut at a line's end.

    A paragraph that is held out is left out of the rest: Python's longer topics repeat shorter ones, sources a licence.
    """
    if len(documents) >= 10:
        held_out = documents[::10]
        known = {_words(part) for document in held_out for part in document.split("\n\n") if len(part) >= 80}
        rest = [document.split("\n\n") for i, document in enumerate(documents) if i % 10]
        training = ["\n\n".join(part for part in parts if _words(part) not in known) for parts in rest]
        return Corpus(name, [document for document in training if document.strip()], held_out)
    text = "\n".join(documents)
    cut = text.rfind("\n", 0, len(text) * 9 // 10 + 1)
    cut = cut + 1 if cut > len(text) // 2 else len(text) * 9 // 10
    return Corpus(name, [text[:cut]], [text[cut:]])


def _words(paragraph: str) -> str:
    """What remains the same when a paragraph is indented or wrapped otherwise."""
    return " ".join(paragraph.split())


def english(characters: int) -> Corpus:
    """The topics of Python's `help()`, up to about so many characters."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FastpeftError("demo: this Python lacks pydoc_data, the demo's English text; give --data FILE") from None
    return split("English", _up_to(characters, (topics[name] for name in sorted(topics))))


def python_sources(characters: int) -> Corpus:
    """The standard library's sources in an order given by the hash of their paths, up to about so many characters."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = [name for name in files if not NOT_SOURCES.intersection(name.split("/"))]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    documents = _up_to(characters, (files[name].read_text("utf-8", errors="replace") for name in names))
    if len(documents) < 10:
        raise FastpeftError(f"demo: {root} holds {len(documents)} Python sources, too few for a demo; give --data FILE")
    return split("Python", documents)


def _up_to(characters: int, documents) -> list[str]:
    taken, total = [], 0
    for document in documents:
        taken.append(document)
        total += len(document)
        if total >= characters:
            break
    return taken


def from_file(path: Path) -> Corpus:
    """Plain UTF-8 text, or JSON Lines (.jsonl, .ndjson, .json) of objects with a "text"; the first MOST_CHARACTERS.

    Raises FastpeftError if it cannot be read, or holds no text.
    """
    if not path.exists():
        raise FastpeftError(f"--data {path}: there is no such file; give one of text or JSON Lines")
    if path.is_dir():
        raise FastpeftError(f"--data {path}: a directory; give one file of text or JSON Lines")
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = path.suffix.lower() in LINES_SUFFIXES
            documents = _json_lines(path, stream) if lines else [stream.read(MOST_CHARACTERS)]
    except UnicodeDecodeError as error:
        raise FastpeftError(
            f"--data {path}: not UTF-8 text (byte {error.object[error.start]:#04x}: {error.reason}); UTF-8 is needed"
        ) from None
    except OSError as error:
        raise FastpeftError(f"--data {path}: cannot be read: {error.strerror}") from None
    if not any(document.strip() for document in documents):
        raise FastpeftError(f"--data {path}: there is no text in it; give a file with some")
    return split(path.name, documents)


def _json_lines(path: Path, stream) -> list[str]:
    documents, total = [], 0
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FastpeftError(
                f"--data {path}, line {number}: not JSON ({error}); one object a line is wanted"
            ) from None
        if not isinstance(record, dict):
            raise FastpeftError(
                f'--data {path}, line {number}: a JSON {type(record).__name__}; an object with a "text" is wanted'
            )
        if not isinstance(record.get("text"), str):
            held = ", ".join(map(repr, record)) or "nothing"
            raise FastpeftError(f'--data {path}, line {number}: no "text" with a string; the object has {held}')
        documents.append(record["text"])
        total += len(record["text"])
        if total >= MOST_CHARACTERS:
            break
    return documents


def train_tokenizer(documents: Sequence[str], vocabulary: int):
    """A byte-level BPE tokenizer (`tokenizers.Tokenizer`) whose token 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """A corpus in tokens: two 1-D int64 tensors."""

    corpus: Corpus
    training: torch.Tensor
    held_out: torch.Tensor

    def facts(self) -> dict:
        return self.corpus.facts() | {"tokens": len(self.training), "tokens_held_out": len(self.held_out)}

    def rows(self, sequence: int, most: int) -> torch.Tensor:
        """[at most `most`, sequence] held-out tokens from the beginning on; one shorter row where there are fewer."""
        whole = len(self.held_out) // sequence
        if not whole:
            return self.held_out[None]
        return self.held_out[: whole * sequence].view(-1, sequence)[:most]

    def starts(self, steps: int, batch: int, sequence: int, seed: int) -> torch.Tensor:
        """[steps, batch] where the rows of each step's batch begin in the training tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.training) - sequence + 1, (steps, batch), generator=generator)


def tokenized(corpus: Corpus, encode: Encode, end: int | None, sequence: int) -> Tokens:
    """Every document followed by the token `end`. Raises FastpeftError where there is too little to train on."""
    suffix = [] if end is None else [end]

    def flat(documents):
        return torch.tensor([i for ids in encode(documents) for i in (*ids, *suffix)], dtype=torch.int64)

    tokens = Tokens(corpus, flat(corpus.training), flat(corpus.held_out))
    least = max(8, sequence // 8)
    if len(tokens.training) < sequence or len(tokens.held_out) < least:
        raise FastpeftError(
            f"{corpus.name}: too little text, {len(tokens.training)} tokens to train on and {len(tokens.held_out)} "
            f"held out; at least {sequence} and {least} are needed"
        )
    return tokens
