"""The first half of the table of hostile adapters, `tests.hostile_cases`: what their configurations ask for."""

import json
import math
import time

import regex

from fastpeft import patterns
from tests.counting import how_many
from tests.hostile import (
    CONFIG,
    SIDE,
    SOUND,
    both,
    config,
    cut,
    folder,
    link,
    pickled,
    pipe,
    plug,
    put,
    raw_config,
    without,
)

File, Config, Target, Patch = "AdapterFileError", "ConfigError", "TargetError", "PatchError"
DEEP = 100_000

CONFIG_FILES = {
    "config missing": ("lora", without(CONFIG), File, CONFIG, "is missing"),
    "config empty": ("lora", put(CONFIG, b""), File, "not valid JSON"),
    "config cut off": ("lora", cut(CONFIG, 40), File, "not valid JSON"),
    "config not UTF-8": ("lora", raw_config(b'"revision": "\xff\xfe"'), File, "not UTF-8"),
    "config in UTF-16": ("lora", put(CONFIG, json.dumps(SOUND["lora"]).encode("utf-16")), File, "not UTF-8"),
    "config with a BOM": ("lora", put(CONFIG, b"\xef\xbb\xbf" + json.dumps(SOUND["lora"]).encode()), File, "BOM"),
    "config a list": ("lora", put(CONFIG, json.dumps([SOUND["lora"]]).encode()), File, "must be a JSON object"),
    "config a number": ("lora", put(CONFIG, b"8"), File, "must be a JSON object"),
    "config twice": ("lora", put(CONFIG, 2 * json.dumps(SOUND["lora"]).encode()), File, "Extra data"),
    "config a comment": ("lora", raw_config(b"// r\n"), File, "not valid JSON"),
    "config a pickle": ("lora", pickled(CONFIG, 4), File, "not UTF-8"),
    "config NUL": ("lora", put(CONFIG, bytes(4096)), File, "not valid JSON"),
    "config deep lists": ("lora", raw_config(b'"x": ' + b"[" * DEEP + b"]" * DEEP), File, "64 levels"),
    "config deep objects": ("lora", raw_config(b'"x": ' + b'{"a":' * 40_000 + b"1" + b"}" * 40_000), File, "64 levels"),
    "config duplicate r": ("lora", raw_config(b'"r": 4'), File, "'r' occurs twice"),
    "config duplicate inside": (
        "lora",
        raw_config(b'"auto_mapping": {"parent_library": "a", "parent_library": "b"}'),
        File,
        "occurs twice",
    ),
    "config longer than a megabyte": ("lora", config(revision="x" * 1_000_001), File, "longer than 1000000"),
    "config of 400,000 values": ("lora", config(layers_to_transform=[0] * 300_000), File, "too many values"),
    "config NaN": ("lora", config(lora_alpha=math.nan), File, "NaN"),
    "config Infinity": ("lora", config(lora_alpha=math.inf), File, "Infinity"),
    "config 1e999": ("lora", both(without(SIDE), raw_config(b'"x": 1e999')), File, "1e999"),
    "config a number of 500,000 digits": ("lora", raw_config(b'"x": ' + b"9" * 500_000), File, "too large"),
    "config a lone surrogate": ("lora", raw_config(b'"x": "\\ud800"'), File, "surrogate"),
    "config a pipe": ("lora", pipe(CONFIG), File, "named pipe"),
    "config a socket": ("lora", plug(CONFIG), File, "a socket"),
    "config a directory": ("lora", folder(CONFIG), File, "a directory"),
    "config a link out": ("lora", link(CONFIG, "/etc/passwd"), File, "is a link to /etc/passwd"),
    "config a link to itself": ("lora", link(CONFIG, CONFIG), File, CONFIG),
    "config /dev/zero": ("lora", link(CONFIG, "/dev/zero"), File, "/dev/zero"),
}

