"""Names of ours in prose: which of the words in backticks are meant as ours, and does the code have them?

    wrong_names(Path("README.md").read_text())      # [] if all is well, else each name and what is wrong with it

The code is read, not imported. A word in backticks is meant as ours, and must be there, if it is one of these:

    saecore.sae.model.SAE, jobs.explain      a dotted name that begins with one of our folders: a module, or what one defines
    results.open                             a module's last word before the dot: defined by a module of that name
    ImageTower.embed, Embedder               a class, and what it or a base class of ours defines
    MAX_IMAGE_BYTES                          a constant
    image_id, load_tower()                   a word with an underscore: an identifier, or a whole string, of the code
    jobs/explain.py, chunks.py, maps.js      a path below one of our folders, or a source file's name
    --chunk-size                             a flag of some command; after `jobs.explain` or `relmap explain` of that one

A word is read as somebody else's where the code itself uses it: `state_dict` is an attribute somewhere, `Tensor` is imported.
Left out: single small words, names of data files.
Names with a folder of ours before the first dot are found without backticks too.
"""

import ast
import builtins
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("saecore", "jobs", "benchmarks", "tests")
PROSE_FOLDERS = ("docs", "cluster", ".ci")
"""Folders of ours without modules, for paths."""

SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
DOTTED = re.compile(rf"(?<![\w./`:-])(?:{'|'.join(FOLDERS)})(?:\.[A-Za-z_]\w*)+(?![\w/])")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"--[a-z][a-z0-9-]*$")
SOURCES = ("py", "js", "css", "md")
DATA = frozenset((
    "json", "jsonl", "parquet", "npy", "npz", "pt", "pth", "tar", "gz", "tgz", "zip", "safetensors", "html", "png", "jpg",
    "jpeg", "svg", "txt", "log", "yaml", "yml", "toml", "csv", "bin", "ipynb", "model",
))  # fmt: skip
"""Endings of files that are no source: `run.json` is no attribute of a module `run`."""

OTHERS = frozenset(
    (
        "load_dataset",
        "encode_image",
        "sparse_autoencoder",
        "full_latents",
        "sae.output",
        "sae.push_to_hub",
        "ExecutionTimeoutError",
        "RAY_JOB_STOP_WAIT_TIME_S",
        "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S",
    )
)
"""Other people's functions, packages and keys that the code never spells as a whole word, and what a variable `sae` has."""


