"""examples/train_fsdp.py: launched by torchrun, going on from a save, with replicas, on one process."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.distributed import ROOT, run
from tests.peft_pair import WEIGHTS, close

SCRIPT = ROOT / "examples/train_fsdp.py"


def script(rank: int, *arguments: str) -> list[float]:
    """The losses that the script returns in this process."""
    spec = importlib.util.spec_from_file_location("train_fsdp", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments])


@pytest.mark.slow
def test_torchrun_and_going_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cut = ["--out", str(tmp_path / "cut"), "--save-every", "2"]
    made = subprocess.run(
        [*command, *cut, "--steps", "2"], env=environment, timeout=120, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (tmp_path / "cut" / "step-9").mkdir()  # a save that was not completed
    rest = run(script, 2, tmp_path / "second", *cut, "--steps", "4")
    whole = run(script, 2, tmp_path / "whole", "--out", str(tmp_path / "at once"), "--steps", "4")
    assert whole[0] == whole[1] and len(whole[0]) == 4 and rest == [losses[2:] for losses in whole]
    assert [line for line in made.stdout.splitlines() if line.startswith("step")] == [
        f"step {step + 1}: loss {loss:.4f}" for step, loss in enumerate(whole[0][:2])
    ]
    files = [(tmp_path / out / "step-4" / WEIGHTS).read_bytes() for out in ("cut", "at once")]
    assert files[0] == files[1] != (tmp_path / "cut" / "step-2" / WEIGHTS).read_bytes()
    assert run(script, 2, tmp_path / "third", *cut, "--steps", "4") == [[], []]  # all is done
    (alone,) = run(script, 1, tmp_path / "alone", "--out", str(tmp_path / "one"), "--steps", "4")
    replicas = run(script, 4, tmp_path / "four", "--out", str(tmp_path / "two"), "--steps", "4", "--replicas", "2")
    for losses in (alone, *replicas):  # of a base in bfloat16
        close(torch.tensor(losses), torch.tensor(whole[0]), 2e-3)


def test_processes_that_do_not_fit_are_said(tmp_path):
    with pytest.raises(AssertionError, match="SystemExit: --batch 3: not a multiple of the 2 processes"):
        run(script, 2, tmp_path / "batch", "--batch", "3")
    with pytest.raises(AssertionError, match="SystemExit: --replicas 3: 2 processes are no 3 groups of one size"):
        run(script, 2, tmp_path / "replicas", "--replicas", "3")


def test_the_calculation_in_the_document():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=1, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    layer = sum(each.numel() for each in model.model.layers.parameters())
    rest = sum(each.numel() for each in model.parameters()) - layer
    linear = [each for each in model.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    lora = 80 * sum(16 * (each.in_features + each.out_features) for each in linear)
    rows, width, words = 4096, 8192, 128256
    fixed = 2 * 2 * layer + 2 * rest + 80 * rows * width * 2 + 158_000 * rows * 2 + rows * words * 10
    totals = [(2 * (80 * layer + rest) + 16 * lora) / shards + fixed for shards in (8, 64, 1024)]
    text = (ROOT / "docs/distributed.md").read_text()
    for number in (layer, rest, 80 * layer + rest, lora // 80, lora):
        assert f" {number:,d} " in text or f" {number:,d}\n" in text
    assert " | ".join(f"{total / 1e9:.1f}" for total in totals) in text
    traffic = (2 * 80 * layer * 2, 2 * rest, 2 * 4 * lora, 4 * lora)
    assert all(f"= {each / 1e9:5.1f} GB\n" in text for each in traffic)
    assert 3 * 2 * 80 * layer * rows == pytest.approx(1.68e15, rel=2e-3)
    assert sum(traffic[:2]) / sum(traffic[2:]) == pytest.approx(110, abs=3)
