"""`mpfx bench linear`: what is compared, what is reported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpfx.bench import linear
from mpfx.bench.contenders import Stage, dense, packed, torch_int4
from mpfx.bench.int4 import Int4Weight, dequantized
from mpfx.bench.linear import LinearConfig, bench
from mpfx.bench.timing import Call
from mpfx.bench.weights import mixed_layout
from mpfx.cli import main
from mpfx.nn import MixedPrecisionLinear, PackedWeight, filled
from mpfx.report import markdown

SECONDS = {"copy": 1e-6, "F.linear": 40e-6, "int4": 20e-6, "mixed 4.25": 10e-6, "4-bit codes": 8e-6}
CACHE = 100_000
PRUNED = "4-bit codes, 50% pruned"


def known(calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """A clock that makes every call, and says what the table above says."""
    for of_name in calls.values():
        for call in of_name:
            call()
    return {name: SECONDS.get(name, 5e-6) for name in calls}


CONFIG = LinearConfig(device="cpu", dtype="float32", rows=(1, 20), sparsity=0.5, shapes=("256x512", "128x256"))


def test_figures_of_known_times() -> None:
    found = bench(CONFIG, clock=known, cache=CACHE)
    assert found.copy_bytes_per_second == pytest.approx(2 * 4 * CACHE / 1e-6)
    names = ["F.linear", "int4", "mixed 4.25", "4-bit codes", PRUNED, f"{PRUNED}, filled"]
    assert [(t.shape, t.rows, t.name) for t in found.timings] == [
        (shape, rows, name) for shape in ("256x512", "128x256") for rows in (1, 20) for name in names
    ]
    dense, _, mixed, codes, pruned, filled = found.timings[6:12]  # 20 rows
    around = 4 * 20 * (256 + 512)
    assert dense.nbytes == 4 * 256 * 512 + around
    assert dense.bytes_per_second == pytest.approx(dense.nbytes / 40e-6)
    assert codes.bits == pytest.approx(4 + 4 / 64 + 4 / 64 + 16 / 256 + 0.04, abs=0.01)  # zeros, scales, order, bases
    assert filled.bits == codes.bits  # in memory
    assert filled.nbytes == codes.nbytes
    assert pruned.bits == pytest.approx(codes.bits - 1, abs=0.05)
    assert mixed.bits == pytest.approx(4.25, abs=0.07)  # few groups: large steps
    assert all(t.error < 1e-4 for t in found.timings if t.name != "int4")
    head, rows = found.cells()
    assert len(rows) == 2 * 2 * 4
    row = dict(zip(head, rows[4], strict=True))
    assert row == {
        "weight": "256x512",
        "rows": "20",
        "packed": "mixed 4.25",
        "stored bits": f"{mixed.bits:.2f}",
        "µs": "10.0",
        "F.linear µs": "40.0",
        "times as fast": "4.00",
        "int4 µs": "20.0",
        "GB/s": f"{mixed.nbytes / 10e-6 / 1e9:.1f}",
        "of copy": f"{mixed.nbytes / 10e-6 / (8 * CACHE / 1e-6):.0%}",
        "error": f"{mixed.error:.1e}",
    }
    data = json.loads(json.dumps(found.to_json()))
    assert data["environment"]["torch"] == torch.__version__
    assert data["timings"][8]["share_of_copy"] == pytest.approx(mixed.nbytes / 10e-6 / (8 * CACHE / 1e-6))
    assert markdown(*found.cells()).count("\n") == 2 + len(rows)


def test_every_contender_has_more_weights_than_the_cache_holds() -> None:
    seen: dict[str, int] = {}

    def count(calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        seen.update({name: len(of_name) for name, of_name in calls.items()})
        return dict.fromkeys(calls, 1.0)

    found = bench(CONFIG, clock=count, cache=CACHE)
    around = {rows: 4 * rows * (128 + 256) for rows in (1, 20)}
    for timing in (t for t in found.timings if t.shape == "128x256"):
        assert seen[timing.name] * (timing.nbytes - around[timing.rows]) > 4 * CACHE


def test_copies_are_copies() -> None:
    stage = Stage(64, 128, torch.device("cpu"), torch.float32, 10_000)
    modules = packed("x", mixed_layout(64, 128, 5), stage).runs
    runs: list[Any] = [*modules, *dense(stage).runs, *torch_int4(stage).runs]
    tensors = [tensor for module in modules if isinstance(module, torch.nn.Module) for tensor in module.buffers()]
    tensors += [run.keywords["weight"] for run in runs if hasattr(run, "keywords")]
    tensors += [run.__self__.packed for run in runs if hasattr(run, "__self__")]
    pointers = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    assert (
        len(pointers) == len(set(pointers)) == 7 * len(modules) + len(dense(stage).runs) + len(torch_int4(stage).runs)
    )


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MixedPrecisionLinear.forward
    monkeypatch.setattr(MixedPrecisionLinear, "forward", lambda self, x: forward(self, x) * 1.1)
    with pytest.raises(ArithmeticError, match=r"mixed 4\.25: relative error 0\.1"):
        bench(CONFIG, clock=known, cache=CACHE)


def test_a_filled_weight_is_compared_with_the_one_under_the_bitmask(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: PackedWeight) -> PackedWeight:
        whole = filled(weight)
        return replace(whole, codes=~whole.codes)

    monkeypatch.setattr("mpfx.bench.contenders.filled", wrong)
    found = bench(replace(CONFIG, rows=(1,), shapes=("128x256",)), clock=known, cache=CACHE)
    assert [note.split(": relative")[0] for note in found.notes] == [
        f"no {PRUNED}, filled for 128x256, 1 rows: {PRUNED}, filled"
    ]


def test_what_torch_lacks_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(LinearConfig(device="cpu", rows=(1,), shapes=("128x160",)), clock=known, cache=CACHE)
    assert found.notes == ("no int4 for 128x160: the channels are no multiple of 128",)
    assert [t.name for t in found.timings] == ["F.linear", "mixed 4.25"]
    assert found.cells()[1][0][7] == ""

    def no_kernel(*_: Any) -> None:
        raise RuntimeError("no such kernel\nin this build")

    linear_of = Int4Weight.linear
    monkeypatch.setattr(Int4Weight, "linear", lambda self, x: linear_of(self, x) * 1.1)
    found = bench(LinearConfig(device="cpu", rows=(3,), shapes=("128x256",)), clock=known, cache=CACHE)
    assert "3 rows: int4: relative error 0.1" in found.notes[0]  # not ours: the others are measured
    monkeypatch.setattr(Int4Weight, "linear", no_kernel)
    found = bench(LinearConfig(device="cpu", rows=(3,), shapes=("128x256",)), clock=known, cache=CACHE)
    assert found.notes == ("no int4 for 128x256, 3 rows: no such kernel",)
    assert len(found.timings) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_is_what_is_stored(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 256), dtype=torch.int32, generator=random)
    scales = torch.randn(2, 64, 2, generator=random).to(dtype)
    x = torch.randn(3, 256, generator=random).to(dtype)
    wanted = x.float() @ dequantized(codes, scales).t()
    found = Int4Weight.of(codes, scales).copy().linear(x)
    assert found.dtype == dtype
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "Expected `rows` of 1 or more but got 0"),
        (["--shapes", "4096*4096"], "as OUTxIN, such as 11008x4096, but got '4096*4096'"),
        (["--shapes", "0x64"], "as OUTxIN"),
        (["--bits", "2"], "Expected `bits` from 3.1"),
        (["--sparsity", "1"], "Expected `sparsity` between 0 and 1 but got 1.0"),
        (["--dtype", "int4"], "Expected `dtype` to be one of"),
        (["--device", "tpu"], "Expected `device` to be"),
        (["--shapes", "32x64", "--bits", "5.5"], "choose larger `shapes`"),
        (["--shapes", "99999999999x4096"], "out of memory; choose smaller `rows` or `shapes`"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "linear", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linear, "last_level_cache", lambda device: CACHE)
    output = tmp_path / "new" / "linear.json"
    options = ["--device", "cpu", "--shapes", "128x256", "--rows", "1", "9", "--bits", "4.25", "5"]
    assert main(["bench", "linear", *options, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(json.loads(output.read_text())["environment"]["device"])
    assert [line.split(" | ")[1:3] for line in lines[4:]] == [
        [rows, name] for rows in ("1", "9") for name in ("mixed 4.25", "mixed 5")
    ]
    assert all(t["seconds"] > 0 for t in json.loads(output.read_text())["timings"])
    assert main(["bench", "linear", *options, "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err.replace("\n", " ")
    assert main(["bench", "linear", *options, "--output", str(output / "more.json")]) == 2
    assert "is in none" in capsys.readouterr().err.replace("\n", " ")
