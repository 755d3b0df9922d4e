"""Patterns from configurations: the answers of `re`, in bounded time, and words for what is not supported."""

import itertools
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastpeft.errors import ConfigError
from fastpeft.patterns import (
    MAX_EXPRESSIONS,
    MAX_LENGTH,
    MAX_PATTERNS,
    in_bounded_time,
    layer_index,
    matches_name,
    matches_tail,
    pattern_problem,
    patterns_problem,
)

ATOMS = ["a", "b", "1", "_", r"\.", ".", "[ab]", "[^a.]", "[a-z1]", r"[\d_]", r"\d", r"\D", r"\w", r"\W", r"\s", "[^b]"]
ANCHORS = ["^", "$", r"\A", r"\Z", r"\b", r"\B"]
REPEATS = ["*", "+", "?", "{2}", "{0,2}", "{1,}", "{,3}", "*?", "+?", "??"]


def bigger(smaller):
    group = smaller.map(lambda p: f"(?:{p})")
    return st.one_of(
        st.lists(smaller, min_size=2, max_size=4).map("".join),
        st.lists(smaller, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(group, st.sampled_from(REPEATS)).map("".join),
        st.tuples(st.sampled_from(["(?=", "(?!"]), smaller).map(lambda pair: f"{pair[0]}{pair[1]})"),
        st.tuples(st.sampled_from(["(?<=", "(?<!"]), st.sampled_from(ATOMS)).map(lambda pair: f"{pair[0]}{pair[1]})"),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS + ANCHORS), bigger, max_leaves=12)
NAMES = st.text("ab1_.", min_size=1, max_size=9)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, NAMES)
@example("(a*|b)", "ab")  # what one branch reaches is no start for the next
@example("(?:a|b){2}", "ab")
@example("(?:(?:a?b)*1)*", "ab1bb1")
def test_matches_as_re_does(pattern, name):
    assert pattern_problem(pattern) is None
    assert matches_name(pattern, name) is (re.fullmatch(pattern, name) is not None)
    assert matches_tail(pattern, name) is (re.match(rf"(.*\.)?({pattern})$", name) is not None)


LEAVES = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.experts.3.w1"]
PATHS = [f"{tower}.layers.{i}.{leaf}" for tower in ("model", "vision_model") for i in (0, 1, 12) for leaf in LEAVES]

# As unsloth and ms-swift write them into adapter_config.json for multimodal models.
IN_DAILY_USE = [
    r"(?:.*?(?:vision|image|visual|patch|language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn)\.(?:(?:q_proj|k_proj)))",
    r"^(model(?=\.).*\.(q_proj|gate_proj))$",
    r"^(?!.*(?:vision|visual)).*(?:q_proj|v_proj).*",
    r".*\.layers\.(?:[0-9]|1[0-1])\..*_proj",
]


@pytest.mark.parametrize("pattern", IN_DAILY_USE)
def test_patterns_in_daily_use(pattern):
    expected = [path for path in PATHS if re.fullmatch(pattern, path)]
    assert 0 < len(expected) < len(PATHS) or pattern is IN_DAILY_USE[0]
    assert [path for path in PATHS if matches_name(pattern, path)] == expected


@pytest.mark.parametrize("pattern", ["layers", "model.layers", "h", "(?:vision_)?model.layers", "l.*s", "experts"])
def test_layer_index_is_that_of_re(pattern):
    for path in PATHS:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)
        assert layer_index(pattern, path) == (int(found["idx"]) if found else None), path


