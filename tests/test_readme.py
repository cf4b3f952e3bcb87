"""README is run: its commands are CI's, its code works, its options parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpfx.bench import generate, linear
from mpfx.bench.quality import QUALITY
from mpfx.cli import parser
from mpfx.report import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_ci_runs_the_two_commands() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [block.strip() for block in blocks("sh")[:2]]
    assert len(commands) == 2
    assert all(f"\n{command}\n" in run for command in commands)


@pytest.mark.parametrize(
    "code",
    [c for c in blocks("python") if "smollm2" not in c and "load_dataset" not in c],
    ids=lambda c: c.splitlines()[-1],
)
def test_code_runs(code: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    if "ModelCompression" in code:
        assert result.stdout.count("MixedPrecisionLinear(") == 2
    if "mpfx.save" in code:
        assert (tmp_path / "out" / "mlp" / "mpfx.json").is_file()


def rows() -> list[list[str]]:
    names = {row.name for row in QUALITY}
    cells = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.count("|") == 7
    ]
    return [row for row in cells if row[0] in names]


def test_the_table_holds_rows_of_the_benchmark() -> None:
    dense = float(re.search(r"dense model (\d+\.\d+)", README)[1])  # type: ignore[index]
    found = rows()
    assert len(found) >= 12
    gptq = {row[0]: float(row[2]) for row in found if row[0].startswith("GPTQ")}
    for name, bits, perplexity, ratio, share, _ in found:
        assert float(ratio) == pytest.approx(float(perplexity) / dense, abs=1e-3), name
        if share and not name.startswith("GPTQ"):
            harm = gptq["GPTQ 4" if float(bits) > 4 else "GPTQ 3"] - dense
            assert float(share) == pytest.approx((float(perplexity) - dense) / harm, abs=2e-3), name


def test_the_tables_of_speed_are_those_of_the_tool() -> None:
    """A head, a line below it, and rows of as many cells."""
    for head in (linear.HEAD, generate.HEAD):
        start = README.index(markdown(head, []))
        table = README[start:].split("\n\n")[0].splitlines()
        assert len(table) > 2
        assert {line.count("|") for line in table} == {len(head) + 1}


@pytest.mark.parametrize(
    "command", [line for block in blocks("sh")[2:] for line in block.splitlines() if line.startswith("mpfx")]
)
def test_every_command_parses(command: str) -> None:
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(command)[1:]]
    parser(words[0]).parse_args(words)
