"""`mpfx bench compress`: stages, floors, what is put back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from mpfx.bench import compress
from mpfx.bench.compress import CompressConfig, CompressReport, Rates, Work, bench
from mpfx.bench.models import random_model
from mpfx.bench.stages import Meter, Stage
from mpfx.cli import main
from mpfx.graph import linear_weight, traced_module
from mpfx.nn import MixedPrecisionLinear
from mpfx.passes import Pack, located_graph, solve
from mpfx.stats import MomentAccumulator

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
SMALL: dict[str, Any] = {"samples": 4, "length": 24, "batch": 2, "bits": 5.0, "device": "cpu"}
LAYERS = 2
WEIGHTS = LAYERS * (4 * 128 * 128 + 3 * 128 * 256)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that needs no measuring."""
    monkeypatch.setattr(compress, "matmul_speed", lambda device, dtype, clock: 2e9)
    monkeypatch.setattr(compress, "copy_speed", lambda device, cache, clock: 4e9)


@pytest.mark.parametrize("guided", [False, True])
def test_every_stage_has_its_time_and_floor(folder: str, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    def made(*args: Any) -> Any:
        models.append(random_model(*args))
        return models[0]

    monkeypatch.setattr(compress, "random_model", made)
    sparsity = 0.5 if guided else None
    found = bench(CompressConfig(model=folder, layers=LAYERS, guided=guided, sparsity=sparsity, **SMALL))
    assert sum(isinstance(m, MixedPrecisionLinear) for m in models[0].modules()) == LAYERS * 7
    assert (found.weights, found.blocks) == (WEIGHTS, LAYERS)
    whole = [name for name in found.stages if "/" not in name]
    sensed, scaled = (["sense"], []) if guided else ([], ["scale"])
    assert whole == ["trace", *sensed, "observe", "allocate", *scaled, "solve", "pack", "fold"]
    assert {n for n in found.stages if n.startswith("solve/")} == {
        *("solve/Hessian", "solve/factor", "solve/sweep", "solve/encode", "solve/error", "solve/forward"),
        *(["solve/refine"] if guided else []),
    }
    assert {"observe/Hessian", "observe/forward", "allocate/factor", "allocate/curves"} < found.stages.keys()
    assert all(stage.seconds > 0 for stage in found.stages.values())
    for name in whole:
        assert sum(s.seconds for n, s in found.stages.items() if n.startswith(f"{name}/")) <= 1.001 * (
            found.stages[name].seconds
        )
    assert all(found.stages[name].peak > 0 for name in whole)
    assert found.plain is not None
    assert found.plain_seconds == LAYERS * found.plain.seconds
    # What tokens, channels and rows ask for: forward 2, symmetric Hessians 1, a factor 2/3, a sweep 1.
    hessians = 4 * 24 * LAYERS * (3 * 128**2 + 256**2) / 2e9
    assert found.floors["solve/Hessian"] == pytest.approx(hessians)
    assert found.floors["solve/factor"] == pytest.approx(2 / 3 * LAYERS * (3 * 128**3 + 256**3) / 2e9)
    assert found.floors["allocate/factor"] == found.floors["solve/factor"] / 2
    assert found.floors["observe"] == pytest.approx(2 * 4 * 24 * WEIGHTS / 2e9 + hessians)
    assert ("sense" in found.floors) == guided


def test_a_correction_takes_another_run_of_the_dense_model() -> None:
    """Of one group: 100 channels, 50 rows; two operations a weight and token."""
    plain, corrected = (
        dict(compress._floors([(100, 50)], CompressConfig(device="cpu", samples=2, length=10, correction=share)))
        for share in (0.0, 0.5)
    )
    assert corrected["solve"].half - plain["solve"].half == 2 * 20 * 100 * 50
    assert {name for name in plain if corrected[name] != plain[name]} == {"solve"}


def test_unguided_is_plain_unless_told_otherwise() -> None:
    plain, guided = CompressConfig(device="cpu").compression, CompressConfig(device="cpu", guided=True).compression
    assert (plain.power, plain.corrected, plain.offload) == (0, 0, "never")
    assert (guided.power, guided.corrected) == (0.5, 0.5)
    other = CompressConfig(device="cpu", correction=0.25, streaming=True, allocation_tokens=10).compression
    assert (other.corrected, other.offload, other.allocation_tokens) == (0.25, "always", 10)


def test_nothing_is_left_wrapped(folder: str) -> None:
    def wrapped() -> list[Any]:
        return [vars(Pack)["__call__"], vars(solve)["measured_sweep"], vars(MomentAccumulator)["update"]]

    before = wrapped()
    inside: list[Any] = []

    def fail() -> None:
        inside.extend(wrapped())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Meter(CPU).watching(parts=True):
        fail()
    assert not any(now is then for now, then in zip(inside, before, strict=True))
    assert wrapped() == before
    found = bench(CompressConfig(model=folder, layers=2, parts=False, plain=False, **SMALL))
    assert {name for name in found.stages if "/" in name} == set()
    assert found.plain is None
    assert found.plain_seconds is None
    assert not any("plain" in row[0] for row in found.cells()[1])


def test_the_plain_loop_leaves_the_model_as_it_was(folder: str) -> None:
    config = CompressConfig(model=folder, layers=LAYERS, **SMALL)
    model = random_model(compress._sizes(config), CPU, torch.float32)
    batches = compress._batches(config, 96)
    gm = located_graph(model, (), compress._inputs(model, batches[0]), config.compression)
    before = {name: p.clone() for name, p in model.named_parameters()}
    written: list[bool] = []
    q = linear_weight(traced_module(gm).get_submodule("model.layers.0.self_attn.q_proj"))

    def observe(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        written.append(torch.equal(q, before["model.layers.0.self_attn.q_proj.weight"]))
        return torch.zeros_like(weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "solve_plain", observe)
        compress._plain(gm, model, batches, config, CPU)
    assert written == [True] + [False] * 6  # the first of seven had been solved when the second was
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_figures_of_known_times() -> None:
    rates = Rates(half=4.0, single=2.0, copy=10.0)
    assert Work(half=8, single=2, nbytes=10).seconds(rates) == 3.0
    assert (Work(half=8) + Work(nbytes=50)).seconds(rates) == 5.0
    stages = {"trace": Stage(9.0, 10**9), "observe": Stage(2.0, 2 * 10**9), "solve": Stage(4.0, 3 * 10**9)}
    report = CompressReport(
        config=CompressConfig(device="cpu"),
        weights=10**9,
        blocks=32,
        rates=rates,
        stages={**stages, "solve/sweep": Stage(1.0)},
        floors={"observe": 1.0, "solve": 2.0, "solve/sweep": 0.5},
        plain=Stage(1.5, 4 * 10**9),
        environment={"device": "a chip", "dtype": "float32", "torch": "2", "numba": "none"},
    )
    assert report.seconds == 6.0
    rows = {row[0]: row[1:] for row in report.cells()[1]}
    assert rows["solve: sweep"] == ["1", "0.5", "2.00", ""]
    assert rows["graph to packed modules"] == ["6", "3", "2.00", "3.00"]
    assert rows["the plain loop, all 32 blocks (projected)"][0] == "48"
    assert rows["the plain loop / mpfx"][0] == "8.00 x"


def test_the_command(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--samples", "2", "--length", "24", "--bits", "5", "--layers", "2", "--device", "cpu"]
    target = tmp_path / "out" / "figures.json"
    assert main(["bench", "compress", "--model", folder, *options, "--output", str(target)]) == 0
    printed, written = capsys.readouterr().out, json.loads(target.read_text(encoding="utf-8"))
    assert "| solve: sweep |" in printed
    assert "the plain loop, one block" in printed
    assert written["blocks"] == 2
    # What no option says is what the config says.
    said: dict[str, Any] = {"model": folder, "samples": 2, "length": 24, "bits": 5.0, "layers": 2, "device": "cpu"}
    assert CompressConfig(**written["config"]) == CompressConfig(**said)
    assert written["stages"]["solve"]["seconds"] > 0
    assert written["seconds"] == pytest.approx(
        sum(s["seconds"] for n, s in written["stages"].items() if "/" not in n and n != "trace")
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "`samples` of 1 or more but got 0"),
        ({"devices": 0}, "`devices` of 1 or more but got 0"),
        ({"devices": 3}, "at least one batch for each of 3 devices"),
        ({"devices": 2, "device": "cuda:1"}, "`device` without a number with 2 devices"),
        ({"length": 2}, "`length` of 3 or more"),
        ({"layers": 1}, "`layers` of 2 or more"),
        ({"bits": 0.01}, "bits_per_weight"),
        ({"dtype": "int8"}, "`dtype`"),
        ({"length": 65}, "`length` of 64 at most"),
    ],
)
def test_what_is_refused(folder: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(CompressConfig(**{"model": folder, **SMALL, **wrong}))
