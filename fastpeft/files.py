"""Reading and writing adapter directories: a configuration and tensors, in Hugging Face peft's layout.

A directory holds `adapter_config.json`, `adapter_model.safetensors` and, if there is more to say than peft's files can,
our `fastpeft.json` and `fastpeft_encoder.safetensors`; the layout is that of peft 0.21.2 (`PeftModel.save_pretrained`).
Nothing here knows models: whether the tensors fit one is for the caller to say, in `read_adapter(validate=...)`, before
any data is read.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO
from warnings import warn

import torch

from fastpeft.errors import AdapterFileError, FastpeftError
from fastpeft.journal import CONFIG, ENCODER, SIDE, WEIGHTS, read_files, replace_files
from fastpeft.safetensors_header import (
    DTYPES,
    MAX_TENSORS,
    TensorInfo,
    check_tensor_kind,
    check_tensor_name,
    parse_header,
)
from fastpeft.untrusted import parse_json_object, shown

PICKLED_WEIGHTS = "adapter_model.bin"
SIDE_DIGEST, ENCODER_DIGEST = "weights_sha256", "encoder_sha256"
OPTIONS = "options"  # of the side data: what a configuration has beyond peft's fields
MAX_JSON_BYTES = 1_000_000
MAX_JSON_MARKS = 200_000

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Parts of the parameter names that an adapter's name stands next to.
_TAKEN = frozenset(
    {"adaption_gate", "adaption_prompt", "base_layer"}
    | {"base_model", "bias", "embedding", "lora_A", "lora_B", "lora_E", "lora_dropout", "lora_embedding_A"}
    | {"lora_embedding_B", "lora_magnitude_vector", "modules_to_save", "original_module", "prompt_embeddings"}
    | {"prompt_encoder", "ranknum", "token_adapter", "weight"}
)

Validate = Callable[[dict[str, Any], dict[str, TensorInfo], dict[str, Any] | None], object]


@dataclass(frozen=True)
class AdapterFiles:
    """What one save left in a directory.

    header: dtype and shape of each tensor, as the file's header states them. tensors: on CPU, finite, in memory of
    their own. side: the content of fastpeft.json, None if there is none. encoder: what the tensors were computed from,
    None if the save was without.
    """

    path: str
    config: dict[str, Any]
    header: dict[str, TensorInfo]
    tensors: dict[str, torch.Tensor]
    side: dict[str, Any] | None
    encoder: dict[str, torch.Tensor] | None = None


def adapter_directory(directory: str | os.PathLike[str], name: str) -> str:
    """Where the adapter `name` is kept under `directory`: "default" in it, any other in a folder of its name (as peft).

    Raises AdapterFileError unless the name is 1 to 64 of A-Z a-z 0-9 _ - (no dot: torch's containers, which hold
    adapters by name, allow none) and means nothing else: no part of a parameter's name, no attribute of a container.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterFileError(
            f"{shown(name)} cannot be an adapter's name: 1 to 64 letters, digits, _ and - are needed, no dot."
        )
    if name in _TAKEN or hasattr(torch.nn.ModuleDict(), name) or hasattr(torch.nn.ParameterDict(), name):
        raise AdapterFileError(f"{name!r} cannot be an adapter's name: it has another meaning. Try {name + '_1'!r}.")
    path = _fspath(directory)
    return path if name == "default" else os.path.join(path, name)


