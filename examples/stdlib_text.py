"""Two small labelled tasks out of the sources that ship with Python; nothing is downloaded.

    topics  the first paragraph of a docstring     -> which part of the standard library it is from   (SEQ_CLS)
    roles   the words of a function's source code  -> what each name and literal does there           (TOKEN_CLS)

Whole files are held out, the same for both tasks, and a text that occurs twice is kept once, for the test: nothing that
is tested was seen in training. Which files there are depends on the Python.
"""

import ast
import functools
import hashlib
import io
import keyword
import re
import sysconfig
import tokenize
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOPICS = {
    "network": "email http urllib smtplib ftplib imaplib poplib socket socketserver ssl xmlrpc mailbox ipaddress "
    "wsgiref nntplib telnetlib cgi netrc webbrowser",
    "concurrency": "asyncio concurrent multiprocessing threading _threading_local queue sched subprocess selectors",
    "numbers": "_pydecimal fractions statistics random numbers datetime _pydatetime calendar colorsys zoneinfo "
    "_strptime bisect heapq secrets",
    "files": "pathlib shutil tempfile zipfile tarfile gzip bz2 lzma os posixpath ntpath genericpath glob fnmatch "
    "filecmp fileinput _pyio dbm shelve pickle csv configparser plistlib stat wave tomllib json",
    "testing": "unittest doctest pdb bdb cmd trace timeit profile pstats cProfile tracemalloc traceback logging "
    "warnings",
    "language": "ast dis inspect importlib tokenize symtable typing types code codeop compileall pkgutil zipimport "
    "pyclbr modulefinder abc _py_abc dataclasses enum functools ctypes opcode copy weakref collections contextlib",
}
ROLES = ("keyword", "parameter", "argument", "call", "attribute", "assigned", "variable", "string", "number")
UNLABELLED = -100  # what transformers' losses leave out

FEWEST_WORDS, MOST_WORDS = 6, 24  # of a docstring
FEWEST_TOKENS, MOST_TOKENS, MOST_LINES = 12, 40, 20  # of a function
MOST_CHARACTERS = 20  # of a token
TEXTS_PER_FILE, FUNCTIONS_PER_FILE = 40, 12  # so that no topic is one file's
TRAIN_PER_TOPIC, TEST_PER_TOPIC = 250, 60
TRAIN_FUNCTIONS, TEST_FUNCTIONS = 1000, 150
HELD_OUT = 0.2  # of each topic's docstrings, about


class Example(NamedTuple):
    """A text with its class, or words with a class for each (UNLABELLED: none)."""

    source: str
    text: str | list[str]
    label: int | list[int]


class Task(NamedTuple):
    """What is to be learnt, and how it is asked for in transformers and in fastpeft."""

    name: str
    question: str
    task_type: str
    auto_class: str
    classes: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    batch: int  # examples in a step

    def majority(self) -> float:
        """The accuracy of always answering with the class that is most frequent in training."""
        (answer, _), *_ = Counter(labels_of(self.train)).most_common(1)
        wanted = labels_of(self.test)
        return wanted.count(answer) / len(wanted)


def labels_of(examples: list[Example]) -> list[int]:
    """All labels that count, in order."""
    every = (e.label if isinstance(e.label, list) else [e.label] for e in examples)
    return [label for labels in every for label in labels if label != UNLABELLED]


class Source(NamedTuple):
    """A file of the standard library."""

    name: str
    topic: int
    code: str
    tree: ast.Module


