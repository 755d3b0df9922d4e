"""A training process killed with signal 9, in a step and in the middle of a save, and gone on with in a new process,
ends in the same adapter, byte for byte."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 8, 2

# Every training is a process of its own, forked from one that has imported everything and computed nothing.
PROGRAM = """
import io, json, os, signal, sys, time
import torch, transformers
import fastpeft
from fastpeft.integrations.trainer import AdaLoraCallback, Trainer
from tests.models import batch, tiny

STEPS, EVERY = map(int, sys.argv[2:])

class Slow(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.2)

def dying(step):
    whole_save = torch.save

    def save(content, file, *args, **kwargs):
        if f"checkpoint-{step}" in str(file) and str(file).endswith("optimizer.pt"):
            written = io.BytesIO()
            whole_save(content, written)
            with open(file, "wb") as half:
                half.write(written.getvalue()[: len(written.getvalue()) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole_save(content, file, *args, **kwargs)

    torch.save = save

def train(directory, resume, slow, dies_at):
    rows = batch(rows=8)
    rows = [{key: value[row] for key, value in rows.items()} for row in range(8)]
    torch.manual_seed(4)
    config = fastpeft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_r=6, target_r=2, tinit=1, tfinal=2,
        total_step=STEPS, lora_dropout=0.3,
    )
    model = fastpeft.patch(tiny(), config)
    arguments = transformers.TrainingArguments(
        directory, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="steps", save_steps=EVERY, max_steps=STEPS,
    )
    callbacks = [AdaLoraCallback()] + [Slow()] * slow
    if dies_at:
        dying(dies_at)
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train(resume_from_checkpoint=resume)

def whole(file):  # there, and written to its end
    try:
        with open(file) as written:
            return bool(json.load(written))
    except (FileNotFoundError, json.JSONDecodeError):
        return False

ended = []
for directory, resume, killed_after, dies_at in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        train(directory, resume, bool(killed_after), dies_at)
        sys.stdout.flush()
        os._exit(0)
    while killed_after and not whole(killed_after):
        time.sleep(0.01)
    if killed_after:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    checkpoints = {name: os.listdir(os.path.join(directory, name)) for name in os.listdir(directory)}
    ended.append((code, checkpoints))
print("ended", json.dumps(ended))
"""


def ends_of(*trainings) -> list[tuple[int, dict[str, list[str]]]]:
    """The exit code, and the names of the files in each checkpoint, of trainings one after the other: (directory,
    whether to go on from a checkpoint, the file at whose end it is killed, the step in whose save it kills
    itself)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(trainings), str(STEPS), str(EVERY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("ended")[2])


def adapter(directory) -> dict[str, bytes]:
    files = (directory / f"checkpoint-{STEPS}").iterdir()
    return {path.name: path.read_bytes() for path in files if path.name.startswith(("adapter_", "fastpeft"))}


@pytest.mark.slow
def test_killed_twice_and_gone_on_with_it_is_the_same_adapter(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ends = ends_of(
        (str(whole), None, None, None),
        (str(killed), None, str(killed / f"checkpoint-{EVERY}/trainer_state.json"), None),
        (str(killed), True, None, 2 * EVERY),
        (str(killed), True, None, None),
    )
    assert [code for code, _ in ends] == [0, -signal.SIGKILL, -signal.SIGKILL, 0]
    assert all(f"checkpoint-{STEPS}" not in checkpoints for _, checkpoints in ends[1:3])
    half = ends[2][1][f"checkpoint-{2 * EVERY}"]
    assert "optimizer.pt" in half and "trainer_state.json" not in half
    expected = adapter(whole)
    assert {"adapter_model.safetensors", "fastpeft_encoder.safetensors", "adapter_config.json"} <= expected.keys()
    assert adapter(killed) == expected