def write_adapter(
    directory: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    side: dict[str, Any] | None = None,
    encoder: dict[str, torch.Tensor] | None = None,
) -> None:
    """Saves an adapter to `directory`, all of it or nothing: the one that was there before is whole until then.

    adapter_model.safetensors gets the bytes that peft writes for `tensors` (float64, float32, float16 or bfloat16, of
    any device, stride or aliasing), adapter_config.json those that it writes for `config`. fastpeft.json gets `side`
    and the digests of what it belongs to, the weights and the `encoder`: parameters that peft does not save, in
    fastpeft_encoder.safetensors. What is not given is removed, if it is there from an earlier save.

    `fastpeft.journal` says how a crash is survived: our readers, whenever they come, see the old adapter or the new
    one. A reader that does not know the journal, peft for one, may come between two renames. The weights are renamed
    first, the configuration last: into a new directory, peft then refuses as there is no configuration yet, rather
    than look for weights elsewhere; over an old adapter it sees new weights with the old configuration, where other
    ranks are a refusal, other targets leave new tensors unused and only a change of scale goes unnoticed. The other
    order would also fill the layers that the old weights lack at random.

    Raises AdapterFileError for what `read_adapter` would refuse to read (a tensor without values, on the meta device,
    sharded, of another dtype, or with NaN or infinite values; a configuration without peft_type), for a path that
    cannot be written, for a full disk. The old adapter is untouched unless the message says that the new one is
    complete.
    """
    path = _path_of(directory)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise AdapterFileError(f"{path} is a file, not a directory. Remove it or save elsewhere.")
    weights, parameters = _encode_tensors(tensors), None if encoder is None else _encode_tensors(encoder)
    settings = _encode_json(config, f"{CONFIG} for {path}")
    _require_peft_type(config, f"{CONFIG} for {path}")
    notes = None
    if side is not None:
        for key in (SIDE_DIGEST, ENCODER_DIGEST):
            if key in side:
                raise AdapterFileError(f"the side data for {path} may not have the key {key!r}; rename it.")
        digests = {SIDE_DIGEST: hashlib.sha256(weights).hexdigest()}
        if parameters is not None:
            digests[ENCODER_DIGEST] = hashlib.sha256(parameters).hexdigest()
        notes = _encode_json({**side, **digests}, f"{SIDE} for {path}")
    replace_files(path, {WEIGHTS: weights, ENCODER: parameters, SIDE: notes, CONFIG: settings})


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of adapter_config.json; it has a `peft_type`, nothing else is checked. Raises AdapterFileError."""
    path = _existing(directory)
    return read_files(path, [CONFIG], lambda files: _read_config(files[CONFIG], path))


def read_adapter(
    directory: str | os.PathLike[str],
    validate: Validate | None = None,
    max_tensors: int = MAX_TENSORS,
) -> AdapterFiles:
    """The adapter in `directory`, from one and the same save even while another process replaces it.

    `validate(config, header, side)` is called before the data is read, and raises if they are not what the caller
    expects: only then a file of many gigabytes costs nothing. It may be called again, with other side data too, so it
    must have no effects. `max_tensors`: the most that the model could need; a file of more is refused before its header
    is parsed. Nothing is mapped: what happens to the files afterwards does not reach the tensors.

    Raises AdapterFileError if anything is missing, damaged, not a regular file, or not a safetensors file of finite
    floating-point values; every message names the file. Nothing is ever downloaded.
    """
    path = _existing(directory)

    def read(files: dict[str, BinaryIO | None]) -> tuple[AdapterFiles, bool]:
        config = _read_config(files[CONFIG], path)
        weights, where = files[WEIGHTS], os.path.join(path, WEIGHTS)
        if weights is None:
            raise AdapterFileError(_why_no_weights(path))
        header = parse_header(weights, where, max_tensors)
        side = _read_side(files[SIDE], os.path.join(path, SIDE))
        digests = {key: side.pop(key, None) for key in (SIDE_DIGEST, ENCODER_DIGEST)} if side is not None else {}
        problem = None
        if validate is not None:
            try:
                validate(config, header, side)
            except FastpeftError as error:
                # The options may belong to other weights, which only their digest tells; it is not worth reading what
                # does not fit without them either.
                if not (side and side.get(OPTIONS) and _passes(validate, config, header)):
                    raise
                problem = error
        data = _read_all(weights, where)
        stale = side is not None and digests[SIDE_DIGEST] != hashlib.sha256(data).hexdigest()
        if stale:
            side = None
            if validate is not None:
                validate(config, header, None)
        elif problem is not None:
            raise problem
        tensors = _decode_tensors(data, header, where)
        encoder = None if side is None else _read_encoder(files[ENCODER], digests[ENCODER_DIGEST], path, max_tensors)
        return AdapterFiles(path, config, header, tensors, side, encoder), stale

    adapter, stale = read_files(path, [CONFIG, WEIGHTS, ENCODER, SIDE], read)
    if stale:
        warn(f"{path}: {SIDE} is ignored, as another program has replaced {WEIGHTS} since. Delete it.", stacklevel=2)
    return adapter


def _passes(validate: Validate, config: dict[str, Any], header: dict[str, TensorInfo]) -> bool:
    try:
        validate(config, header, None)
    except FastpeftError:
        return False
    return True


def _path_of(directory: str | os.PathLike[str]) -> str:
    path = _fspath(directory)
    if not path or "\0" in path:
        raise AdapterFileError(f"{shown(path)} is not the path of a directory: it must have characters, and no NUL.")
    return path


def _fspath(directory: str | os.PathLike[str]) -> str:
    path = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
    if not isinstance(path, str):
        raise AdapterFileError(f"{shown(path)} is not the path of a directory; a str or an os.PathLike is needed.")
    return path


def _existing(directory: str | os.PathLike[str]) -> str:
    path = _path_of(directory)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        raise AdapterFileError(f"{path} is not a directory. Give the directory that {CONFIG} is in.")
    words = f"{path} does not exist. Give the directory of an adapter."
    if _HUB_ID.fullmatch(path):
        words += (
            " If it is a repository on the Hugging Face Hub: nothing is downloaded here. Download it first, "
            f"`path = huggingface_hub.snapshot_download({path!r})`, and give that path."
        )
    raise AdapterFileError(words)


def _encode_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    where = f"cannot save {WEIGHTS}"
    if not tensors:
        raise AdapterFileError(f"{where}: 0 tensors; an adapter has one at least.")
    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        _check_savable(name, tensor, where)
        tensor = tensor.detach().to("cpu").contiguous()
        _require_finite(name, tensor, where, "training diverged. Save an earlier state")
        # safetensors refuses tensors that share memory, such as tied weights; each gets a copy, as in peft.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return save(ready, metadata={"format": "pt"})


def _check_savable(name: str, tensor: torch.Tensor, where: str) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise AdapterFileError(f"{where}: {shown(name)} is of {type(tensor).__name__}; names map to tensors.")
    check_tensor_name(name, where)
    if hasattr(tensor, "full_tensor"):
        raise AdapterFileError(
            f"{where}: tensor {name!r} is sharded. Call its full_tensor() in every process, save in one."
        )
    if tensor.is_meta:
        raise AdapterFileError(
            f"{where}: tensor {name!r} is on the meta device, it has no values. Materialise it first."
        )
    if tensor.layout != torch.strided:
        raise AdapterFileError(f"{where}: tensor {name!r} has layout {tensor.layout}. Save its to_dense().")
    check_tensor_kind(name, tensor.dtype, tensor.dtype in DTYPES.values(), tensor.shape, where)


def _encode_json(value: dict[str, Any], where: str) -> bytes:
    """As peft writes it: two spaces, sorted keys, ASCII, no newline at the end; and such that we would read it."""
    try:
        data = json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where} cannot be written as JSON: {error}.") from error
    parse_json_object(data, where, max_bytes=MAX_JSON_BYTES, max_marks=MAX_JSON_MARKS)
    return data


def _read_json(file: BinaryIO, where: str) -> dict[str, Any]:
    data = file.read(MAX_JSON_BYTES + 1)
    return parse_json_object(data, where, max_bytes=MAX_JSON_BYTES, max_marks=MAX_JSON_MARKS)


def _read_config(file: BinaryIO | None, path: str) -> dict[str, Any]:
    if file is None:
        found = sorted(name for name in os.listdir(path) if not name.startswith("."))
        inside = [name for name in found[:1000] if os.path.isfile(os.path.join(path, name, CONFIG))]
        hint = f"the folders {', '.join(inside[:8])} are. Give one of those" if inside else f"it holds {found[:8]}"
        raise AdapterFileError(f"{path} is not an adapter's directory, {CONFIG} is missing; {hint}.")
    where = os.path.join(path, CONFIG)
    config = _read_json(file, where)
    _require_peft_type(config, where)
    return config


def _require_peft_type(config: dict[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or not kind:
        found = "is missing" if "peft_type" not in config else f"is {shown(kind)}"
        raise AdapterFileError(f'{where}: peft_type {found}; it names the method, such as "LORA".')


def _why_no_weights(path: str) -> str:
    where = os.path.join(path, WEIGHTS)
    pickled = os.path.join(path, PICKLED_WEIGHTS)
    if not os.path.lexists(pickled):
        return (
            f"{where} is missing: the directory has a configuration, but no weights. Fetch or save the adapter again."
        )
    return (
        f"{where} is missing. {PICKLED_WEIGHTS} is there, a pickle, which can run code when it is opened. If you trust "
        f"it, convert it: tensors = torch.load({pickled!r}, weights_only=True), then "
        f"safetensors.torch.save_file(tensors, {where!r}, metadata={{'format': 'pt'}})."
    )


def _read_all(file: BinaryIO, where: str) -> bytes:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        data = file.read(size)
    except MemoryError as error:
        raise AdapterFileError(
            f"{where} has {size} bytes, more than there is memory for. Make room, or load it elsewhere."
        ) from error
    if len(data) != size:
        raise AdapterFileError(f"{where} became shorter while it was read. Load it again when it is complete.")
    return data


def _read_side(file: BinaryIO | None, where: str) -> dict[str, Any] | None:
    """The side data, and in it the digest of its weights: peft saves over an adapter of ours and leaves this file."""
    if file is None:
        return None
    side = _read_json(file, where)
    if SIDE_DIGEST not in side:
        raise AdapterFileError(f"{where} does not say which weights it belongs to ({SIDE_DIGEST!r}). Delete it.")
    return side


def _read_encoder(file: BinaryIO | None, digest: Any, path: str, max_tensors: int) -> dict[str, torch.Tensor] | None:
    """The encoder that the side data name."""
    where = os.path.join(path, ENCODER)
    if digest is None:
        return None
    if file is None:
        raise AdapterFileError(f"{where} is missing, and {SIDE} names it. Fetch it, or delete {SIDE}.")
    header = parse_header(file, where, max_tensors)
    data = _read_all(file, where)
    if hashlib.sha256(data).hexdigest() != digest:
        raise AdapterFileError(f"{where} is not the one that {SIDE} was written with. Fetch it again, or delete both.")
    return _decode_tensors(data, header, where)


def _decode_tensors(data: bytes, header: dict[str, TensorInfo], where: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        tensors = load(data)
    except Exception as error:  # safetensors' own class is not public in every version
        raise AdapterFileError(f"{where} is refused by safetensors: {error}") from error
    if {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != header:
        raise AdapterFileError(f"{where}: safetensors reads another header than was checked. Save the adapter again.")
    for name, tensor in tensors.items():
        _require_finite(name, tensor, where, "training diverged, or the file is damaged. Load an earlier checkpoint")
    return tensors


def _require_finite(name: str, tensor: torch.Tensor, where: str, advice: str) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise AdapterFileError(
            f"{where}: {bad} of the {tensor.numel()} values of tensor {name!r} are NaN or infinite: {advice}."
        )