class Code:
    """What the modules below a root define and use."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules: dict[str, set[str]] = {}
        """Dotted name -> what the module defines at its top; of a package its modules."""
        self.classes: dict[str, set[str]] = defaultdict(set)
        self._bases: dict[str, set[str]] = defaultdict(set)
        self.words: set[str] = set(dir(builtins))
        """Every identifier, and every string that could be one."""
        self._fields: dict[tuple[str, str], set[str]] = {}
        """Module and class -> its annotated fields, which tyro makes flags of, and the words in their annotations and bases."""
        self._commands: dict[str, str] = {}
        """Command -> its module."""
        self._spelled: dict[str, set[str]] = defaultdict(set)
        """Module -> flags that it spells itself."""
        self.files = {path.relative_to(root).as_posix() for path in self._files()}
        for place in sorted(self.files):
            if place.endswith(".py") and place.split("/")[0] in FOLDERS:
                self._read(place, ast.parse((root / place).read_text(encoding="utf-8")))
        for name in list(self.modules):
            package, _, module = name.rpartition(".")
            while package:
                self.modules.setdefault(package, set()).add(module)
                package, _, module = package.rpartition(".")

    def _files(self) -> Iterator[Path]:
        yield from (path for path in self.root.iterdir() if path.is_file())
        for folder in (*FOLDERS, *PROSE_FOLDERS):
            yield from (path for path in (self.root / folder).rglob("*") if "__pycache__" not in path.parts)

    def _read(self, place: str, tree: ast.Module) -> None:
        name = ".".join(Path(place).with_suffix("").parts).removesuffix(".__init__")
        self.modules.setdefault(name, set()).update(*map(defined, tree.body))
        if name.split(".")[0] in ("jobs", "benchmarks") and not place.endswith("__init__.py"):
            self._commands[name.removesuffix(".__main__").split(".")[-1]] = name
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef():
                    self.classes[node.name].update(*map(defined, node.body), of_self(node))
                    self._bases[node.name] |= {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                    fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                    held = [ast.unparse(part) for part in (*node.bases, *(field.annotation for field in fields))]
                    words = {word for part in held for word in re.findall(r"[\w.]+", part)}
                    self._fields[name, node.name] = words.union(*map(defined, fields))
                case ast.keyword(arg="name", value=ast.Constant(value=str(flag))):  # as tyro is told another name
                    self._spelled[name].add(flag.removeprefix("--"))
                case ast.Constant(value=str(text)):
                    if text.isidentifier():
                        self.words.add(text)
                    elif FLAG.fullmatch(text):
                        self._spelled[name].add(text[2:])
            self.words.update(identifiers(node))

    def flags(self, command: str) -> set[str]:
        """Of one command, or of all of them if it has no name."""
        modules = [self._commands[command]] if command in self._commands else list(self._commands.values())
        if command == "benchmarks":  # its parts are told in modules of their own
            modules = [module for module in self._commands.values() if module.startswith("benchmarks.")]
        flags = {"help"}.union(*(self._spelled[module] for module in modules))
        waiting = [key for key in self._fields if key[0] in modules]
        read = set(waiting)
        while waiting:
            module, name = waiting.pop()
            flags |= {word.replace("_", "-") for word in self._fields[module, name]}
            named = {key for word in self._fields[module, name] for key in self._class(word, module)} - read
            waiting += named
            read |= named
        return flags

    def _class(self, word: str, module: str) -> set[tuple[str, str]]:
        """The class that a word in a module means: its own, or another module's that it names before the dot or imports."""
        owner, _, name = word.rpartition(".")
        if not owner and (module, name) in self._fields:
            return {(module, name)}
        others = {key for key in self._fields if key[1] == name and key[0] not in self._commands.values()}
        return {key for key in self._fields if key[1] == name and key[0].endswith(f".{owner}")} if owner else others

    def members(self, name: str) -> set[str]:
        """Of a class and its base classes of ours."""
        bases = self._bases[name] & self.classes.keys() - {name}
        return self.classes[name].union(*map(self.members, bases))

    def complaint(self, span: str) -> str | None:
        """What is wrong with the content of a pair of backticks; None for what exists or is not meant as ours."""
        span = re.sub(r"^(\.venv/bin/)?python -m ", "", span)
        head, *more = span.split(" ")
        if head.startswith("--") or head == "relmap" or head.split(".")[0] in ("jobs", "benchmarks"):
            command = more[0] if head == "relmap" and more else head.split(".")[-1] if not head.startswith("--") else ""
            flags = self.flags(command)
            for word in (head, *more):
                if FLAG.match(word) and not {word[2:], word.removeprefix("--no-")} & flags:
                    return f"{command or 'no command'} has {'no ' if command else ''}{word}"
        if more:
            if head.split(".")[0] not in FOLDERS or "." not in head:
                return None
            span = head
        return self._complaint(re.sub(r"\(.*\)$", "", span))

    def _complaint(self, name: str) -> str | None:
        if name in OTHERS or not name:
            return None
        if "/" in name or name.rpartition(".")[2] in SOURCES:
            return self._of_path(name.rstrip("/"))
        if not all(part.isidentifier() for part in name.split(".")) or name.rpartition(".")[2] in DATA:
            return None
        first, *more = name.split(".")
        if first in FOLDERS and more:
            return self._of_module(name)
        if first in self.classes:
            known = not more or more[0] in self.members(first) or more[0] in dir(object)
            return None if known else f"class {first} has no {more[0]}"
        if more:
            named = [defined for module, defined in self.modules.items() if module.split(".")[-1] == first]
            known = not named or any(more[0] in names for names in named)
            return None if known else f"no module of ours called {first} defines {more[0]}"
        if re.fullmatch(r"[A-Z]\w+|\w+_\w+", name) and name not in self.words:
            return "the code has no such name"
        return None

    def _of_module(self, name: str) -> str | None:
        module, rest = name, list[str]()
        while module not in self.modules:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
            if not module:
                return "no such module"
        if not rest or rest[0] in self.modules[module]:
            whole = len(rest) < 2 or rest[0] not in self.classes or rest[1] in self.members(rest[0])
            return None if whole else f"class {rest[0]} has no {rest[1]}"
        return f"{module} defines no {rest[0]}"

    def _of_path(self, path: str) -> str | None:
        if re.search(r"[*{}<>:]|\.\.\.", path):
            return None
        source = path.rpartition(".")[2] in SOURCES
        if path.split("/")[0] in (*FOLDERS, *PROSE_FOLDERS):
            return None if (self.root / path).exists() else "no such file"
        return f"no file {path}" if source and not any(f"/{file}".endswith(f"/{path}") for file in self.files) else None


def defined(node: ast.AST) -> set[str]:
    """What one statement of a module or of a class defines; what it imports is somebody else's."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign() | ast.AnnAssign():
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        case ast.If() | ast.Try() | ast.With():
            return set().union(*map(defined, ast.iter_child_nodes(node)))
    return set()


def of_self(node: ast.ClassDef) -> set[str]:
    """Attributes that methods give to `self`."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self"
    }


def identifiers(node: ast.AST) -> set[str]:
    """Those that one node of a syntax tree holds itself."""
    names = {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname", "module")}
    return {part for name in names if isinstance(name, str) for part in name.split(".")}


@cache
def code() -> Code:
    """This checkout's, read once."""
    return Code()


def wrong_names(text: str, known: Code | None = None) -> list[str]:
    """Each name of a text that is meant as ours and does not exist, with what is wrong; fenced blocks are code, not prose."""
    known = known or code()
    text = FENCE.sub("", text)
    spans = dict.fromkeys(" ".join(span.split()) for span in [*SPAN.findall(text), *DOTTED.findall(text)])
    return [f"`{span}`: {wrong}" for span in spans if (wrong := known.complaint(span))]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each docstring and each run of comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    begun, run = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            begun = begun if run else token.start[0]
            run.append(token.string.lstrip("#"))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and run:
            yield begun, "".join(run)
            run = []
    if run:
        yield begun, "".join(run)
