"""Many runs on one calibration: sessions, sweeps, the bench, and budgets solved from a run's folder."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpfx.bench.quality import QUALITY, BenchRow, bench, chosen_rows, excess
from mpfx.bench.quality import plot as plot_bench
from mpfx.cli import main
from mpfx.config import RunConfig, parse_run
from mpfx.lm import EvaluationData
from mpfx.search import Outcome, Search, Variant, combinations, results_folder, variant
from mpfx.session import Result, Session

WORDS = [f"w{i}" for i in range(80)]


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config on a small Llama with random weights."""
    base = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=82, **sizes, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "embed" not in name else 30)
    model.save_pretrained(base / "llama")
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([*WORDS, "[UNK]", "[PAD]"])}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        base / "llama"
    )
    for name in ("text", "other"):
        numbers = torch.randint(0, 80, (32 * 24,), generator=torch.Generator().manual_seed(len(name)))
        (base / f"{name}.txt").write_text(" ".join(WORDS[i] for i in numbers))
    text = {"data": str(base / "text.txt"), "length": 32}
    return {
        "model": str(base / "llama"),
        "bits_per_weight": 4.5,
        "calibration": {**text, "samples": 8, "seed": None},
        "evaluation": {**text, "samples": None},
        "trainer": {"accelerator": "cpu"},
        "progress": False,
        "output": str(base / "out"),
    }


def config_file(fields: dict[str, Any], path: Path) -> str:
    path.write_text(json.dumps(fields))  # JSON is YAML
    return str(path)


def test_a_session_runs_many_configs_and_ends_dense(fields: dict[str, Any]) -> None:
    optimal = parse_run(fields)
    fixed = parse_run({**fields, "bits_per_weight": None, "code_bits": 3, "allocation": "fixed"})
    other = fields["evaluation"]["data"].replace("text.txt", "other.txt")
    session = Session(optimal, also=[EvaluationData(data=other, samples=2, length=32)])
    assert session.data.evaluation_windows.shape == (16, 32)  # all that calibration leaves
    session.check(optimal, fixed)
    model = session.source.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    session.calibrate([optimal, fixed])
    results = [session.run(config) for config in (optimal, fixed, optimal)]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert session.measure() == session.dense
    first, three, again = results
    assert first.perplexity == again.perplexity
    assert list(first.perplexity) == [fields["evaluation"]["data"], other]
    assert 4.4 < first.bits_per_weight <= 4.5
    assert three.code_bits == 3
    assert three.allocation is None
    assert first.allocation is not None
    assert first.allocation == again.allocation
    assert set(first.seconds) >= {"allocate", "solve", "evaluate"}
    assert set(session.seconds) >= {"load", "calibrate", "evaluate"}


def test_sessions_refuse_what_one_calibration_cannot_serve(fields: dict[str, Any]) -> None:
    config = parse_run(fields)
    session = Session(config)
    with pytest.raises(RuntimeError, match="calibrate"):
        session.run(config)
    assert session.problems([config]) == [None]
    with pytest.raises(ValueError, match="Expected `scope` to be"):
        session.check(parse_run({**fields, "scope": {"head": True}}))
    with pytest.raises(ValueError, match="named twice"):
        Session(config, also=[config.evaluation])


