"""`fastpeft info`: versions, devices, which backend serves which device and why, the environment variables honoured."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import fastpeft
from fastpeft.console import Console
from fastpeft.dispatch import choose_backend, interpreting, requested_backend, triton_refusal, triton_unavailable
from fastpeft.errors import BackendError

LIBRARIES = ("triton", "transformers", "peft", "safetensors", "accelerate")
VARIABLES = {
    "FASTPEFT_BACKEND": "auto (not set)",
    "FASTPEFT_CACHE": "not set: tables of `fastpeft tune` are in ~/.cache/fastpeft, or $XDG_CACHE_HOME/fastpeft",
    "TRITON_INTERPRET": "not set: Triton compiles, for GPUs",
}


def versions() -> dict[str, str]:
    """Of Python, torch and the libraries that fastpeft works with; "not installed" where one is missing."""
    found = {"fastpeft": fastpeft.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    with_names = Path("/proc/cpuinfo")
    lines = with_names.read_text(errors="replace").splitlines() if with_names.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def devices() -> dict[str, str]:
    """Device -> what it is, the CPU first."""
    found = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads used by torch"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        system = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{properties.name}, {memory}, compute capability {capability}, {system}"
    return found


def backends() -> list[tuple[str, str, str]]:
    """(device, backend that serves it, reason), and for each device whether Triton could."""
    rows = []
    for device in devices():
        x = torch.empty(0, device=device)
        try:
            rows.append((device, *choose_backend(x, torch.float32, 16)))
        except BackendError as error:
            rows.append((device, "none", str(error)))
        refusal = triton_refusal(x, torch.float32, 16)
        mode = "in the interpreter" if interpreting() else "compiled"
        rows.append((device, "(triton)", f"can serve, {mode}" if refusal is None else f"cannot: {refusal}"))
    return rows


def environment() -> dict[str, str]:
    """The variables that fastpeft honours, as they are set, with a remark where that cannot be."""
    values = {name: os.environ.get(name, unset) for name, unset in VARIABLES.items()}
    try:
        requested_backend()
    except BackendError as error:
        values["FASTPEFT_BACKEND"] = str(error)
    if os.environ.get("TRITON_INTERPRET") and not triton_unavailable():
        effect = "kernels run in Triton's interpreter, on CPU tensors" if interpreting() else "without effect"
        values["TRITON_INTERPRET"] += f": {effect}"
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print the tables. Returns 0."""
    console = Console()
    folder = str(Path(fastpeft.__file__).parent)
    rows = [[name, (version, "bold"), folder if name == "fastpeft" else ""] for name, version in versions().items()]
    console.table(("library", "version", "from"), rows, figures=False)
    console.table(("device", "what it is"), [list(item) for item in devices().items()], figures=False)
    console.table(
        ("device", "backend", "why"), [[device, (name, "bold"), why] for device, name, why in backends()], figures=False
    )
    console.table(("environment variable", "value"), [list(item) for item in environment().items()], figures=False)
    return 0
