"""The compile gate of tests/aot.py: a few of the configurations that ship pass it, and what it is there to find it
finds. Compilations run in processes of their own, because this one has Triton's interpreter switched on. What has not
changed since it was compiled is known, but for a sample (aot_known.py)."""

import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpeft.kernels import (
    _attention_decode,
    _attention_kernels,
    _attention_tiles,
    _partials,
    _tiles,
    dora_linear,
    lora_linear,
    lora_mlp,
    lora_projections,
    mixed_lora_linear,
    prompt_embedding,
    row_norms,
)
from fastpeft.kernels._common import dot_mode
from tests import aot, aot_known

ROOT = Path(__file__).resolve().parents[1]
MODES = ("half", "split", "tf32x3", "tf32", "ieee")
KERNELS = {
    name.strip("_")
    for module in (
        *(lora_linear, lora_mlp, mixed_lora_linear, lora_projections, dora_linear, row_norms),
        *(_attention_kernels, _attention_decode, _partials, prompt_embedding),
    )
    for name in vars(module)
    if name.startswith("_") and name.endswith("_kernel")
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot")]  # one worker compiles, the other has the rest


def run_gate(script: str, file: Path, *more: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """(process, facts) of the gate's quick set."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, f"tests/{script}", "--quick", "--json", str(file), *more],
        cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done, json.loads(file.read_text())["results"] if file.exists() else []


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    done, facts = run_gate("aot.py", tmp_path_factory.mktemp("aot") / "shipped.json", "--known")
    assert facts, done.stderr
    assert done.returncode == 0, done.stdout
    if (new := sum(each["seconds"] > 0 for each in facts)) > aot_known.AGAIN:
        warnings.warn(f"{new} of {len(facts)} launches were compiled, for minutes: `make aot-known`", stacklevel=1)
    return facts


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(exit status, facts by case and target) of what must be refused."""
    done, facts = run_gate("aot_planted.py", tmp_path_factory.mktemp("aot") / "planted.json")
    assert facts, done.stderr
    return done.returncode, {(each["case"], each["target"]): each for each in facts}


def test_of_a_tile_the_launch_that_does_most_is_compiled(monkeypatch):
    names = ["x_ptr", "BLOCK_M", "DROPOUT", "bias_ptr"]
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="_some_kernel"), arg_names=names)

    def launch(block=16, dropout=False, bias=False, kind="*bf16", warps=4):
        constants = {(1,): block, (2,): dropout} | ({} if bias else {(3,): None})
        return aot.Launch(kernel, {"x_ptr": kind, "BLOCK_M": "constexpr"}, constants, {}, {"num_warps": warps})

    most = launch(dropout=True, bias=True)
    others = [launch(block=32), launch(kind="*fp32"), launch(warps=8)]
    launches = [launch(), launch(bias=True), most, launch(dropout=True), launch(dropout=True, bias=True), *others]
    monkeypatch.setattr(aot, "recorded_launches", lambda run, gpu: run())
    cases = [aot.Case("a case", lambda: launches[:2]), aot.Case("another", lambda: launches[2:])]
    found = aot.work(cases, ["sm_90"], "tile")
    assert [each for each, _, _ in found] == [most, *others]
    assert all(found[0][0] is most and case.name == "another" for _, _, case in found)
    assert len(aot.work(cases, ["sm_80", "sm_90"], "tile")) == 8


def test_every_kernel_is_compiled_for_nvidia_and_amd(shipped):
    assert {"shrink_kernel", "sum_partials_kernel", "sum_many_partials_kernel", "forward_kernel"} < KERNELS
    by_descriptors = {"persistent_tail_kernel"}
    for target, kernels in (("sm_90", KERNELS | by_descriptors), ("gfx942", KERNELS)):
        assert {each["kernel"].split()[0] for each in shipped if each["target"] == target} == kernels


def test_a_sample_is_compiled_whatever_is_known(shipped):
    assert sum(each["seconds"] > 0 for each in shipped) >= aot_known.AGAIN


def test_tiles_travel_by_descriptors(shipped):
    """x, W and the result, on both kinds of tensor cores."""
    found = [each for each in shipped if each["kernel"].startswith("persistent_tail_kernel")]
    assert {each["target"] for each in found} == {"sm_90", "sm_100"}
    assert all(each["descriptors"] == 3 and each["descriptor_copies"] >= 6 for each in found)
    units = {each["target"]: set(each["tensor_core"]) for each in found}
    assert units == {"sm_90": {"wgmma.mma_async"}, "sm_100": {"tcgen05.mma"}}


def test_nothing_spills(shipped):
    assert [each for each in shipped if each["spilled"] or each["stack"]] == []


def test_shared_memory_suffices(shipped):
    assert [each for each in shipped if each["shared"] > aot.TARGETS[each["target"]].shared] == []
    assert any(each["shared"] for each in shipped)


def test_every_matrix_product_runs_on_tensor_cores(shipped):
    sums = {
        "sum_partials_kernel",
        "sum_many_partials_kernel",
        "merge_parts_kernel",
        "grad_query_kernel",
    }  # the last where only δ is wanted
    sums |= {"prepend_kernel", "grad_prompt_kernel", "mixed_sum_kernel", "dora_grad_kernel", "dora_drop_kernel"}
    assert {each["kernel"].split()[0] for each in shipped if not each["tensor_core"]} == sums


