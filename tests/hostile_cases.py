"""The table of hostile adapters: name -> (method, what is done to a sound one, the error, words of its message).

What is done, and to what, is in `tests.hostile`; what configurations ask for, in `tests.hostile_configs`.
"""

import json
import math
import pickle

import torch

from tests.hostile import (
    CONFIG,
    ENCODER,
    JOURNAL,
    SIDE,
    WEIGHTS,
    Q,
    blob,
    both,
    cut,
    entry,
    folder,
    header,
    journal,
    link,
    options,
    pickled,
    pipe,
    put,
    renamed,
    saved_by_torch,
    side,
    sparse,
    tensor,
    tensors,
    without,
)
from tests.hostile_configs import CONFIGURATIONS, DEEP, Config, File, Target

A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

DISGUISES = {
    "a pickle of protocol 0": (pickled(WEIGHTS, 0), "not a safetensors file"),
    "a pickle of protocol 2": (pickled(WEIGHTS, 2), "a Python pickle"),
    "a pickle of protocol 5": (pickled(WEIGHTS, 5), "a Python pickle"),
    "a zip of torch": (saved_by_torch(WEIGHTS), "a zip archive"),
    "an old file of torch": (saved_by_torch(WEIGHTS, zipped=False), "a Python pickle"),
    "a pickle behind a header": (
        put(WEIGHTS, blob({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, pickle.dumps(print))),
        WEIGHTS,
    ),
    "GGUF": (put(WEIGHTS, b"GGUF\3\0\0\0" + bytes(99)), "not a safetensors file"),
    "NumPy": (put(WEIGHTS, b"\x93NUMPY\1\0v\0" + bytes(99)), "not a safetensors file"),
    "gzip": (put(WEIGHTS, b"\x1f\x8b\x08\x08" + b"\x12" * 99), "not a safetensors file"),
    "a pointer of Git": (put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a page": (put(WEIGHTS, b"<!DOCTYPE html><html></html>"), "not a safetensors file"),
}


def _billions(found):
    found[A].update(shape=[10**9, 10**9])


def _tensors(count, offsets="data_offsets", name="t"):
    entries = (
        f'"{name}{i}":{{"dtype":"F32","shape":[1],"{offsets}":[{4 * i},{4 * i + 4}]}}'.encode() for i in range(count)
    )
    return put(WEIGHTS, blob(b"{" + b",".join(entries) + b"}", bytes(4 * count)))


_BIG = blob({"a": {"dtype": "F32", "shape": [10**8], "data_offsets": [0, 4 * 10**8]}})

WEIGHT_FILES = {
    "weights missing": (without(WEIGHTS), "is missing"),
    "weights only a pickle": (both(without(WEIGHTS), pickled("adapter_model.bin")), "adapter_model.bin", "a pickle"),
    "weights empty": (put(WEIGHTS, b""), "0 bytes"),
    "weights 8 bytes": (put(WEIGHTS, bytes(8)), "8 bytes"),
    "weights cut off in the header": (cut(WEIGHTS, 100), "should have"),
    "weights cut off in the data": (cut(WEIGHTS, -1), "is cut off"),
    "weights with more behind": (lambda d: (d / WEIGHTS).open("ab").write(b"evil"), "4 bytes after its last tensor"),
    "header of 2^63 bytes": (put(WEIGHTS, blob(b"{}", length=2**63)), "9223372036854775808 bytes"),
    "header of 100 MB": (put(WEIGHTS, blob(b'{"' + b"a" * 100_000_000 + b'": 1}')), "the limit is"),
    "header of 24 MB of marks": (put(WEIGHTS, blob(b"{" + b'"a":[],' * 3_400_000 + b'"b":1}')), "the limit is 1000000"),
    "header of 24 MB of spaces": (put(WEIGHTS, blob(b"{" + b" " * 24_000_000 + b"}")), "the limit is 1000000"),
    "header of 1 MB of marks": (put(WEIGHTS, blob(b"{" + b'"a":[],' * 140_000 + b'"b":1}')), "too many values"),
    "header of 1 MB of spaces": (put(WEIGHTS, blob(b"{" + b" " * 999_998 + b"}")), "has no tensors"),
    "header of as many marks as there may be": (
        put(WEIGHTS, blob(b"{" + b",".join(b'"%d":0' % i for i in range(16_666)) + b"}")),
        "more than 2000 tensors",
    ),
    "header of brackets": (put(WEIGHTS, blob(b'{"a":[' + b"[]," * 24_000 + b"0]}")), "is not described by"),
    "header deep": (put(WEIGHTS, blob(b'{"a":' * 16_000 + b"1" + b"}" * 16_000)), "64 levels"),
    "header deeper": (put(WEIGHTS, blob(b'{"a":' * DEEP + b"1" + b"}" * DEEP)), "too many values"),
    "header not UTF-8": (put(WEIGHTS, blob(b'{"\xff": 1}')), "not UTF-8"),
    "header a list": (put(WEIGHTS, blob(b"[1]")), "begins with"),
    "header with a key twice": (put(WEIGHTS, blob(b'{"a": 1, "a": 2}')), "'a' occurs twice"),
    "no tensors": (put(WEIGHTS, blob({"__metadata__": {"format": "pt"}})), "has no tensors"),
    "metadata of numbers": (header(lambda found: found.update(__metadata__={"format": 1})), "text to text"),
    "tensors that overlap": (entry(B, data_offsets=[0, 512]), "overlaps"),
    "tensors with a gap": (header(lambda found: found.pop(B) and None), "gap"),
    "offsets reversed": (entry(A, data_offsets=[512, 0]), "span -512"),
    "offsets negative": (entry(A, data_offsets=[-512, 0]), "data_offsets [-512, 0]"),
    "offsets of 2^64": (entry(A, data_offsets=[0, 2**64]), "data_offsets"),
    "shape of billions": (header(_billions), "needs 4000000000000000000 bytes"),
    "shape that wraps": (entry(A, shape=[2**62, 4]), "needs"),
    "shape of truth": (entry(A, shape=[True, 128]), "has the shape [True, 128]"),
    "dtype unknown": (entry(A, dtype="F31"), "dtype 'F31'"),
    "dtype of integers": (tensor(B, torch.zeros(32, 4, dtype=torch.int64)), "I64"),
    "dtype of truth": (tensor(B, torch.zeros(32, 4, dtype=torch.bool)), "BOOL"),
    "dtype complex": (tensor(B, torch.zeros(32, 4, dtype=torch.complex64)), "C64"),
    "dtype of 8 bits": (tensor(B, torch.zeros(32, 4).to(torch.float8_e4m3fn)), "F8_E4M3"),
    "weights a pipe": (pipe(WEIGHTS), "named pipe"),
    "weights a directory": (folder(WEIGHTS), "a directory"),
    "weights a link out": (link(WEIGHTS, "/etc/passwd"), "outside the adapter's directory"),
    "weights a link up": (link(WEIGHTS, "../../../../../etc/passwd"), "outside the adapter's directory"),
    "weights a link to nothing": (link(WEIGHTS, "nothing"), WEIGHTS),
    "weights /dev/zero": (link(WEIGHTS, "/dev/zero"), "/dev/zero"),
    "weights of a terabyte": (sparse(WEIGHTS, 2**40), "bytes after its last tensor"),
    "a header for a terabyte": (
        both(
            put(WEIGHTS, blob({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})),
            sparse(WEIGHTS, 2**40 + 66),
        ),
        WEIGHTS,
    ),
    "100,000 tensors": (_tensors(100_000), "the limit is 1000000"),
    "50,000 tensors": (_tensors(50_000), "the limit is 1000000"),
    "10,000 tensors": (_tensors(10_000), "more than 2000 tensors, 10000"),
    "2,001 tensors behind escapes": (_tensors(2_001, "data_\\u006fffsets"), "more than 2000 tensors, 2001"),
    "2,000 tensors": (_tensors(2_000), "none of its 2000 tensors fits"),
    "2,000 tensors of long names": (_tensors(2_000, name="x" * 400), "none of its 2000 tensors fits"),
    **{
        f"name {name[:12]!r}": (header(lambda found, name=name: found.update({name: found.pop(B)})), "tensor named")
        for name in ("../../evil", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[31m", "a\u202eb", "x" * 5000, "a..b")
    },
    "name that is empty": (header(lambda found: found.update({"": found.pop(B)})), "tensor named ''"),
}

LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
TENSORS = {
    **{
        f"overwrites {key}": (tensor(key, torch.zeros(shape)), key, "does not declare")
        for key, shape in (
            ("base_model.model.model.embed_tokens.weight", (97, 32)),
            ("base_model.model.lm_head.weight", (97, 32)),
            (f"{Q}.base_layer.weight", (32, 32)),
            (f"{Q}.weight", (32, 32)),
            ("base_model.model.model.norm.weight", (32,)),
            ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", (48, 32)),
            ("model.layers.0.self_attn.q_proj.weight", (32, 32)),
            ("model.embed_tokens.weight", (97, 32)),
            ("lm_head.weight", (97, 32)),
            ("base_model.model.lm_head.modules_to_save.weight", (97, 32)),
            ("base_model.model.lm_head.original_module.weight", (97, 32)),
            ("base_model.model.lm_head.modules_to_save.default.weight", (97, 32)),
            ("base_model.model.model.rotary_emb.inv_freq", (4,)),
            (f"{Q}.base_layer.bias", (32,)),
            ("prompt_embeddings", (4, 32)),
        )
    },
    "a tensor more": (tensor("evil", torch.ones(1)), "evil", "does not declare"),
    "a tensor of a layer that is no target": (
        tensor(LAYER.replace("q_proj", "k_proj") + ".lora_A.weight", torch.ones(4, 32)),
        "k_proj",
        "does not declare",
    ),
    "a tensor of a layer that is not there": (
        tensor(LAYER.replace("layers.1", "layers.7") + ".lora_A.weight", torch.ones(4, 32)),
        "layers.7",
    ),
    "a tensor less": (tensors(lambda found: found.pop(A)), A, "1 of 8"),
    "a layer less": (tensors(lambda found: [found.pop(key) for key in list(found) if "layers.1" in key]), "4 of 8"),
    "another prefix": (renamed("base_model.model.", "foo."), "none of its 8 tensors fits"),
    "the adapter's name inside": (renamed(".weight", ".default.weight"), "none of its 8 tensors fits"),
    "names in capitals": (renamed("lora_A", "LORA_A"), "missing"),
    "A and B exchanged": (
        tensors(lambda found: found.update({A: found[B].clone(), B: found[A].clone()})),
        "(32, 4)",
        "(4, 32)",
    ),
    "a tensor of one dimension": (tensors(lambda found: found.update({A: found[A].flatten()})), "(128,)"),
    "a tensor of three": (tensors(lambda found: found.update({A: found[A][None]})), "(1, 4, 32)"),
    "a tensor without values": (tensor(B, torch.zeros(0, 4)), "holds no values"),
    "a tensor of no dimension": (tensor(B, torch.tensor(1.0)), "()"),
    **{
        f"{value} in {dtype}": (tensor(B, torch.full((32, 4), value, dtype=dtype)), "128 values", "NaN or infinite")
        for value in (math.nan, math.inf, -math.inf)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "one NaN": (tensors(lambda found: found[B].view(-1)[-1:].fill_(math.nan)), "1 of the 128 values"),
    "beyond float32": (tensor(B, torch.full((32, 4), 1e300, dtype=torch.double)), "1e+300", "float32"),
}


def _without_side_s_leave(edit):
    """The network edited, while the side file says what it was."""

    def change(directory):
        kept = (directory / SIDE).read_bytes()
        tensors(edit, ENCODER)(directory)
        (directory / SIDE).write_bytes(kept)

    return change


SIDES = {
    "side file not JSON": ("lora", put(SIDE, b"{"), File, SIDE, "not valid JSON"),
    "side file a list": ("lora", put(SIDE, b"[]"), File, "must be a JSON object"),
    "side file deep": ("lora", put(SIDE, b'{"a":' * 40_000 + b"1" + b"}" * 40_000), File, "64 levels"),
    "side file without a digest": ("lora", put(SIDE, b'{"format": 1}'), File, "weights_sha256"),
    "side file a pipe": ("lora", pipe(SIDE), File, "named pipe"),
    "side file a link out": ("lora", link(SIDE, "/etc/passwd"), File, "outside the adapter's directory"),
    "side file hf_quirks": ("lora", side(hf_quirks="yes"), File, "hf_quirks='yes'"),
    "side file NaN": ("lora", side(format=math.nan), File, "NaN"),
    "options a list": ("prefix", side(options=["evil"]), Config, "options"),
    "options text": ("prefix", side(options="evil"), Config, "options"),
    "options that set r": ("lora", options(r=8), Config, "r=8", "no such option"),
    "options that set the method": ("prefix", options(peft_type="LORA"), Config, "no such option"),
    "options unknown": ("prefix", options(evil=1), Config, "evil=1"),
    "options of the wrong type": ("prefix", options(prefix_window=["pin"]), Config, "prefix_window"),
    "options unknown beside 400 MB of another model": (
        "lora",
        both(put(WEIGHTS, _BIG), sparse(WEIGHTS, len(_BIG) + 4 * 10**8), options(evil=1)),
        Config,
        "evil=1",
    ),
    "options for an encoder that is not there": ("prefix", options(encoder_prefix=True), (Config, Target), ""),
    "network missing": ("p-tuning", without(ENCODER), File, ENCODER, "is missing"),
    "network another": ("p-tuning", _without_side_s_leave(lambda found: found.popitem()), File, "is not the one"),
    "network cut off": ("p-tuning", cut(ENCODER, -4), File, "is cut off"),
    "network a pickle": ("p-tuning", pickled(ENCODER), File, "a Python pickle"),
    "network a pipe": ("p-tuning", pipe(ENCODER), File, "named pipe"),
    "network a link out": ("p-tuning", link(ENCODER, "/etc/passwd"), File, "outside the adapter's directory"),
    "network whose digest is a list": ("p-tuning", side(encoder_sha256=["evil"]), File, ENCODER),
    "network of a method without": ("prompt", side(encoder_sha256="0" * 64), File, ENCODER),
}

_NAME = ".fastpeft-tmp-1-0123456789abcdef"
_ENTRY = {"final": CONFIG, "temporary": _NAME, "sha256": "0" * 64, "size": 2, "previous": None}


def _journal(**values):
    return put(JOURNAL, json.dumps({"schema": 1, "files": [{**_ENTRY, **values}]}).encode())


JOURNALS = {
    "journal not JSON": (put(JOURNAL, b"evil"), JOURNAL, "not valid JSON"),
    "journal of tomorrow": (put(JOURNAL, b'{"schema": 99}'), "schema 99"),
    "journal long": (put(JOURNAL, b'{"schema": 1, "files": [' + b" " * 20_000 + b"]}"), "longer than"),
    "journal deep": (put(JOURNAL, b"[" * 9000), "64 levels"),
    "journal for a file outside": (_journal(final="../../evil"), "no journal"),
    "journal for /etc/passwd": (_journal(final="/etc/passwd"), "no journal"),
    "journal from a file outside": (_journal(temporary="../../etc/passwd"), "no journal"),
    "journal from below": (_journal(temporary=f"{_NAME}/../../../etc/passwd"), "no journal"),
    "journal with a number": (_journal(size=True), "no journal"),
    "journal a pipe": (pipe(JOURNAL), "named pipe"),
    "journal a link out": (link(JOURNAL, "/etc/passwd"), "outside the adapter's directory"),
    "journal that brings NaN": (journal([CONFIG, b'{"peft_type": "LORA", "r": NaN}']), "NaN"),
    "journal that brings a pickle": (journal([WEIGHTS, pickle.dumps([1.0] * 99, 4)]), "a Python pickle"),
    "journal half of which is lost": (
        lambda d: (
            journal([WEIGHTS, b"new"], [CONFIG, b"{}"])(d),
            (d / f".fastpeft-tmp-1-{1:016x}").unlink(),
            (d / f".fastpeft-tmp-1-{0:016x}").rename(d / WEIGHTS),
        ),
        "cannot be finished",
    ),
}


def _of_lora(table, error=File):
    return {name: ("lora", damage, error, *words) for name, (damage, *words) in table.items()}


CASES = {
    **CONFIGURATIONS,
    **_of_lora({f"weights {name}": case for name, case in DISGUISES.items()}),
    **_of_lora(WEIGHT_FILES),
    **_of_lora(TENSORS),
    **SIDES,
    **_of_lora(JOURNALS),
}

# What may lie beside an adapter for its tokenizer, which AutoPeftModel asks how many tokens there are.
_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast"}


def _tokenizer(config, tokens=b"{}"):
    config = config if isinstance(config, bytes) else json.dumps(config).encode()
    return both(put("tokenizer_config.json", config), put("tokenizer.json", tokens))


TOKENIZERS = {
    "not JSON": _tokenizer(b"{"),
    "a list": _tokenizer(b"[]"),
    "a number": _tokenizer(b"7"),
    "deep": _tokenizer(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "not UTF-8": _tokenizer(b'{"a": "\xff"}'),
    "of no class": _tokenizer({"tokenizer_class": "Evil"}),
    "a class of a list": _tokenizer({"tokenizer_class": ["Evil"]}),
    "code of its own": both(
        _tokenizer({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}),
        lambda d: (d / "tokenization_evil.py").write_text(f"import os\nos.mkdir({str(d / 'owned')!r})\n"),
    ),
    "tokens that are none": _tokenizer(_TOKENIZER),
    "tokens that are deep": _tokenizer(_TOKENIZER, b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "tokens a pickle": _tokenizer(_TOKENIZER, pickle.dumps([1.0] * 99, 4)),
}