METHODS = {
    "no method": ("lora", config(peft_type=None), File, "peft_type is None"),
    "method unknown": ("lora", config(peft_type="EVIL"), Config, "'EVIL'", "LORA"),
    "method a list": ("lora", config(peft_type=["LORA"]), File, "peft_type is ['LORA']"),
    "method a path": ("lora", config(peft_type="../../evil"), Config, "'../../evil'"),
    "method of other files": ("lora", config(peft_type="P_TUNING"), Config, "PromptEncoderConfig"),
    "AdaLoRA of LoRA's files": (
        "lora",
        config(peft_type="ADALORA", total_step=9, init_r=4),
        File,
        "none of its 8 tensors fits",
    ),
    "LoRA of prefix tuning's files": (
        "prefix",
        lambda directory: (
            put(CONFIG, json.dumps(SOUND["lora"]).encode())(directory),
            (directory / SIDE).unlink(missing_ok=True),
        ),
        File,
        "none of its 1 tensors fits",
    ),
    "task unknown": ("lora", config(task_type="EVIL"), Config, "task_type='EVIL'"),
    "task a list": ("lora", config(task_type=["CAUSAL_LM"]), Config, "task_type="),
    "field of tomorrow": ("lora", config(payload="import os"), Config, "payload='import os'"),
    "field with a message for the terminal": ("lora", config(**{"\x1b[2Jevil\n": 1}), Config, "evil"),
    "field of 900,000 characters": ("lora", config(**{"x" * 900_000: 1}), Config, "no such field"),
    "task with a message for the terminal": ("lora", config(task_type="\x1b[2J"), Config, "task_type="),
    "custom modules": ("lora", config(_custom_modules={"a": "b"}), Config, "_custom_modules"),
    "auto_mapping a list": ("lora", config(auto_mapping=["evil"]), Config, "auto_mapping=['evil']"),
    "megatron": ("lora", config(megatron_config={"a": 1}, megatron_core="evil.core"), Config, "megatron_config"),
    "megatron core to import": ("lora", config(megatron_core="evil.core"), Config, "megatron_core='evil.core'"),
    "layers replicated a billion times": ("lora", config(layer_replication=[[0, 10**9]]), Config, "layer_replication"),
    "target parameters": ("lora", config(target_parameters=["q_proj.weight"]), Target, "target_parameters"),
    "target parameters that are not there": ("lora", config(target_parameters=["k_proj.weight"]), File, "are missing"),
    "target parameters a string": ("lora", config(target_parameters="k_proj.weight"), Config, "target_parameters="),
    "trainable tokens": ("lora", config(trainable_token_indices=[0, 1]), Config, "trainable_token_indices"),
    "runtime": ("lora", config(runtime_config={"ephemeral_gpu_offload": True}), Config, "runtime_config"),
    "loftq": ("lora", config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), Config, "loftq"),
    "corda": ("lora", config(init_lora_weights="corda"), Config, "init_lora_weights='corda'"),
    "init a path": ("lora", config(init_lora_weights="/etc/passwd"), Config, "init_lora_weights"),
    "use_dora without magnitudes": ("lora", config(use_dora=True), File, "lora_magnitude_vector", "missing"),
    "bias all without biases": ("lora", config(bias="evil"), Config, "bias='evil'"),
}

