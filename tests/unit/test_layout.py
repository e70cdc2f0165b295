"""The layout of the repository: which room imports which, no circles, the lengths of files and functions."""

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# top-level package or module → its level; imports go to the same or a lower level
LEVELS = {
    **dict.fromkeys(("main", "hubconf", "scripts", "study", "family", "benchmarks", "device_check"), 5),
    "training": 4,
    **dict.fromkeys(("engine", "datasets"), 3),
    **dict.fromkeys(("pipeline", "models", "losses", "samplers"), 2),
    "utils": 1,
    "common": 0,
}
ALLOWED = {"options": set(), "models": {"models", "common"}}  # for these the level alone is not enough
FORBIDDEN = {("pipeline", "models")}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
LONG = {"options.py"}  # the parser
OF_DEVICES = {"common/devices.py", "options.py"}
ACCELERATORS = "cuda|xpu|mps"

Sources = Mapping[str, str]  # path relative to the repository → content


# ---------------------------------------------------------------------------------------------------------------------
# The checker
# ---------------------------------------------------------------------------------------------------------------------


def module_of(path: str) -> str:
    """'models/lets.py' → 'models.lets', 'models/__init__.py' → 'models'."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports_of(path: str, source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the project's ``modules`` at any depth of the file."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            submodules = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            names = [name if name in modules else base for name in submodules]
        else:
            continue
        for name in dict.fromkeys(names):
            if room_of(name) in {room_of(module) for module in modules}:
                yield node.lineno, name


def wrong_arrows(sources: Sources) -> list[str]:
    """Imports that point to a higher level, or to a room that the importing room must not know."""
    problems, modules = [], {module_of(path) for path in sources}
    for path, source in sources.items():
        room = room_of(module_of(path))
        if room == "tests":
            continue
        if room != "options" and room not in LEVELS:
            problems.append(f"{path}:1: {room} has no level in test_layout.LEVELS")
            continue
        for line, imported in imports_of(path, source, modules):
            target = room_of(imported)
            if target == "options" and room not in ALLOWED:
                continue
            if room in ALLOWED:
                expected = f"only {' and '.join(sorted(ALLOWED[room]))}" if ALLOWED[room] else "nothing of the project"
                wrong = target not in ALLOWED[room] and f"{room} may import {expected}"
            elif (room, target) in FORBIDDEN:
                wrong = f"{room} and {target} must not know each other"
            else:
                higher = target not in LEVELS or LEVELS[target] > LEVELS[room]
                wrong = higher and f"{target} is above {room}"
            if wrong:
                problems.append(f"{path}:{line}: imports {imported}: {wrong}")
    return problems


def circles(sources: Sources) -> list[str]:
    """Modules that import each other, each circle once, as the lines that close it."""
    modules = {module_of(path) for path in sources}
    graph = {
        module_of(path): {name: f"{path}:{line}" for line, name in imports_of(path, source, modules)}
        for path, source in sources.items()
    }
    problems, done = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = [*trail[trail.index(module) :], module]
            problems.append("; ".join(f"{graph[one][two]}: {one} imports {two}" for one, two in pairwise(circle)))
        elif module not in done:
            for imported in graph.get(module, {}):
                visit(imported, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return problems


def too_long(sources: Sources) -> list[str]:
    """Files and functions above the limits."""
    problems = []
    for path, source in sources.items():
        if path in LONG:
            continue
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            problems.append(f"{path}:{lines}: the file has {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(source, path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(
                        f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
                    )
    return problems


def rooms_without_docstring(sources: Sources) -> list[str]:
    """Folders of modules, except those of tests, whose ``__init__.py`` is missing or has no docstring."""
    problems = []
    for folder in sorted({path.rpartition("/")[0] for path in sources} - {""}):
        if room_of(folder.replace("/", ".")) == "tests":
            continue
        init = f"{folder}/__init__.py"
        if init not in sources:
            problems.append(f"{init}: missing: expected a docstring that says what the folder is for")
        elif not ast.get_docstring(ast.parse(sources[init], init)):
            problems.append(f"{init}:1: has no docstring")
    return problems


def kinds_of_device(sources: Sources) -> list[str]:
    """Names of accelerators in strings, and calls of their modules: all but ``common/devices.py`` work on any device.

    Docstrings may name them, and the help of options.
    """
    problems = []
    for path, source in sources.items():
        if path in OF_DEVICES or room_of(module_of(path)) == "tests":
            continue
        tree = ast.parse(source, path)
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings among them
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                found = re.fullmatch(rf"(.*\W)?({ACCELERATORS})(:.*)?", node.value)
            elif isinstance(node, ast.Attribute):
                found = re.fullmatch(rf"(torch\.|.*\.is_)({ACCELERATORS})(.*)", ast.unparse(node))
            else:
                continue
            if found:
                problems.append(f"{path}:{node.lineno}: names the device {found[2]}: common/devices.py is to be asked")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# This repository
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The Python files that git tracks, or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    try:
        listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout of git")
    paths = [path for path in sorted(set(listing.splitlines())) if (REPOSITORY / path).is_file()]
    assert "main.py" in paths
    return {path: (REPOSITORY / path).read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize("check", [wrong_arrows, circles, too_long, rooms_without_docstring, kinds_of_device])
def test_repository(sources, check):
    problems = check(sources)
    assert not problems, "\n".join(["", *problems])


# ---------------------------------------------------------------------------------------------------------------------
# The checker finds what it should
# ---------------------------------------------------------------------------------------------------------------------

TREE = {
    "main.py": "import training.loop\n",
    "training/__init__.py": '"""A run."""\n',
    "training/loop.py": "from engine import evaluate\nimport models\nimport options\n",
    "engine.py": "import utils\n",
    "utils.py": "from common import files\n",
    "options.py": "import argparse\n",
    "models/__init__.py": '"""Models."""\nfrom models import vit\n',
    "models/vit.py": "import timm\n",
    "pipeline/__init__.py": '"""Images."""\n',
    "common/__init__.py": '"""Files."""\n',
    "common/files.py": "",
    "tests/test_main.py": "import main\n",
}


def test_a_correct_tree_has_no_problems():
    for check in (wrong_arrows, circles, too_long, rooms_without_docstring):
        assert check(TREE) == []


@pytest.mark.parametrize(
    ("path", "source", "line", "problem"),
    [
        ("engine.py", "import utils\nimport training.loop\n", 2, "imports training.loop: training is above engine"),
        ("common/files.py", "import torch\nfrom utils import rank\n", 2, "imports utils: utils is above common"),
        ("common/files.py", "def f():\n    import models.vit\n", 2, "imports models.vit: models is above common"),
        ("common/files.py", "from .. import utils\n", 1, "imports utils: utils is above common"),
        ("pipeline/a.py", "import models\n", 1, "imports models: pipeline and models must not know each other"),
        ("models/vit.py", "import pipeline\n", 1, "imports pipeline: models may import only common and models"),
        ("models/vit.py", "import options\n", 1, "imports options: models may import only common and models"),
        ("options.py", "import common\n", 1, "imports common: options may import nothing of the project"),
        ("attic/__init__.py", '"""Old."""\n', 1, "attic has no level in test_layout.LEVELS"),
    ],
)
def test_a_wrong_arrow_is_found(path, source, line, problem):
    assert wrong_arrows({**TREE, path: source}) == [f"{path}:{line}: {problem}"]


def test_a_circle_is_found():
    tree = {**TREE, "models/vit.py": "import timm\nfrom models import create_model\n"}
    (found,) = circles(tree)
    assert found == "models/__init__.py:2: models imports models.vit; models/vit.py:2: models.vit imports models"
    tree = {"common/a.py": "from common import b\n", "common/b.py": "import common.c\n"}
    tree["common/c.py"] = "def f():\n    from common.a import x\n"
    (found,) = circles(tree)
    assert "common/a.py:1" in found
    assert "common/c.py:2: common.c imports common.a" in found


def test_long_files_and_functions_are_found():
    limit = MAX_FUNCTION_LINES - 1
    allowed = "def f():\n" + limit * "    x = 1\n"
    source = allowed + "class A:\n    async def g():\n" + (limit + 1) * "        x = 1\n"
    line = allowed.count("\n") + 2
    assert too_long({"a.py": allowed}) == []
    assert too_long({"a.py": source}) == [f"a.py:{line}: g has {limit + 2} lines, at most {MAX_FUNCTION_LINES}"]
    assert too_long({"a.py": MAX_FILE_LINES * "\n"}) == []
    lines = MAX_FILE_LINES + 1
    (found,) = too_long({"tests/a.py": lines * "\n"})
    assert found == f"tests/a.py:{lines}: the file has {lines} lines, at most {MAX_FILE_LINES}"
    assert too_long({"options.py": source + lines * "\n"}) == []


def test_rooms_without_docstring_are_found():
    assert rooms_without_docstring({"models/formats/a.py": ""}) == [
        "models/formats/__init__.py: missing: expected a docstring that says what the folder is for"
    ]
    assert rooms_without_docstring({"a/__init__.py": "import os\n"}) == ["a/__init__.py:1: has no docstring"]


@pytest.mark.parametrize(
    "line",
    [
        'if device.type == "cuda":',
        'if name in ("cpu", "mps"):',
        'torch.device("cuda:0")',
        "if images.is_cuda:",
        "torch.cuda.synchronize()",
        'backend = "cpu:gloo,xpu:xccl"',
    ],
)
def test_names_of_devices_are_found(line):
    source = f'"""Runs on cuda."""\n{line.removesuffix(":")}\n'.replace("\nif ", "\nx = ")
    (found,) = {problem.partition(":")[2] for problem in kinds_of_device({"engine.py": source})}
    assert found.startswith("2: names the device ")
    assert kinds_of_device({"common/devices.py": source, "tests/test_a.py": source}) == []
