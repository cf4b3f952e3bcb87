"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # every import goes down, none stays on its floor
    {"nn", "stats", "graph", "report", "lm"},
    {"solve"},
    {"allocate", "hub"},
    {"passes", "classic"},
    {"callbacks"},
    {"config"},
    {"session"},
    {"run", "search"},
    {"bench"},
    {"cli"},
]


def room(module: str) -> str:
    return module.split(".")[1]


def imports() -> set[tuple[str, str]]:
    """(room, room that it imports) of every import between rooms."""
    found = set()
    sources = dict.fromkeys((ROOT / "callbacks").rglob("*.py"), "callbacks")
    for path in (ROOT / "mpfx").rglob("*.py"):
        if (
            "callbacks" not in path.parts[len(ROOT.parts) :] and path.name != "__init__.py"
        ) or path.parent.name != "mpfx":
            sources.setdefault(path, path.relative_to(ROOT / "mpfx").with_suffix("").parts[0])
    for path, owner in sources.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(owner, room(name)) for name in names if name.startswith("mpfx.")}
    return {(a, b) for a, b in found if a != b}


def test_every_import_goes_down() -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    pairs = imports()
    assert ("solve", "nn") in pairs  # the check sees something
    assert sorted((a, b) for a, b in pairs if floor[b] >= floor[a]) == []


def test_top_level_holds_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"mpfx", "callbacks", "tests", "configs", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {name for name in names if not name.startswith(".")} - {*allowed, "CONTRIBUTING.md"} == set()


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_mpfx_is_light_and_changes_nothing() -> None:
    code = """
import os, sys, torch
before = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import mpfx
after = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
assert before == after
print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "datasets", "callbacks", "lightning"}))
"""
    assert run_python(code).strip() == "[]"
    assert "transformers" in run_python(code.replace("import mpfx\n", "import mpfx, transformers\n"))  # it can fail


def test_solving_a_budget_loads_no_model_library() -> None:
    code = """
import sys
from mpfx.cli import main
try:
    main(["allocate", "--help"])
except SystemExit:
    pass
print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "datasets", "lightning"}))
"""
    assert run_python(code).strip().endswith("[]")


def test_public_names_exist() -> None:
    import mpfx

    wanted = {"trace", "sites", "save", "load", "SparseGPT", "Quantizer", "QuantizationStats"}
    assert wanted <= set(mpfx.__all__)
    assert all(hasattr(mpfx, name) for name in mpfx.__all__)


def test_tests_mirror_the_source() -> None:
    sources = [p.relative_to(ROOT / "mpfx") for p in (ROOT / "mpfx").rglob("*.py")]
    rooms = {str(p.parent) for p in sources if p.parent.name}
    tested = {str(p.relative_to(ROOT / "tests").parent) for p in (ROOT / "tests").rglob("test_*.py")}
    assert rooms <= tested