AMOUNTS = {
    **{
        f"r = {value!r}": ("lora", config(r=value), Config, f"r={value!r}")
        for value in (0, -1, "4", 4.0, 10**9, 2**28, True, None, [4], 10**19)
    },
    "r of another": ("lora", config(r=8), File, "(8, 32)", "is r what"),
    "rank pattern of a billion": ("lora", config(rank_pattern={"q_proj": 10**9}), Config, "1000000000"),
    "rank pattern of another": ("lora", config(rank_pattern={"q_proj": 16}), File, "(16, 32)"),
    "rank pattern text": ("lora", config(rank_pattern={"q_proj": "4"}), Config, "rank_pattern['q_proj']='4'"),
    "rank pattern a list": ("lora", config(rank_pattern=["q_proj"]), Config, "rank_pattern=['q_proj']"),
    "alpha 1e308": ("lora", config(lora_alpha=1e308), Config, "lora_alpha=1e+308"),
    "alpha pattern 1e308": ("lora", config(alpha_pattern={"q_proj": 1e308}), Config, "1e+308"),
    "alpha text": ("lora", config(lora_alpha="8"), Config, "lora_alpha='8'"),
    "dropout 2": ("lora", config(lora_dropout=2.0), Config, "lora_dropout=2.0"),
    "dropout text": ("lora", config(lora_dropout="no"), Config, "lora_dropout='no'"),
    "layers a billion": ("lora", config(layers_to_transform=10**9), Target, "1000000000", "0 to 1"),
    "layers 100,000": ("lora", config(layers_to_transform=list(range(90_000))), Target, "has no layer"),
    "layers negative": ("lora", config(layers_to_transform=[-1]), Config, "layers_to_transform=[-1]"),
    "init_r a billion": ("adalora", config(init_r=10**9), Config, "init_r=1000000000"),
    "AdaLoRA's pattern too short": (
        "adalora",
        config(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True]}),
        Config,
        "has 1 entries and init_r is 4",
    ),
    "AdaLoRA's pattern of no layer": ("adalora", config(rank_pattern={"evil.lora_E": [True] * 4}), Config, "evil"),
    "AdaLoRA's pattern of fewer": (
        "adalora",
        config(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True, False, False, False]}),
        File,
        "lora_",
        "(1, ",
    ),
    "AdaLoRA's total_step text": ("adalora", config(total_step="many"), Config, "total_step='many'"),
    "AdaLoRA's beta 1": ("adalora", config(beta1=1.0), Config, "beta1=1.0"),
    **{
        f"{method}, {field} = {value!r}": (method, config(**{field: value}), error, *words)
        for method, field, value, error, *words in (
            ("prefix", "num_virtual_tokens", 10**9, Config, "num_virtual_tokens=1000000000"),
            ("prefix", "num_virtual_tokens", 2**20, File, "1048576"),
            ("prefix", "num_virtual_tokens", -1, Config, "num_virtual_tokens=-1"),
            ("prefix", "num_virtual_tokens", 5, File, "(4, ", "(5, "),
            ("prefix", "token_dim", 2**20, Config, "token_dim=1048576"),
            ("prefix", "num_layers", 2**20, (File, Config, Target), "1048576"),
            ("prefix", "num_layers", 1, Config, "num_layers=1"),
            ("prefix", "num_attention_heads", 10**9, Config, "num_attention_heads"),
            ("prefix", "num_transformer_submodules", 10**9, Config, "num_transformer_submodules"),
            ("prefix", "encoder_hidden_size", 10**9, Config, "encoder_hidden_size"),
            ("prefix", "init_weights", "evil", Config, "init_weights='evil'"),
            ("prompt", "num_virtual_tokens", 10**9, Config, "num_virtual_tokens=1000000000"),
            ("prompt", "num_virtual_tokens", 2**20, File, "1048576"),
            ("prompt", "prompt_tuning_init", "EVIL", Config, "prompt_tuning_init='EVIL'"),
            ("prompt", "tokenizer_kwargs", {"trust_remote_code": True}, Config, "tokenizer_kwargs"),
            ("p-tuning", "num_virtual_tokens", 10**9, Config, "num_virtual_tokens=1000000000"),
            ("p-tuning", "encoder_hidden_size", 10**9, Config, "encoder_hidden_size"),
            ("p-tuning", "encoder_num_layers", 10**9, Config, "encoder_num_layers"),
            ("p-tuning", "encoder_reparameterization_type", "EVIL", Config, "'EVIL'"),
            ("adaption", "adapter_len", 10**9, Config, "adapter_len=1000000000"),
            ("adaption", "adapter_len", 2**20, File, "1048576"),
            ("adaption", "adapter_layers", 2**20, Target, "adapter_layers=1048576"),
            ("adaption", "target_modules", "evil", Target, "target_modules='evil'"),
        )
    },
}

BOMB, REPEATS = "(?:[a-z_.0-9]|.)*[A-Z]", ".*?" * 10 + "[A-Z]"


def _slow_pattern() -> str:
    """One that is not given up at a name, but at a few: a quarter of the time or more, on whatever machine this is."""
    for parts in range(18, 30):
        pattern = f"(?:.|.){{{parts}}}[A-Z]"
        compiled = regex.compile(rf"(?:.*\.)?(?:{pattern})$")
        start = time.process_time()
        compiled.match("model.layers.0.self_attn.q_proj")
        if time.process_time() - start > 0.3 * patterns.TIMEOUT_S:
            return pattern
    raise AssertionError("no pattern is slow here")


SLOW = _slow_pattern()
GROWING = [
    "(?:" * n + "a|b" + f"|c){repeat}" * n for n, repeat in ((100, "+"), (20, "{2}"), (40, "{1,}?"), (3, "{900}"))
]
MANY = [f"l{i}" for i in range(60_000)]
LARGE = [f"(?:a{i}|b){{14}}" for i in range(190)]  # almost as many, and as much of them, as there may be in a field
MOST = {
    "exclude_modules": MANY[:20_000],
    "rank_pattern": dict.fromkeys([*LARGE, *MANY[:9_000]], 4),
    "alpha_pattern": dict.fromkeys([*reversed(LARGE), *MANY[:9_000]], 8),
    "layers_pattern": [*(f"{each}?" for each in LARGE), "layers"],
    "layers_to_transform": [0],
}

