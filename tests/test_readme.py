"""README is run: its commands are CI's, its code works, its options parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpfx.cli import parser
from mpfx.config import RunConfig

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
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in README.splitlines() if "| `--" in line]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[-1])
def test_every_row_of_the_table_has_a_command_that_parses(row: list[str]) -> None:
    (base,) = [b for b in blocks("sh") if "wikitext2.yaml" in b]
    options = shlex.split(base)[1:] + shlex.split(row[-1].strip("`"))
    parsed = parser().parse_args([str(ROOT / o) if o.startswith("configs/") else o for o in options]).compress
    size = {"bits_per_weight": parsed.bits_per_weight, "code_bits": parsed.code_bits}
    config = RunConfig(**size, sparsity=parsed.sparsity, allocation=parsed.allocation)
    if config.bits_per_weight is not None:
        assert float(row[1]) <= config.bits_per_weight
    if config.pattern:
        assert row[0].startswith(("half", "2:4"))
    assert float(row[4]) == pytest.approx(float(row[3]) / 31.78, abs=2e-3)
