"""Tables of measured choices: where they are looked for, which is believed, and that a bad file never ends a step."""

import json
import logging
import multiprocessing
import os
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastpeft import dispatch, reporting, table_file, tables
from fastpeft.kernels import _attention_tiles, _tiles
from fastpeft.plans import Plan
from fastpeft.table_file import AttentionTileBucket, Entry, Table, TableError, TileBucket
from tests.ops.prefix_attention_cases import problem

ROOT = Path(__file__).resolve().parents[1]
GPU, NAME = torch.device("cuda", 0), "Test GPU 80GB"
HALF, FULL = torch.bfloat16, torch.float32
BUCKET = tables.lora_bucket(HALF, FULL, 8192, 4096, 4096, 16, 0.0)
TILES = TileBucket("shrink", 16, "half", False)
OTHER = {"rows": 128, "columns": 0, "depth": 64, "ranks": 16, "warps": 8, "stages": 3}  # a candidate on sm_90


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device of that name on sm_90, an empty cache of the user's and nothing that ships; yields the cache."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_tiles, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: None)
    monkeypatch.setattr(tables, "SHIPPED", str(tmp_path / "shipped"))
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path / "cache"))
    _tiles.family_of.cache_clear()
    tables.forget()
    yield tmp_path / "cache"
    tables.forget()
    _tiles.adopt(GPU, None)
    _tiles.family_of.cache_clear()


def entry(bucket=BUCKET, choice=None, day="2026-02-03"):
    return Entry(bucket, choice or {"forward": "augment", "backward": "addmm"}, {"a": 1.5, "b": 2}, False, day, {})


def table(*entries, **changes):
    stamp = dict(device=NAME, family="sm_90", torch="2", date="2026-02-03", commit="", triton=tables.triton_version())
    return Table(**stamp | {"kernels": tables.kernels_digest()} | changes, entries=entries)


def lora_plan(rows=8192, columns=4096, outputs=4096, rank=16, dropout=0.0, adapter=FULL):
    return dispatch.lora_linear_plan_for(GPU, HALF, adapter, (rows, columns, outputs, rank), dropout)


def test_what_is_written_is_read(tmp_path):
    prefix = tables.prefix_bucket(*problem(dtype=HALF)[:2], 0.0)
    written = table(
        entry(), entry(prefix, {"forward": "decode", "backward": "fused"}), entry(TILES, OTHER),
        entry(AttentionTileBucket("decode", 128, "half", True), _attention_tiles.SMALL._asdict()),
    )  # fmt: skip
    assert table_file.write(str(tmp_path / "new" / "t.json"), written) == written
    assert table_file.read(str(tmp_path / "new" / "t.json")) == written
    assert os.listdir(tmp_path / "new") == ["t.json"]


def test_a_measured_choice_comes_before_the_rules(gpu):
    assert lora_plan() == dispatch.PREWRITE
    table_file.write(str(gpu / "t.json"), table(entry()))
    assert lora_plan() == dispatch.PREWRITE, "read once"
    tables.forget()
    assert lora_plan() == Plan("augment", "addmm", f"measured on {NAME}, 2026-02-03")


def test_a_measured_choice_may_say_how_often_dy_is_read(gpu):
    table_file.write(str(gpu / "t.json"), table(entry(choice={"forward": "addmm", "backward": "addmm", "reads": 2})))
    assert lora_plan() == Plan("addmm", "addmm", f"measured on {NAME}, 2026-02-03", reads=2)


def test_a_bucket_is_of_sizes_near_and_of_nothing_else(gpu):
    table_file.write(str(gpu / "t.json"), table(entry()))
    for near in ({"rows": 7000}, {"columns": 5120}, {"outputs": 3000}, {"rank": 8}, {"rank": 1}):
        assert lora_plan(**near).forward == "augment", near
    for far in (
        {"rows": 4096},
        {"columns": 14336},
        {"outputs": 1024},
        {"rank": 17},
        {"dropout": 0.1},
        {"adapter": HALF},
    ):
        assert lora_plan(**far) == dispatch.PREWRITE, far
    assert lora_plan(rows=8) == dispatch.SHORT


