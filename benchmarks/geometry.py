"""The models that benches take their sizes from, by name, and what an op's shape may be on the command line."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A model's sizes. `linears`: the kinds of its linear layers, (inputs, outputs) of each, the heaviest use first.

    heads of `depth` numbers read `kv_heads` keys and values; batch and seq are those of a training step on a GPU.
    `config` and `arguments`: transformers' configuration class and what makes the model of it. Dropout of the base is
    off: what is timed is what was checked.
    """

    linears: Mapping[str, tuple[int, int]]
    heads: int
    kv_heads: int
    depth: int
    batch: int
    seq: int
    config: str
    arguments: Mapping[str, object]
    causal: bool = True
    alibi: bool = False
    task: str = "CAUSAL_LM"

    @property
    def hidden(self) -> int:
        return next(iter(self.linears.values()))[0]

    @property
    def vocabulary(self) -> int:
        return self.arguments["vocab_size"]


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int,
    batch: int, seq: int, depth: int | None = None, config: str = "LlamaConfig", **others,
) -> Geometry:  # fmt: skip
    depth = depth or hidden // heads
    linears = {
        "q/o": (hidden, heads * depth),
        "gate/up": (hidden, mlp),
        "k/v": (hidden, kv_heads * depth),
        "down": (mlp, hidden),
    }
    arguments = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=depth,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return Geometry(linears, heads, kv_heads, depth, batch, seq, config, arguments | others)


def _bloom(hidden: int, layers: int, heads: int, vocabulary: int, batch: int, seq: int) -> Geometry:
    linears = {
        "qkv": (hidden, 3 * hidden),
        "up": (hidden, 4 * hidden),
        "down": (4 * hidden, hidden),
        "dense": (hidden, hidden),
    }
    arguments = dict(hidden_size=hidden, n_layer=layers, n_head=heads, vocab_size=vocabulary, use_cache=False)
    return Geometry(linears, heads, heads, hidden // heads, batch, seq, "BloomConfig", arguments, alibi=True)


def _bert(hidden: int, layers: int, heads: int, mlp: int, vocabulary: int, batch: int, seq: int) -> Geometry:
    linears = {"q/k/v/o": (hidden, hidden), "up": (hidden, mlp), "down": (mlp, hidden)}
    arguments = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    found = (linears, heads, heads, hidden // heads, batch, seq, "BertConfig", arguments)
    return Geometry(*found, causal=False, task="SEQ_CLS")


GEOMETRIES = {
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, 128256, batch=4, seq=2048),
    "llama3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, batch=4, seq=2048, tie_word_embeddings=True),
    "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, batch=4, seq=2048, depth=128, config="Qwen3Config"),
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32768, batch=4, seq=2048, config="MistralConfig", sliding_window=None),
    "llama2-7b": _llama(4096, 32, 32, 32, 11008, 32000, batch=4, seq=2048),
    "bloom-560m": _bloom(1024, 24, 16, 250880, batch=8, seq=64),
    "bert-base": _bert(768, 12, 12, 3072, 30522, batch=32, seq=512),
    # For a CPU: sizes that its caches do not hide, and the least that has everything.
    "small": _llama(256, 4, 8, 2, 704, 1024, batch=2, seq=512),
    "tiny": _llama(64, 2, 4, 2, 96, 61, batch=2, seq=32),
}


GRID = "lorafusion-grid"  # no model: square linear layers, see bench_lora_linear


def shape_of(text: str) -> str | tuple[int, ...]:
    """A geometry's name, the grid's, or the numbers N,N,... of an op's shape. Raises ArgumentTypeError."""
    if text in GEOMETRIES or text == GRID:
        return text
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        known = ", ".join([*GEOMETRIES, GRID])
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {known} nor sizes as N,N,...")
    numbers = tuple(map(int, parts))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be at least 1")
    return numbers