def test_the_kernels_that_wait_for_memory_copy_ahead(shipped):
    waiting = ("shrink_kernel", "grad_b_and_t_kernel", "grad_columns_kernel", "mixed_shrink", "mixed_grad_columns")
    waiting += ("shrink_all_kernel", "grad_all_columns_kernel")
    found = [each for each in shipped if each["target"] == "sm_90" and each["kernel"].startswith(waiting)]
    assert found and all(each["async_copies"] >= 6 for each in found)


def test_no_float64_and_no_narrow_address(shipped):
    assert [each for each in shipped if each["float64"] or each["narrow_products"] or each["narrow_offsets"]] == []


REFUSED = {
    "row times stride": "32-bit product",
    "carried by a loop": "32-bit product",
    "chosen by a branch": "32-bit product",
    "one long row": "32-bit index",
    "float64": "float64",
    "fusion not stated": "without enable_fp_fusion",
    "spills": "spills",
    "shared memory": "bytes of shared memory",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_planted_is_refused(planted, case):
    status, facts = planted
    assert status == 1
    (fault,) = {fault.split(":")[0] for fault in facts[case, "sm_90"]["faults"]}
    assert REFUSED[case] in fault


def test_what_is_right_is_not_refused(planted):
    _, facts = planted
    assert facts["in 64 bits", "sm_90"]["faults"] == facts["in 64 bits", "gfx942"]["faults"] == []


def test_amd_is_judged_too(planted):
    _, facts = planted
    for case in ("row times stride", "float64", "shared memory"):
        assert any(REFUSED[case] in fault for fault in facts[case, "gfx942"]["faults"]), case


def test_the_gate_refuses_to_run_in_the_interpreter(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as refused:
        aot.main(["--quick", "--json", str(tmp_path / "none.json")])
    assert refused.value.code == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def _facts(**changes):
    plain = {name: 0 for name in inspect.signature(aot.Facts).parameters}
    plain |= {"target": "sm_90", "warps": 8, "fusion_stated": True, "tensor_core": {"mma.sync": 4}}
    return aot.Facts(**plain | {"narrow_products": [], "narrow_offsets": [], "faults": []} | changes)


PRODUCT = "  %1 = tt.dot %a, %b, %c{} : tensor<16x16x{}> * tensor<16x16x{}> -> tensor<16x16xf32> loc(#loc1)"


@pytest.mark.parametrize(
    ("precision", "dtype", "fault"),
    [("", "bf16", True), (", inputPrecision = tf32", "f32", True), ("", "f32", False)],
)
def test_a_product_without_tensor_cores_is_refused_unless_it_is_of_fp32(precision, dtype, fault):
    ttir = PRODUCT.format(precision, dtype, dtype)
    assert list(aot.faults(_facts(), ttir, True)) == []
    assert bool(list(aot.faults(_facts(tensor_core={}), ttir, True))) is fault


def test_a_block_that_wants_all_registers_is_refused():
    assert list(aot.faults(_facts(registers=255), "", True)) == []
    (fault,) = aot.faults(_facts(registers=255, warps=16), "", True)
    assert fault == "130560 registers in a block, above 65536"


def test_descriptors_that_copy_nothing_are_refused():
    assert list(aot.faults(_facts(descriptors=3, descriptor_copies=8), "", True)) == []
    assert list(aot.faults(_facts(descriptors=3), "", True)) == ["descriptors by which no tile is copied"]


def test_spills_are_only_reported_of_what_is_not_bounded():
    assert list(aot.faults(_facts(spilled=8, stack=8), "", False)) == []
    assert list(aot.faults(_facts(spilled=8), "", True)) == ["spills: 8 spilled, 0 bytes of stack"]


@pytest.mark.parametrize("family", ["interpreter", "hip", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "sm_130"])
def test_every_kernel_has_tiles_in_every_mode_and_rank(family):
    for kernel in _tiles.KERNELS:
        for mode in MODES:
            for rank in (1, 8, 16, 17, 64, 128, 256):
                for dropout in (False, True):
                    tiles = _tiles.tiles_for(kernel, rank, mode, dropout, family)
                    assert tiles.rows >= 16 and (tiles.columns or tiles.depth) >= 16


@pytest.mark.parametrize("family", ["interpreter", "hip", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "sm_130"])
def test_every_kernel_of_attention_has_tiles_in_every_mode_and_head_dimension(family):
    for kernel in _attention_tiles.KERNELS:
        for mode in ("half", "tf32", "ieee"):
            for depth in (16, 32, 64, 128, 256):
                for burdened in (False, True):
                    tiles = _attention_tiles.attention_tiles(kernel, depth, mode, burdened, family)
                    assert min(tiles.queries, tiles.keys, tiles.prefix) >= 16


def test_devices_without_tiles_of_their_own_have_cuda_s():
    ask = ("tail", 16, "half", False)
    assert _tiles.tiles_for(*ask, "sm_89") == _tiles.tiles_for(*ask, "sm_130") != _tiles.tiles_for(*ask, "sm_90")
    assert _tiles.tiles_for(*ask, "interpreter") == _tiles.SMALL


def test_the_modes_are_those_of_the_products():
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    assert {dot_mode(data, adapter) for data in dtypes for adapter in (data, torch.float32)} <= set(MODES)


def test_the_family_of_a_device(monkeypatch):
    device = torch.device("cuda", 0)
    assert _tiles.family_of.__wrapped__(device) == ("interpreter" if _tiles.INTERPRETED else "sm_90")
    monkeypatch.setattr(_tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert _tiles.family_of.__wrapped__(device) == "sm_120"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _tiles.family_of.__wrapped__(device) == "hip"
