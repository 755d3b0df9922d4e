"""What is known of launches is used only for those very launches, and not where a sample contradicts it."""

import importlib
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from tests import aot, aot_known

CASE = aot.Case("a case", lambda: None)


def launch(**changes):
    return SimpleNamespace(**{"key": "types and constants", "kernel": SimpleNamespace(cache_key="sources")} | changes)


def facts(**changes) -> aot.Facts:
    names = dict.fromkeys(aot.Facts.__dataclass_fields__, 0)
    return aot.Facts(**names | {"faults": [], "seconds": 1.5, "tensor_core": {"mma.sync": 4}} | changes)


@pytest.fixture
def gate(monkeypatch):
    """`checked_or_known` with `found`, by number of registers, in place of the compiler: (facts, compiled numbers)."""

    def run(jobs, known, registers=0):
        compiled = []

        def check(jobs, processes):
            compiled.extend(launch.key for launch, *_ in jobs)
            return (facts(registers=registers) for _ in jobs)

        monkeypatch.setattr(aot, "checked", check)
        return list(aot.checked_or_known(jobs, 1, known)), compiled

    return run


JOBS = [(launch(key=f"launch {number}"), "sm_90", CASE) for number in range(40)]
DIGESTS = [aot_known.digest(*job, aot.triton.__version__) for job in JOBS]


def known(digests, **changes) -> dict:
    each = asdict(facts(**changes))
    del each["seconds"]
    return {digest: dict(each, faults=[]) for digest in digests}


def test_a_digest_hangs_on_all_that_the_code_hangs_on(monkeypatch, tmp_path):
    others = [
        (launch(key="other types"), "sm_90", CASE, "3.9.0"),
        (launch(kernel=SimpleNamespace(cache_key="other sources")), "sm_90", CASE, "3.9.0"),
        (launch(), "sm_100", CASE, "3.9.0"),
        (launch(), "sm_90", CASE._replace(name="another"), "3.9.0"),
        (launch(), "sm_90", CASE._replace(bounded=False), "3.9.0"),
        (launch(), "sm_90", CASE, "3.10.0"),
    ]
    digests = {aot_known.digest(launch(), "sm_90", CASE, "3.9.0")} | {aot_known.digest(*each) for each in others}
    for name in aot_known.JUDGES:
        (tmp_path / name).write_text("judges otherwise")
    monkeypatch.setattr(aot_known, "HERE", tmp_path)
    digests.add(aot_known.digest(launch(), "sm_90", CASE, "3.9.0"))
    assert len(digests) == len(others) + 2


KERNEL = """
from triton.runtime.jit import JITFunction
{above}
@JITFunction
def halved(x):
    return x // {by}

@JITFunction
def a_kernel(x):
    return halved(x)
"""


def test_where_in_its_file_a_kernel_stands_is_nothing_to_its_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = {}
    for name, above, by in (("first", "", 2), ("moved", "FOUR = 4\n\n", 2), ("other", "", 3)):
        (tmp_path / f"a_module_with_{name}.py").write_text(KERNEL.format(above=above, by=by))
        module = importlib.import_module(f"a_module_with_{name}")
        module.__name__ = module.a_kernel._fn_name = "one name"
        placed = module.a_kernel.cache_key
        aot.forget_places([module])
        keys[name] = module.a_kernel.cache_key
        assert placed != keys[name]
    assert keys["first"] == keys["moved"] != keys["other"]


def test_all_is_compiled_where_nothing_is_known(gate):
    found, compiled = gate(JOBS, {})
    assert compiled == [job[0].key for job in JOBS] and found == [facts()] * 40


def test_what_is_new_is_compiled_and_of_the_rest_a_sample(gate):
    found, compiled = gate(JOBS, known(DIGESTS[10:]))
    assert compiled[:10] == [job[0].key for job in JOBS[:10]] and len(compiled) == 10 + aot_known.AGAIN
    assert [each.faults for each in found] == [[]] * 40
    assert [each.seconds > 0 for each in found] == [job[0].key in compiled for job in JOBS]


def test_what_is_contradicted_is_a_fault(gate):
    found, compiled = gate(JOBS, known(DIGESTS), registers=255)
    fault = ["registers is 255, known as 0"]
    assert [each.faults for each in found] == [fault if job[0].key in compiled else [] for job in JOBS]
    assert len(compiled) == aot_known.AGAIN


def test_a_fault_that_is_known_is_one(gate):
    found, _ = gate(JOBS[:1], {DIGESTS[0]: known(DIGESTS[:1])[DIGESTS[0]] | {"faults": ["spills"]}})
    assert "spills" in found[0].faults or "known as ['spills']" in found[0].faults[0]


def test_the_sample_is_another_when_a_launch_is():
    samples = {frozenset(aot_known.compiled_again([*DIGESTS, other])) for other in ("a", "b", "c", "d")}
    assert len(samples) > 1 and {len(each) for each in samples} == {aot_known.AGAIN}


def test_what_is_saved_is_loaded(tmp_path):
    aot_known.save({"b": facts(registers=2), "a": facts()}, tmp_path / "known.json")
    assert aot_known.load(tmp_path / "known.json") == known(["a"]) | known(["b"], registers=2)
    assert (tmp_path / "known.json").read_text().count("\n") == 4


@pytest.mark.parametrize("also", [["--op", "lora_linear"], ["--target", "sm_90"], ["--known"]])
def test_a_part_is_not_written_down_as_the_whole(also, capsys):
    with pytest.raises(SystemExit):
        aot.main(["--quick", "--update", *also])
    assert "--update writes down the whole quick set" in capsys.readouterr().err


def test_what_is_wrong_is_not_written_down(monkeypatch, capsys):
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(aot, "work", lambda *_: [(launch(name="a kernel"), "sm_90", CASE)])
    monkeypatch.setattr(aot, "checked", lambda *_: iter([facts(target="sm_90", faults=["spills"])]))
    monkeypatch.setattr(aot_known, "save", lambda *_: pytest.fail("written"))
    assert aot.main(["--quick", "--update"]) == 1
    assert "spills" in capsys.readouterr().out