@pytest.mark.parametrize(("size", "power"), [(0, 0), (1, 1), (3, 4), (5, 4), (14336, 16384), (11008, 8192)])
def test_sizes_are_rounded_to_the_nearest_power_of_two(size, power):
    assert tables.power_of_two(size) == power


def test_the_plan_that_is_given_comes_before_the_user_s_table_and_that_before_the_shipped(gpu):
    shipped = table(entry(), entry(BUCKET._replace(M=1024)))
    table_file.write(os.path.join(tables.SHIPPED, "a.json"), shipped)
    assert lora_plan().forward == "augment"
    table_file.write(
        str(gpu / "a.json"), table(entry(choice={"forward": "fused", "backward": "fused"}), date="2020-01-01")
    )
    tables.forget()
    assert (lora_plan().forward, lora_plan(rows=1024).forward) == ("fused", "augment")
    with dispatch.override_plan(Plan("addmm", "addmm", "a test's")):
        assert lora_plan().source == "a test's"


class OnGpu(torch.Tensor):
    is_cuda = True
    device = GPU


@pytest.mark.parametrize("shape", [(8192, 4096), (2, 4096, 4096)])
def test_a_call_s_bucket_is_of_its_tensors(gpu, shape):
    """Forward asks with x (..., K), a compiled backward with dY [M, N]; both with A and B."""
    table_file.write(str(gpu / "t.json"), table(entry(BUCKET._replace(N=1024))))
    a, b = torch.empty(16, 4096, device="meta"), torch.empty(1024, 16, device="meta")
    x, fewer = (torch.empty(size, device="meta").as_subclass(OnGpu) for size in (shape, (1, *shape[1:])))
    assert dispatch.lora_linear_plan(x, HALF, a, b, 0.0).forward == "augment"
    assert dispatch.lora_linear_plan(fewer, HALF, a, b, 0.0).forward != "augment"
    assert dispatch.lora_linear_plan(x, HALF, a, b, 0.1) == dispatch.PREWRITE


def prefix_plan(case, **options):
    tensors = case.tensors._replace(q_BHSD=case.tensors.q_BHSD.as_subclass(OnGpu))
    with dispatch.backend("triton"):
        return dispatch.prefix_attention_plan(tensors, case.scores, case.dropout, **options)


def case_of(*modifiers, **changes):
    return problem(*modifiers, **{"dtype": HALF, "depth": 16, "queries": 300, "heads": 2, "kv_heads": 1} | changes)


def store(gpu, case, forward):
    bucket = tables.prefix_bucket(case.tensors, case.scores, case.dropout)
    backward = "fused" if forward == "decode" else forward
    table_file.write(str(gpu / "t.json"), table(entry(bucket, {"forward": forward, "backward": backward})))
    tables.forget()


def test_attention_asks_the_table_first(gpu):
    case = case_of()
    assert prefix_plan(case) == dispatch.ATTENTION_MERGE
    store(gpu, case, "concat")
    assert prefix_plan(case) == Plan("concat", "concat", f"measured on {NAME}, 2026-02-03")
    assert prefix_plan(case, gated=True) == dispatch.ATTENTION_MERGE, "it was not measured"
    assert prefix_plan(case_of("window")).forward == "fused", "another bucket: modified"
    assert prefix_plan(case_of(queries=600)) == dispatch.ATTENTION_MERGE


def test_a_measured_strategy_that_cannot_serve_the_call_leaves_it_to_the_rules(gpu):
    for modifiers, forward in (((), "decode"), (("window",), "merge"), (("dropout",), "concat")):
        case = case_of(*modifiers)
        store(gpu, case, forward)
        assert prefix_plan(case) == dispatch.predicted_attention_plan(
            case.tensors._replace(q_BHSD=case.tensors.q_BHSD.as_subclass(OnGpu)), case.scores, case.dropout
        ), forward
    one = case_of("cached", queries=1)
    store(gpu, one, "fused")
    assert prefix_plan(one).source.startswith("measured")