def test_combinations_are_parsed_as_configs_are(fields: dict[str, Any]) -> None:
    scored = {**fields, "allocation": "budget"}
    found = combinations(scored, [["bits_per_weight", "3", "4.5"], ["importance", "activation", "all"]])
    assert [dict(v.fields) for v in found][1] == {"bits_per_weight": "3", "importance": "all"}
    configs = [v.config for v in found if v.config is not None]
    assert [c.bits_per_weight for c in configs] == [3, 3, 4.5, 4.5]
    assert configs[0].importance.activation == 1
    assert configs[0].importance.stability == 0
    assert configs[1].importance == RunConfig(code_bits=4).importance
    (by_codes,) = combinations(fields, [["code_bits", "4"]])
    assert by_codes.config is not None
    assert by_codes.config.bits_per_weight is None
    mixed = combinations(fields, [["allocation", "optimal", "fixed"], ["bits_per_weight", "0.8", "4"]])
    assert [v.config is None for v in mixed] == [False, False, True, False]  # 0.8 bits are none of one width
    assert "`bits_per_weight`" in str(mixed[2].problem)
    assert variant(fields, "x", {"sparsity": "2:4"}).problem is None


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([], "a field to vary"),
        ([["bits_per_weight"]], "one value or more"),
        ([["bits_per_weight", "3", "3"]], "all different"),
        ([["bits_per_weight", "3"], ["bits_per_weight", "4"]], "each field once"),
        ([["nope", "3"]], "nope"),
        ([["grid.nope", "3"]], "nope"),
        ([["sparsity.nope", "3"]], "sparsity"),
        ([["bits_per_weight", "3", "many"]], "'many' for bits_per_weight"),
        ([["sparsity", "0.5", "1.5"]], "'1.5' for sparsity"),
        ([["importance", "luck"]], "luck"),
        ([["calibration.samples", "3"]], "one calibration can serve"),
        ([["scope.head", "true"]], "one calibration can serve"),
    ],
)
def test_wrong_fields_and_values_are_refused_first(fields: dict[str, Any], vary: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        combinations({**fields, "sparsity": "0"}, vary)


def test_a_sweep_from_the_command_line(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["sweep", "--config", config_file(fields, tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]
    assert (
        main([*arguments, "--vary", "bits_per_weight", "0.1", "4.5", "--vary", "allocation", "budget", "optimal"]) == 0
    )
    shown = capsys.readouterr().out
    assert "dense: perplexity" in shown
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())
    rows = data["rows"]
    assert [row["fields"]["allocation"] for row in rows] == ["budget", "optimal", "budget", "optimal"]
    assert "at least" in rows[1]["problem"] or "stored bits from" in rows[1]["problem"]
    assert "perplexity" not in rows[1]
    assert all(row["problem"] is None for row in rows[2:])
    assert all(4.3 < row["bits_per_weight"] <= 4.5 for row in rows[2:])
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_refuses_wrong_input(fields: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    arguments = ["sweep", "--config", config_file(fields, tmp_path / "c.yaml"), "--output", str(tmp_path / "mine")]
    assert main([*arguments, "--vary", "nope", "1"]) == 2
    assert "nope" in capfd.readouterr().err
    assert main([*arguments, "--vary", "bits_per_weight", "3"]) == 2
    assert "holds other files" in capfd.readouterr().err.replace("\n", " ")
    results_folder(tmp_path / "new", "sweep.json")
    with pytest.raises(ValueError, match="is a file"):
        results_folder(tmp_path / "c.yaml", "sweep.json")


def test_the_bench(fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Session.run

    def failing(self: Session, config: Any) -> Result:
        if config.damping == 0.1:
            raise RuntimeError("boom")
        return run(self, config)

    monkeypatch.setattr(Session, "run", failing)
    rows, lines = chosen_rows(["GPTQ 4", "damping*", "optimal"]), list[str]()
    found = bench(fields, rows, tmp_path, bits=(4.6,), on_row=lines.append)
    assert [outcome.variant.name for outcome in found.outcomes] == ["GPTQ 4", "optimal", "damping 0.1"]
    assert found.outcomes[2].problem == "RuntimeError: boom"
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rows"][0]["code_bits"] == 4
    assert list(data["rows"][0]["excess"]) == [fields["evaluation"]["data"]]
    text = (tmp_path / "bench.md").read_text().splitlines()
    assert text[0].startswith("| row | asked | excess text.txt |")
    assert len(text) == 5
    assert len(lines) == 3
    assert plot_bench(found, tmp_path / "bench.png") is None


def test_every_bench_row_is_a_valid_config() -> None:
    base = {"model": "m"}
    for row in QUALITY:
        sizes: list[dict[str, Any]] = [{"bits_per_weight": 4.35}, {"bits_per_weight": 2.8}] if row.sized else [{}]
        for size in sizes:
            assert variant(base, row.name, {**size, **row.fields}).problem is None, row
    assert len({row.name for row in QUALITY}) == len(QUALITY)
    with pytest.raises(ValueError, match="matches none"):
        chosen_rows(["nope"])
    assert chosen_rows([]) == list(QUALITY)


def outcome(name: str, bits: float, perplexity: float, asked: float | None = None) -> Outcome:
    result = Result({"t": perplexity}, bits, bits, 0.0, None, {})
    return Outcome(Variant(name, {} if asked is None else {"bits_per_weight": asked}, None), result)


def test_excess_compares_with_gptq_at_the_size() -> None:
    rows = (outcome("GPTQ 4", 4.32, 12), outcome("GPTQ 3", 3.3, 20), outcome("optimal", 4.35, 11, 4.35))
    search = Search("m", {"t": 10.0}, (*rows, outcome("optimal", 3.33, 15, 3.34), outcome("optimal", 2.8, 30, 2.8)), {})
    assert [excess(search, found, "t") for found in search.outcomes] == [1.0, 1.0, 0.5, 0.5, None]
    assert excess(search, Outcome(Variant("x", {}, None), problem="no"), "t") is None
    assert BenchRow("x").sized


def test_budgets_are_solved_from_a_folder(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    assert main(["compress", "--config", config_file(fields, tmp_path / "c.yaml"), "--output", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    capsys.readouterr()
    allocate = ["allocate", "--frontier", str(out)]
    assert main([*allocate, "--bits-per-weight", "4.5", "--output", str(plan), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored bytes"] == report["allocation"]["stored_bytes"]
    assert found["distortion"] == pytest.approx(report["allocation"]["distortion"])
    assert plan.read_text() == (out / "plan.json").read_text()
    assert {kind["name"] for kind in found["kinds"]} >= {"q_proj", "down_proj"}
    limits = ["--optimal.limits", '[{"pattern": "*.down_proj", "least": 4}]', "--optimal.uniform", "true"]
    assert main([*allocate, "--bits_per_weight", "4", *limits]) == 0
    shown = capsys.readouterr().out
    assert "gap to the bound" in shown
    assert "down_proj" in shown
    assert main([*allocate, "--code_bits", "3.5"]) == 0
    assert main([*allocate, "--bits_per_weight", "0.01"]) == 2
    assert main(allocate) == 2
    assert main(["allocate", "--frontier", str(tmp_path), "--bits_per_weight", "3"]) == 2
    err = capsys.readouterr().err
    assert "of at least" in err
    assert "exactly one of" in err
    assert "there is no frontier.json" in err.replace("\n", " ")