def sources() -> list[Source]:
    """The files of all topics, in an order that is given by the hash of their names."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for topic, modules in enumerate(TOPICS.values()):
        for module in modules.split():
            for path in [root / f"{module}.py", *(root / module).rglob("*.py")]:
                name = path.relative_to(root).as_posix()
                if path.is_file() and "/test" not in name:
                    code = path.read_text("utf-8")
                    found.append(Source(name, topic, code, ast.parse(code)))
    return sorted(found, key=lambda source: hashlib.sha256(source.name.encode()).digest())


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Its nodes as `ast.walk` has them, without what is inside expressions, most of them."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        inner = ast.iter_child_nodes(node)
        waiting.extend(each for each in inner if not isinstance(each, ast.expr | ast.arguments))


@functools.cache
def paragraphs(source: Source) -> list[str]:
    """The first paragraph of every docstring of a file, without repetitions."""
    found = []
    for node in statements(source.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
            if len(words) >= FEWEST_WORDS and words[0] != ">>>":
                found.append(" ".join(words[:MOST_WORDS]))
    return list(dict.fromkeys(found))[:TEXTS_PER_FILE]


def held_out(files: list[Source]) -> set[str]:
    """The names of the files to test with: of each topic the first that hold their share of its docstrings."""
    counts = {source.name: len(paragraphs(source)) for source in files}
    names = set()
    for topic in range(len(TOPICS)):
        of_topic = [source.name for source in files if source.topic == topic]
        wanted, taken = HELD_OUT * sum(counts[name] for name in of_topic), 0
        for name in of_topic:
            if taken >= wanted:
                break
            names.add(name)
            taken += counts[name]
    return names


def unseen(examples: list[Example], seen: set[tuple[str, ...]]) -> Iterator[Example]:
    """Those whose words are not in `seen` yet, into which they go."""
    for example in examples:
        text = example.text if isinstance(example.text, str) else " ".join(example.text)
        key = tuple(re.findall(r"\w+", text.lower()))
        if key not in seen:
            seen.add(key)
            yield example


def split(examples: list[Example], tested: set[str]) -> tuple[list[Example], list[Example]]:
    """(train, test) without a text in both, or twice in one."""
    seen = set()
    test = list(unseen([example for example in examples if example.source in tested], seen))
    train = list(unseen([example for example in examples if example.source not in tested], seen))
    return train, test


def at_most(count: int, examples: list[Example]) -> list[Example]:
    """The first `count` of each topic."""
    met = Counter()
    return [example for example in examples if met.update([example.label]) or met[example.label] <= count]


def topics_task(files: list[Source], tested: set[str]) -> Task:
    examples = [Example(source.name, text, source.topic) for source in files for text in paragraphs(source)]
    train, test = split(examples, tested)
    train, test = at_most(TRAIN_PER_TOPIC, train), at_most(TEST_PER_TOPIC, test)
    question = "which part of the library is this text about?"
    auto_class = "AutoModelForSequenceClassification"
    return Task("topics", question, "SEQ_CLS", auto_class, tuple(TOPICS), train, test, 16)


def roles(tree: ast.AST) -> dict[tuple[int, int], str]:
    """(line, column) of every name in it whose role the syntax tree tells -> that role."""
    found, called = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called.add(id(node.func))
        if isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.keyword) and node.arg:
            found[node.lineno, node.col_offset] = "argument"
        elif isinstance(node, ast.Name):
            role = "assigned" if isinstance(node.ctx, ast.Store) else "variable"
            found[node.lineno, node.col_offset] = "call" if id(node) in called else role
        elif isinstance(node, ast.Attribute):
            place = node.end_lineno, node.end_col_offset - len(node.attr)
            found[place] = "call" if id(node) in called else "attribute"
    return found


def role_of(token: tokenize.TokenInfo, known: str | None) -> int:
    """The class of one token: UNLABELLED for operators, names of definitions and whatever else has no role."""
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        known = "keyword"
    elif token.type in (tokenize.STRING, tokenize.NUMBER):
        known = "string" if token.type == tokenize.STRING else "number"
    return ROLES.index(known) if known else UNLABELLED


def labelled_words(lines: list[str], node: ast.FunctionDef) -> tuple[list[str], list[int]]:
    """A function's tokens and their classes, without its docstring and comments; a long string is cut."""
    first, known = node.body[0], roles(node)
    skipped = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) else ()
    own = iter(lines[node.lineno - 1 : node.end_lineno])
    words, labels = [], []
    for token in tokenize.generate_tokens(lambda: next(own, "")):
        row, column = token.start[0] + node.lineno - 1, token.start[1]
        if token.string.strip() and token.type != tokenize.COMMENT and row not in skipped:
            words.append(token.string[:MOST_CHARACTERS])
            labels.append(role_of(token, known.get((row, column))))
    return words, labels


def functions(source: Source) -> list[Example]:
    """The short functions of a file."""
    if not source.code.isascii():  # the tree counts columns in bytes
        return []
    lines, found = io.StringIO(source.code).readlines(), []
    for node in statements(source.tree):
        short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < MOST_LINES
        if short and len(found) < FUNCTIONS_PER_FILE:
            words, labels = labelled_words(lines, node)
            if FEWEST_TOKENS <= len(words) <= MOST_TOKENS:
                found.append(Example(source.name, words, labels))
    return found


def roles_task(files: list[Source], tested: set[str]) -> Task:
    train, test = split([example for source in files for example in functions(source)], tested)
    train, test = train[:TRAIN_FUNCTIONS], test[:TEST_FUNCTIONS]
    question = "what does each name in this code do?"
    return Task("roles", question, "TOKEN_CLS", "AutoModelForTokenClassification", ROLES, train, test, 8)


MAKERS = {"topics": topics_task, "roles": roles_task}


def tasks(names: list[str]) -> list[Task]:
    """The tasks of these names."""
    files = sources()
    tested = held_out(files)
    return [MAKERS[name](files, tested) for name in names]
