"""Runs a function in several processes that talk to each other over gloo.

The processes are forked from a server that has imported torch, transformers and fastpeft and done nothing with them, so
that a start costs a tenth of a second and not the seconds of the imports.
"""

import datetime
import multiprocessing
import os
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (  # by the server
    *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.nn.parallel", "accelerate"),
    *("transformers.models.llama.modeling_llama", "tests.distributed_fused", "tests.error_recording"),
)


def run(function, world: int, folder: Path, *args, timeout: float = 60) -> list:
    """What `function(rank, *args)` returns in each of `world` processes, in the order of ranks. It is found by the name
    of its module. A failure in one of them, or no end within `timeout` seconds, fails the test that asks."""
    folder.mkdir(parents=True, exist_ok=True)
    context = _context()
    processes = [
        context.Process(target=_process, args=(function, rank, world, str(folder), os.environ.copy(), args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):  # the others wait for it
                end = min(end, time.monotonic() + 3)
            time.sleep(0.02)
        late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = [f"rank {path.stem}:\n{path.read_text()}" for path in sorted(folder.glob("*.error"))]
    if said:
        raise AssertionError("\n".join(said))
    if died := {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode and not late}:
        raise AssertionError(f"processes ended without a word: {died}")
    if late:
        raise AssertionError(f"ranks {late} did not end within {timeout} s")
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world)]


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), path)))
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return context


def _process(function, rank: int, world: int, folder: str, environment: dict[str, str], args: tuple) -> None:
    import torch.distributed as dist

    from tests import error_recording

    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    error_recording.install()
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    limit = datetime.timedelta(seconds=45)  # of one collective
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
        result = function(rank, *args)
        torch.save(result, f"{folder}/{rank}.result")
        dist.barrier()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # what libraries do when a process ends is not waited for
