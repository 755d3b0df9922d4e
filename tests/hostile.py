"""Adapters that strangers made to do harm: a sound one of each method, and what is done to its files.

`CASES` maps the name of each to (method, what is done to the directory, the error that names it, words of its message).
The files are made here; they are loaded in a process of its own, `tests.hostile_victim`.
"""

import functools
import json
import os
import pickle
import socket
import struct
import tempfile

import torch

CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "fastpeft.json"
ENCODER, JOURNAL = "fastpeft_encoder.safetensors", ".fastpeft-journal.json"

_COMMON = {"task_type": "CAUSAL_LM"}
SOUND = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **_COMMON},
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 8, **_COMMON}
    | {"target_modules": ["q_proj", "v_proj"]},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, **_COMMON},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, **_COMMON},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 8, **_COMMON},
    "adaption": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2, **_COMMON},
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@functools.cache
def sound(method):
    """The files of a sound adapter that was trained a little, {name: bytes}; `config` may say more."""
    import fastpeft
    from tests.models import tiny

    model = fastpeft.patch(tiny(), fastpeft.get_peft_config(SOUND[method]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        fastpeft.save_adapter(model, folder)
        files = {}
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                files[name] = file.read()
    return files


def lay_out(directory, method):
    """The sound adapter's files in a new directory."""
    os.makedirs(directory)
    for name, content in sound(method).items():
        with open(os.path.join(directory, name), "wb") as file:
            file.write(content)
    return directory


# What is done to a directory.


def put(name, content):
    """A file of this content in the place of the one that is there."""

    def change(directory):
        path = directory / name
        if os.path.lexists(path):
            path.unlink()
        path.write_bytes(content)

    return change


def without(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def both(*changes):
    return lambda directory: [change(directory) for change in changes]


def _edited_json(name, edit):
    def change(directory):
        value = json.loads((directory / name).read_bytes())
        edit(value)
        (directory / name).write_text(json.dumps(value))

    return change


def config(**values):
    """Fields of the configuration set; a peft's directory, without a side file."""
    return both(_edited_json(CONFIG, lambda found: found.update(values)), without_side)


def without_side(directory):
    for name in (SIDE, ENCODER):
        (directory / name).unlink(missing_ok=True)


def side(**values):
    return _edited_json(SIDE, lambda found: found.update(values))


def options(**values):
    return side(options=values)


def raw_config(text):
    """The configuration with this text in it, which json would not write."""

    def change(directory):
        content = (directory / CONFIG).read_bytes().rstrip()
        (directory / CONFIG).write_bytes(content[:-1] + b", " + text + b"}")

    return change


def parsed(content):
    """The header of a safetensors file and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def blob(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header(edit, name=WEIGHTS):
    """The weights with their header edited, their data as it is. `edit(header)` may return another."""

    def change(directory):
        found, data = parsed((directory / name).read_bytes())
        (directory / name).write_bytes(blob(edit(found) or found, data))
        (directory / SIDE).unlink(missing_ok=True)

    return change


def entry(key, **values):
    return header(lambda found: found[key].update(values))


def tensors(edit, name=WEIGHTS):
    """The weights with their tensors edited, and written as they should be."""
    from safetensors.torch import load, save

    def change(directory):
        found = load((directory / name).read_bytes())
        edit(found)
        (directory / name).write_bytes(save(found, metadata={"format": "pt"}))
        (directory / SIDE).unlink(missing_ok=True)

    return change


def tensor(key, value):
    return tensors(lambda found: found.update({key: value}))


def renamed(old, new):
    def edit(found):
        for key in list(found):
            found[key.replace(old, new)] = found.pop(key)

    return tensors(edit)


def cut(name, count):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:count])


def link(name, target):
    def change(directory):
        (directory / name).unlink(missing_ok=True)
        os.symlink(target, directory / name)

    return change


def pipe(name):
    def change(directory):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def plug(name):
    """A socket of that name; its address may be no longer than 107 bytes, so it is bound from inside."""

    def change(directory):
        (directory / name).unlink()
        here = os.getcwd()
        os.chdir(directory)
        try:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(name)
        finally:
            os.chdir(here)

    return change


def folder(name):
    def change(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return change


def sparse(name, size):
    """Longer than any memory, of which the disk holds next to nothing."""

    def change(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content)
        os.truncate(directory / name, size)

    return change


class Evil:
    """What would leave a trace if it were unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def pickled(name, protocol=2):
    def change(directory):
        (directory / name).write_bytes(pickle.dumps(Evil(str(directory / "owned")), protocol))

    return change


def saved_by_torch(name, zipped=True):
    def change(directory):
        torch.save({"a": Evil(str(directory / "owned"))}, directory / name, _use_new_zipfile_serialization=zipped)

    return change


def mined(directory):
    """Everything that some library, somewhere, would run, import, unpickle or fetch, laid beside an adapter."""
    trace = str(directory / "owned")
    code = f"import os\nos.mkdir({trace!r})\n".encode()
    for name in ("__init__.py", "setup.py", "conftest.py", "sitecustomize.py", "usercustomize.py", "fastpeft.py"):
        (directory / name).write_bytes(code)
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "torch.py", "peft.py", "json.py"):
        (directory / name).write_bytes(code)
    (directory / "evil.pth").write_bytes(b"import os; " + code.splitlines()[1])
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.ckpt"):
        pickled(name)(directory)
    model = {"auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}}
    (directory / "config.json").write_text(json.dumps({"model_type": "evil", "architectures": ["Evil"], **model}))
    mapping = {"base_model_class": "Evil", "parent_library": "modeling_evil"}
    values = {"auto_mapping": mapping, "base_model_name_or_path": "evil/evil", "revision": "refs/pr/1"}
    _edited_json(CONFIG, lambda found: found.update(values))(directory)


def journal(*entries, **values):
    """A journal of these entries, [final, name of the temporary, its content, whether the journal tells its digest]."""
    from hashlib import sha256

    def change(directory):
        files = []
        for number, (final, content) in enumerate(entries):
            temporary = f".fastpeft-tmp-1-{number:016x}"
            (directory / temporary).write_bytes(content)
            before = directory / final
            previous = sha256(before.read_bytes()).hexdigest() if before.exists() else None
            files.append({"final": final, "temporary": temporary, "sha256": sha256(content).hexdigest()})
            files[-1] |= {"size": len(content), "previous": previous, **values}
        (directory / JOURNAL).write_text(json.dumps({"schema": 1, "files": files}))

    return change