def test_nothing_is_read_for_the_interpreter(gpu, monkeypatch):
    monkeypatch.setattr(tables, "measured", lambda device: pytest.fail("a table was asked for"))
    cpu = torch.device("cpu")
    assert dispatch.lora_linear_plan_for(cpu, HALF, HALF, (64, 64, 64, 8), 0.0) == dispatch.FUSED
    monkeypatch.setattr(_tiles, "INTERPRETED", True)
    _tiles.family_of.cache_clear()
    tables.adopt_tiles(GPU, "measured", [entry(TILES, OTHER)])
    assert _tiles.table_of(GPU) == "interpreter"


def shrink_tiles(rank=16, dropout=False):
    return _tiles.tiles_for("shrink", rank, "half", dropout, _tiles.table_of(GPU))


def test_measured_tiles_stand_before_the_predicted(gpu):
    predicted = {case: shrink_tiles(*case) for case in ((16,), (8,), (17,), (64,), (16, True))}
    decode = AttentionTileBucket("decode", 128, "half", True)
    few = _attention_tiles.AttentionTiles(16, 64)._asdict()
    table_file.write(str(gpu / "t.json"), table(entry(TILES, OTHER), entry(decode, few)))
    lora_plan()
    assert shrink_tiles(16) == shrink_tiles(8) == _tiles.Tiles(**OTHER) != predicted[16,]
    for case in ((17,), (64,), (16, True)):
        assert shrink_tiles(*case) == predicted[case]
    family = _tiles.table_of(GPU)
    assert _attention_tiles.attention_tiles(*decode, family)._asdict() == few
    assert _attention_tiles.attention_tiles("decode", 64, "half", True, family) == _attention_tiles.attention_tiles(
        "decode", 64, "half", True, "sm_90"
    )
    assert _tiles.table_of(torch.device("cuda", 1)) == "sm_90", "another device of the family keeps its own"


@pytest.mark.parametrize("stale", [{"triton": "1.0"}, {"kernels": "0" * 64}, {"kernels": ""}])
def test_tiles_are_for_their_triton_and_their_kernels(gpu, stale):
    before = shrink_tiles()
    table_file.write(str(gpu / "t.json"), table(entry(TILES, OTHER), entry(), **stale))
    assert lora_plan().forward == "augment", "strategies outlive a compiler"
    assert shrink_tiles() == before


def test_the_digest_is_of_the_sources(monkeypatch, tmp_path):
    import fastpeft.kernels

    before = tables.kernels_digest.__wrapped__()
    for path in (ROOT / "kernels").glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(fastpeft.kernels, "__path__", [str(tmp_path)])
    assert tables.kernels_digest.__wrapped__() == before, "not of where they are"
    with open(tmp_path / "lora_linear.py", "a") as source:
        source.write("# one more line\n")
    assert tables.kernels_digest.__wrapped__() != before


def test_tiles_that_the_compile_gate_has_not_seen_are_not_used(gpu):
    before = shrink_tiles()
    table_file.write(str(gpu / "t.json"), table(entry(TILES, OTHER | {"rows": 1024}), entry()))
    with pytest.warns(UserWarning, match="1 measured tiles are no candidates on sm_90"):
        lora_plan()
    assert shrink_tiles() == before and lora_plan().forward == "augment"


def test_candidates_begin_with_what_is_predicted():
    found = _tiles.candidates("shrink", 16, "half", False, "sm_90")
    assert found[0] == _tiles.tiles_for("shrink", 16, "half", False, "sm_90") and _tiles.Tiles(**OTHER) in found
    assert len(_tiles.candidates("shrink", 16, "half", False, "sm_89")) == 1, "a family that is not compiled for"
    assert _tiles.measured_row("sum_partials", 16, "half", False, OTHER, "sm_90") is None
    assert _tiles.measured_row("shrink", 17, "half", False, OTHER, "sm_90") is None