HOSTILE = [
    "(a+)+$",
    "(a|a)*$",
    "(.*a){25}$",
    ".*" * 30 + "x",
    ".*" * (MAX_LENGTH // 2),
    "(?:(?=.*x)|.)*" * 140,
    "(?:.?" * 15 + ")*" * 15,
    "((((((((.+.)+.)+.)+.)+.)+.)+.)+.)+x",
    "(?:.|..|...)*" * 150,
    "a?" * 28 + "a" * 28,
    "(?:a{0,9999}){9999}x",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_no_pattern_hangs(pattern):
    assert pattern_problem(pattern) is None
    start = time.perf_counter()
    for match in (matches_name, matches_tail):
        try:
            match(pattern, "a" * 27 + "!")
        except ConfigError as error:
            assert "takes more than 0.4 s on the module name 'aaa" in str(error) and "list the names" in str(error)
    assert time.perf_counter() - start < 10


def test_a_hostile_pattern_is_given_up():
    with pytest.raises(ConfigError, match="takes more than 0.4 s on the module name 'aaa.*'; simplify it, or list"):
        matches_name("(a|a)*$", "a" * 27 + "!")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "not a regular expression"),
        ("*", "not a regular expression"),
        ("[z-a]", "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        ("(" * 999 + ")" * 999, "too deep"),
        ("a" * (MAX_LENGTH + 1), f"the pattern has {MAX_LENGTH + 1} characters, more than {MAX_LENGTH}"),
    ],
)
def test_what_is_not_supported_is_said(pattern, words):
    assert words in pattern_problem(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(?:" * 100 + "a|b" + f"|c){repeat}" * 100 for repeat in ("+", "{1,}", "{2}", "+?", "{3,4}")),
        *("(?:" * depth + "a" + f"b){repeat}" * depth for depth, repeat in ((16, "{2}"), (4, "{99}"), (3, "{900}"))),
        "(?=" * 20 + "(?:ab){2}" + "){1}(?:ab){2000}" * 20,
        "(((" + "(a|b){9}" * 9 + "){9}){9}){9}",
    ],
    ids=range(10),
)
def test_what_fills_the_memory_when_it_is_compiled_is_refused(pattern):
    start = time.process_time()
    assert "repeats, written out, have" in pattern_problem(pattern)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern", [r"(?:a{9}){9}", r"(?:\d{1,3}\.){3}", r".*\.[\d]{1,}\..*", "a{9999}", "(?:a|b)*" * 99]
)
def test_repeats_in_daily_use_are_not(pattern):
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("(?:q_prok){e<=1}", "q_proj"), ("a{i<=3}", "abbb"), ("a{e}", "b"), ("a{1<=e<=3}b", "accb"), ("a{}", "a")],
)
def test_braces_that_only_one_of_the_two_libraries_reads_as_text_are_refused(pattern, name):
    assert "braces that count nothing" in pattern_problem(pattern)
    assert re.fullmatch(pattern, name) is None


@pytest.mark.parametrize("pattern", [r"\{a\}", "[{e}]", r"a{2}", r"a{2,}", r"a{2,3}", r"a{,3}", r"[\]{]a{2}"])
def test_braces_that_both_read_alike_are_not(pattern):
    assert pattern_problem(pattern) is None
    for name in ("{a}", "{", "e", "aa", "aaa", "{aa", "]aa"):
        assert matches_name(pattern, name) is (re.fullmatch(pattern, name) is not None)


PLAIN = ["a", ".", "a.b", r"a\.b", "^a", "a$", r"^a\.b$", "b.a", "a-b", "a.", ".a", "..", r"\.a", "^", "^.$", "x_1.b"]


@pytest.mark.parametrize("pattern", PLAIN)
def test_names_are_matched_as_expressions_are(pattern):
    for length in range(1, 6):
        for letters in itertools.product("ab.-", repeat=length):
            name = "".join(letters)
            assert matches_tail(pattern, name) is (re.match(rf"(.*\.)?({pattern})$", name) is not None), name


def test_all_matches_of_a_configuration_together_have_the_time_of_one():
    slow, names = "(?:.|.){19}[A-Z]", [f"model.layers.{i}.self_attn.q_proj" for i in range(200)]
    assert not matches_name(slow, names[0])
    start = time.process_time()
    with (
        pytest.raises(ConfigError, match="takes more than 0.4 s on the module name .* and those before it"),
        in_bounded_time(),
    ):
        for name in names:
            matches_name(slow, name)
    assert time.process_time() - start < 1.5
    with in_bounded_time():
        for name in names * 100:
            assert not matches_name(r".*\.layers\.(?:[0-9]|1[0-1])\..*k_proj", name)
    assert not matches_name(slow, names[0])


def test_there_may_be_many_names_and_few_expressions():
    assert patterns_problem([f"layers.{i}" for i in range(MAX_PATTERNS)]) is None
    assert patterns_problem([f"layers.*{i}" for i in range(MAX_EXPRESSIONS)]) is None
    assert "more than" in patterns_problem([f"layers.{i}" for i in range(MAX_PATTERNS + 1)])
    assert "more than" in patterns_problem([f"layers.*{i}" for i in range(MAX_EXPRESSIONS + 1)])
    assert patterns_problem([f"(?:a{i}){{9000}}" for i in range(1)]) is None
    assert "parts, more than" in patterns_problem([f"(?:a{i}){{9000}}" for i in range(2)])