PATTERNS = {
    **{
        f"{what} in {field}": ("lora", config(**{field: make(pattern), **more}), error, *words)
        for what, pattern in (("a slow pattern", SLOW), ("a bomb", BOMB), ("repeats", REPEATS))[: how_many(1, 3)]
        for field, make, more, error, *words in (
            ("target_modules", str, {}, Config, "takes more than"),
            ("exclude_modules", str, {}, Config, "takes more than"),
            ("rank_pattern", lambda pattern: {pattern: 4}, {}, Config, "takes more than"),
            ("alpha_pattern", lambda pattern: {pattern: 4}, {}, Config, "takes more than"),
            ("layers_pattern", str, {"layers_to_transform": [0]}, Config, "takes more than"),
        )
    },
    **{
        f"a pattern that grows, {pattern[-9:]}": ("lora", config(target_modules=pattern), Config, "parts, more than")
        for pattern in GROWING
    },
    "a pattern that grows in rank_pattern": ("lora", config(rank_pattern={GROWING[0]: 4}), Config, "parts, more than"),
    "as much as there may be of everything": ("lora", config(**MOST), File, "does not declare"),
    "as much as there may be, and a slow pattern": (
        "lora",
        config(**{**MOST, "rank_pattern": {**MOST["rank_pattern"], SLOW: 4}}),
        Config,
        "takes more than",
    ),
    "groups in groups": ("lora", config(target_modules="(" * 999 + ")" * 999), Config, "too deep"),
    "a pattern that misspells": ("lora", config(target_modules="(?:q_prok|v_prok){e<=1}"), Config, "braces"),
    "60,000 ranks": ("lora", config(rank_pattern=dict.fromkeys(MANY, 4)), Config, "more than 10000"),
    "60,000 alphas": ("lora", config(alpha_pattern=dict.fromkeys(MANY, 8)), Config, "more than 10000"),
    "50,000 patterns": ("lora", config(rank_pattern={f"{name}.*": 4 for name in MANY[:50_000]}), Config, "10000"),
    "9,000 patterns": ("lora", config(rank_pattern={f"{name}.*": 4 for name in MANY[:9_000]}), Config, "than 200"),
    "9,000 patterns of layers": (
        "lora",
        config(layers_to_transform=[0], layers_pattern=[f"{name}.*" for name in MANY[:9_000]]),
        Config,
        "than 200",
    ),
    "10,000 ranks that fit nothing": ("lora", config(r=8, rank_pattern=dict.fromkeys(MANY[:10_000], 4)), File, "(8, "),
    "pattern of 900,000 characters": ("lora", config(target_modules="q" * 900_000), Config, "more than 2000"),
    "name of 900,000 characters": ("lora", config(target_modules=["q" * 900_000]), Target, "matches no module"),
    "pattern that is none": ("lora", config(target_modules="*q_proj"), Config, "not a regular expression"),
    "pattern that recurses": ("lora", config(target_modules="(?R)"), Config, "target_modules"),
    "60,000 targets": ("lora", config(target_modules=MANY), Target, "and 59988 more matches no module"),
    "60,000 targets and too many": (
        "lora",
        config(target_modules=[*MANY, "q_proj", "v_proj", "k_proj"]),
        File,
        "missing",
    ),
    "60,000 excluded": ("lora", config(exclude_modules=[*MANY, "q_proj"]), File, "does not declare"),
    "60,000 saved": ("lora", config(modules_to_save=MANY), Target, "modules_to_save='l0' is not in the model"),
    "60,000 layers": ("lora", config(layers_to_transform=[0], layers_pattern=MANY), Config, "more than 10000"),
    "targets of nothing": ("lora", config(target_modules=["c_attn"]), Target, "c_attn"),
    "targets empty": ("lora", config(target_modules=[]), Target, "names nothing"),
    "targets a name of nothing": ("lora", config(target_modules=[""]), (Config, Target), "target_modules"),
    "targets the model": ("lora", config(target_modules=["model"]), Target, "model"),
    "targets more than it has": ("lora", config(target_modules=["q_proj", "k_proj", "v_proj"]), File, "missing"),
    "targets all": ("lora", config(target_modules=".*"), (Target, File), ""),
    "targets a path": ("lora", config(target_modules=["../../q_proj"]), Target, "../../q_proj"),
    "targets numbers": ("lora", config(target_modules=[1, 2]), Config, "target_modules=[1, 2]"),
    "saved what is not there": ("lora", config(modules_to_save=["evil"]), Target, "modules_to_save='evil'"),
    "saved without tensors": ("lora", config(modules_to_save=["lm_head"]), File, "lm_head.weight", "missing"),
    "saved the whole model": ("lora", config(modules_to_save=["model"]), (Target, Patch, File, Config), ""),
    "saved a name of nothing": ("lora", config(modules_to_save=[""]), (Config, Target, Patch), "modules_to_save"),
    "saved text": ("lora", config(modules_to_save="lm_head"), Config, "modules_to_save='lm_head'"),
    "saved a dict": ("lora", config(modules_to_save={"lm_head": 1}), Config, "modules_to_save"),
}

CONFIGURATIONS = {**CONFIG_FILES, **METHODS, **AMOUNTS, **PATTERNS}
