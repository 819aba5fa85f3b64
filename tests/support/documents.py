"""Markdown as something to test: its code blocks run, its commands are known, its paths, names and figures are looked up."""

import ast
import doctest
import importlib
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import camfn

ROOT = Path(__file__).resolve().parents[2]


class Block(NamedTuple):
    """A fenced block: where its first line stands, its language and its text."""

    file: Path
    line: int
    language: str
    text: str


def blocks(file: Path) -> list[Block]:
    """Every fenced block of the file."""
    found, opened, language, inside = [], "", "", []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        bare = line.strip()
        if opened and bare == opened:
            found.append(Block(file, number - len(inside), language, textwrap.dedent("\n".join(inside))))
            opened = ""
        elif opened:
            inside.append(line)
        elif fence := re.match(r"(```+|~~~+) *(\S*)", bare):
            opened, language = fence.groups()
            inside = []
    assert not opened, f"{file.name}: the last fence is not closed"
    return found


def prose(file: Path) -> str:
    """The text outside of fenced blocks, tables that are made, and comments."""
    text = re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^<!-- (\w+) -->\n.*?^<!-- /\1 -->$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ Python


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block; an error names the line of the file. A comment that begins with a shape must be the shape assigned."""
    above = "\n" * (block.line - 1)
    if block.text.lstrip().startswith(">>>"):
        _run_doctest(block, namespace)
        return
    lines = (above + block.text).split("\n")
    for node in ast.parse(above + block.text, str(block.file)).body:
        exec(compile(ast.Module([node], []), str(block.file), "exec"), namespace)
        stated = re.search(r"# *(\(\d[\d, ]*\))", lines[node.end_lineno - 1])
        if stated and isinstance(node, ast.Assign):
            shape = tuple(namespace[node.targets[0].id].shape)
            where = f"{block.file}:{node.end_lineno}"
            assert shape == ast.literal_eval(stated[1]), f"{where}: the comment says {stated[1]}, and the shape is {shape}"


def _run_doctest(block: Block, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, namespace, block.file.name, str(block.file), block.line - 1)
    runner, said = doctest.DocTestRunner(verbose=False), []
    runner.run(test, out=said.append, clear_globs=False)
    assert runner.failures == 0, "".join(said)
    namespace.update(test.globs)


# ---------------------------------------------------------------------------------------------------------- commands

PROGRAMS = ("python", "pip", "camfn")


def commands(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of the file, where it stands and its words: of bash blocks, indented lines, and code in a sentence."""
    for block in blocks(file):
        if block.language == "bash":
            for words in _commands_in(block.text):
                yield f"{file.name}:{block.line}", words
    text = prose(file)
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ {4,}(.+)$", text, flags=re.MULTILINE)
    for span in spans:
        if span.split(" ")[0] in PROGRAMS and " " in span:
            for words in _commands_in(span):
                yield file.name, words


def _commands_in(text: str) -> Iterator[list[str]]:
    """The commands of a shell text, split at line ends, `&&`, `|` and `;`."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("&&", "||", "|", ";"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_command(where: str, words: list[str]) -> None:
    """What a command names is there: files and folders, extras, options."""
    program, command = Path(words[0]).name, " ".join(words)
    if program == "camfn":
        check_camfn(where, words[1:])
    for before, word in zip(["", *words], words):
        path = word.partition(":")[0]
        named = "/" in path or (program != "camfn" and Path(path).suffix in (".py", ".txt", ".toml"))
        if named and before != "--out" and not path.startswith((".venv", "-", ".[")) and "[" not in path:
            assert (ROOT / path).exists(), f"{where}: {command}: there is no {path}"
        if Path(path).suffix == ".py" and (ROOT / path).exists() and program.startswith("python"):
            unknown = {option for option in words if option.startswith("--")} - _options_of(ROOT / path)
            assert not unknown, f"{where}: {command}: {path} has no {', '.join(unknown)}"
    for extra in re.findall(r"(?:\.|camfn)\[(\w+)\]", command):
        assert extra in _extras(), f"{where}: {command}: camfn has no extra {extra!r}"


def _extras() -> list[str]:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    return re.findall(r"^([\w-]+) = ", table.partition("\n[")[0], flags=re.MULTILINE)


def _options_of(script: Path) -> set[str]:
    values = (node.value for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str) and value.startswith("--")}


def check_camfn(where: str, words: list[str]) -> None:
    """Click knows the command and its options, and lacks nothing that it needs; nothing is run."""
    import click

    from camfn import cli

    group, line = cli.app(), " ".join(["camfn", *words])
    try:
        context = click.Context(group, info_name="camfn")
        if words[0].startswith("-"):
            group.make_context("camfn", list(words))
        elif (command := group.get_command(context, words[0])) is None:
            raise click.UsageError(f"no such command {words[0]!r}")
        elif len(words) > 1:  # and not only its name, in a sentence
            command.make_context(words[0], list(words[1:]), parent=context)
    except click.exceptions.Exit:  # --help and --version
        pass
    except click.ClickException as error:
        raise AssertionError(f"{where}: {line}: {error.format_message()}") from None


# ------------------------------------------------------------------------------------------- links, paths, names


def missing_links(file: Path) -> list[str]:
    """Relative links that lead nowhere, headings included."""
    missing = []
    for link in re.findall(r"\]\(([^()\s]+)\)", prose(file)):
        if re.match(r"\w+:", link):
            continue
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (heading and heading not in _headings(target)):
            missing.append(link)
    return missing


def _headings(file: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_names(file: Path) -> list[str]:
    """Paths and names of camfn, in backticks, that are not there."""
    spans = re.findall(r"`([^`\s]+)`", prose(file))
    paths = [
        s for s in spans if re.fullmatch(r"[\w./-]*(/|\.(py|md|txt|toml|json))", s) or re.fullmatch(r"[\w.-]+/[\w./-]+", s)
    ]
    near = (ROOT, file.parent, ROOT / "camfn")
    names = [span.partition("(")[0] for span in spans if re.match(r"camfn\.\w", span)]
    return [p for p in paths if not any((place / p).exists() for place in near)] + [n for n in names if not _is_known(n)]


def _is_known(name: str) -> bool:
    value: Any = camfn
    for part in name.split(".")[1:]:
        if not hasattr(value, part):
            try:
                importlib.import_module(f"{value.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        value = getattr(value, part)
    return True


# ----------------------------------------------------------------------------------------------------------- figures

UNITS = r"%|(?:ms|s|seconds|minutes|MiB|GiB|times)\b"
FIGURE = rf"(?<![\w./-])(\d+\.\d+(?:e-?\d+)?(?!\.?\d)|\d+e-?\d+|\d+(?= ?(?:{UNITS})))"
VERSION = r"(?:torch|Python|NumPy|>=) ?\d+(?:\.\d+)*"


def figures(file: Path) -> list[str]:
    """Decimals, powers of ten, and whole numbers with a unit, that the prose states; versions aside."""
    text = re.sub(r"\]\([^)]*\)|`[^`\n]*`", "", prose(file))
    return re.findall(FIGURE, re.sub(VERSION, "", text))


def recorded(record: str, place: str) -> float:
    """A value of a file in `benchmarks/results`, by the keys that lead to it."""
    value = json.loads((ROOT / "benchmarks" / "results" / record).read_text(encoding="utf-8"))
    for key in place.split("/"):
        value = value[key]
    return value


def agrees(figure: str, value: float) -> bool:
    """Is it the value, to one unit of the last digit that it shows?"""
    return abs(Decimal(figure) - Decimal(value)) <= Decimal(1).scaleb(int(Decimal(figure).as_tuple().exponent))