def test_another_device_s_table_is_passed_over_without_a_word(gpu):
    table_file.write(str(gpu / "t.json"), table(entry(), device="Some other GPU"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lora_plan() == dispatch.PREWRITE


GOOD = table(entry(), entry(TILES, OTHER)).as_json()


def broken(*path, value):
    document = json.loads(json.dumps(GOOD))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document)


HOSTILE = {
    "empty": ("", "not valid JSON"),
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[]", "must be a JSON object"),
    "deep": ('{"a":' * 4000 + "1" + "}" * 4000, "nested"),
    "huge": (json.dumps(GOOD) + " " * (5 << 20), "longer than"),
    "schema": (broken("schema", value=2), "schema is 2"),
    "schema true": (broken("schema", value=True), "schema is True"),
    "device": (broken("device", value=None), "device is None"),
    "control characters": (broken("device", value="\x1b[2J"), "device is"),
    "date": (broken("date", value="yesterday"), "date is 'yesterday'"),
    "entries": (broken("entries", value={}), "entries are {}"),
    "an entry": (broken("entries", 0, value=3), "entry 0: 3 is no object"),
    "op": (broken("entries", 0, "op", value="rm"), "op is 'rm'"),
    "op of a type": (broken("entries", 0, "op", value=["tiles"]), "op is"),
    "source": (broken("entries", 0, "source", value="guessed"), "source is 'guessed'"),
    "strategy": (broken("entries", 0, "choice", "forward", value="fastest"), "forward is 'fastest'"),
    "strategy of a type": (broken("entries", 0, "choice", "forward", value=[]), "forward is []"),
    "size": (broken("entries", 0, "bucket", "M", value=-1), "M is -1"),
    "size true": (broken("entries", 0, "bucket", "M", value=True), "M is True"),
    "dtype": (broken("entries", 0, "bucket", "dtype", value="nn"), "dtype is 'nn'"),
    "bucket": (broken("entries", 0, "bucket", value={}), "bucket is {}"),
    "median": (broken("entries", 0, "median_ms", value={"a": "fast"}), "median_ms is"),
    "median 0": (broken("entries", 0, "median_ms", value={"a": 0}), "not above 0"),
    "confirmed": (broken("entries", 0, "confirmed", value=1), "confirmed is 1"),
    "choice": (broken("entries", 0, "choice", value={"forward": "prewrite"}), "forward and backward are needed"),
    "reads": (broken("entries", 0, "choice", "reads", value=3), "reads is 3"),
    "fields of a tile": (broken("entries", 1, "choice", value={"warps": 8}), "are needed"),
    "tile": (broken("entries", 1, "choice", "warps", value="8"), "warps is '8'"),
    "tile huge": (broken("entries", 1, "choice", "rows", value=1 << 30), "rows is"),
    "mode": (broken("entries", 1, "bucket", "mode", value="double"), "mode is 'double'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_table_is_left_out_with_one_warning(kind, gpu):
    text, reason = HOSTILE[kind]
    gpu.mkdir()
    (gpu / "bad.json").write_text(text)
    table_file.write(str(gpu / "good.json"), table(entry()))
    with pytest.warns(UserWarning) as caught:
        assert lora_plan().forward == lora_plan(rows=8000).forward == "augment", "the good one is read"
    (warning,) = caught
    assert "bad.json is left out" in str(warning.message) and reason in str(warning.message)
    assert len(str(warning.message)) < 600


def test_what_is_hostile_by_its_kind(gpu, tmp_path):
    gpu.mkdir()
    (gpu / "loop.json").symlink_to(gpu / "loop.json")
    (gpu / "away.json").symlink_to("/etc/passwd")
    (gpu / "folder.json").mkdir()
    os.mkfifo(gpu / "pipe.json")
    with pytest.warns(UserWarning) as caught:
        assert lora_plan() == dispatch.PREWRITE
    named = sorted(str(w.message).split(" is left out")[0].rsplit("/", 1)[-1] for w in caught)
    assert named == ["away.json", "folder.json", "loop.json", "pipe.json"]


def test_a_cache_that_is_a_file_or_too_full(gpu):
    gpu.write_text("")
    assert lora_plan() == dispatch.PREWRITE
    gpu.unlink()
    gpu.mkdir()
    for number in range(tables.MAX_FILES + 1):
        (gpu / f"{number:03d}.json").write_text(json.dumps(table(device="Some other GPU").as_json()))
    tables.forget()
    with pytest.warns(UserWarning, match="holds 101 files"):
        assert lora_plan() == dispatch.PREWRITE


def test_where_warnings_are_errors_a_step_goes_on(gpu, caplog):
    gpu.mkdir()
    (gpu / "bad.json").write_text("?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lora_plan() == dispatch.PREWRITE
    assert "bad.json is left out" in caplog.text


def test_an_unknown_gpu_is_told_once_that_it_can_be_measured(gpu, caplog):
    caplog.set_level(logging.INFO, "fastpeft")
    for _ in range(3):
        assert lora_plan() == dispatch.PREWRITE
    (line,) = [each.getMessage() for each in caplog.records if "fastpeft tune" in each.getMessage()]
    assert NAME in line


def test_where_the_user_s_tables_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FASTPEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert tables.user_directory() == str(tmp_path / ".cache/fastpeft")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert tables.user_directory() == str(tmp_path / ".cache/fastpeft")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tables.user_directory() == str(tmp_path / "xdg/fastpeft")
    monkeypatch.setenv("FASTPEFT_CACHE", "~/mine")
    assert tables.user_directory() == str(tmp_path / "mine")
    assert tables.file_name("NVIDIA H100 80GB HBM3/../x") == "nvidia-h100-80gb-hbm3-x.json"


def test_a_later_table_keeps_what_it_does_not_know(tmp_path):
    path = str(tmp_path / "t.json")
    other = entry(BUCKET._replace(M=1))
    table_file.write(path, table(entry(), entry(TILES, OTHER)))
    assert table_file.write(path, table(other)).entries == (entry(), entry(TILES, OTHER), other)
    newer = entry(choice={"forward": "fused", "backward": "fused"})
    assert table_file.write(path, table(newer)).entries == (entry(TILES, OTHER), other, newer)
    assert table_file.write(path, table(other, triton="9")).entries == (newer, other), "tiles of another Triton go"


@pytest.mark.parametrize("text", ["my notes", json.dumps(table(entry(), device="Some other GPU").as_json())])
def test_a_file_that_is_something_else_is_not_written_over(text, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="t.json is (a table of|not valid)"):
        table_file.write(str(path), table(entry()))
    assert path.read_text() == text and os.listdir(tmp_path) == ["t.json"]


def _write(path, first, both):
    both.wait(30)
    for rows in range(first, 40, 2):
        table_file.write(path, table(entry(BUCKET._replace(M=rows))))


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    """They are forked, so that they begin together and not when each has imported torch."""
    path, context = str(tmp_path / "t.json"), multiprocessing.get_context("fork")
    both = context.Barrier(2)
    writers = [context.Process(target=_write, args=(path, first, both)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    seen, end = 0, time.monotonic() + 60
    while any(writer.is_alive() for writer in writers) and time.monotonic() < end:
        if (found := table_file.read(path)) is not None:  # whole at every moment
            assert len(found.entries) >= seen
            seen = len(found.entries)
    for writer in writers:
        writer.kill()  # if it hangs
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(each.bucket.M for each in table_file.read(path).entries) == list(range(40))
    assert os.listdir(tmp_path) == ["t.json"]


def test_threads_that_come_at_once_read_once(gpu, monkeypatch):
    table_file.write(str(gpu / "t.json"), table(entry()))
    reads, found, start = [], [], threading.Barrier(8)
    read = tables.read
    monkeypatch.setattr(tables, "read", lambda *arguments: reads.append(1) or read(*arguments))

    def ask():
        start.wait()
        found.append(lora_plan().forward)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["augment"] * 8 and len(reads) == 1


def test_after_the_first_call_nothing_but_a_look_up_is_left(gpu, monkeypatch):
    table_file.write(str(gpu / "t.json"), table(entry()))
    lora_plan()
    for name in ("_load", "_all_tables", "read", "triton_version"):
        monkeypatch.setattr(tables, name, lambda *_: pytest.fail("more than a look-up"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: pytest.fail("more than a look-up"))
    assert lora_plan().forward == "augment" and lora_plan(rows=1) == dispatch.SHORT


def test_report_says_what_was_measured_where(gpu):
    case = case_of()
    assert reporting._sources(GPU) == "predicted"
    store(gpu, case, "concat")
    assert reporting._sources(GPU) == f"measured on {NAME}, 2026-02-03; else predicted"


@pytest.mark.parametrize("bad", ["measured", "nothing"])
def test_a_table_error_is_a_refusal(bad):
    with pytest.raises(TableError, match="schema"):
        table_file.parsed({"schema": bad})
