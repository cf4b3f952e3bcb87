"""The model card: how to load a checkpoint, and what its run measured."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mpfx
from mpfx.hub.card import CARD, model_card, write_card
from mpfx.report import Report
from tests.hub.models import own, pack_linears


def named(name: str) -> nn.Module:
    """A model of a class of this name, which is what a card knows of it."""
    model: nn.Module = type(name, (nn.Module,), {})()
    return model


CAUSAL = named("LlamaForCausalLM")


def report(model: str = "someone/a-model") -> Report:
    return Report(
        model=model,
        perplexity={"dense": 20.0, "compressed": 21.0},
        bits_per_weight=4.25,
        code_bits=4.0,
        sparsity=0.5,
        bytes={"dense": 4000, "compressed": 1000},
        seconds={"total": 1.0},
        peak_memory_bytes=1,
        sites=(),
        notes=["a note"],
    )


def test_a_saved_model_has_a_card_that_loads_it(llama: Any, tmp_path: Path) -> None:
    mpfx.save(pack_linears(llama), tmp_path / "mine")
    text = (tmp_path / "mine" / CARD).read_text()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "base_model" not in text
    code = text.split("```python\n")[1].split("```")[0]
    lines = code.splitlines()
    assert lines[0] == "import mpfx.hub"
    assert 'model = AutoModelForCausalLM.from_pretrained("mine")' in lines
    names: dict[str, Any] = {}
    exec("\n".join(lines[:4]).replace('"mine"', repr(str(tmp_path / "mine"))), names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert "mpfx.fill_masks(model)" in text.split("```")[2]
    mpfx.fill_masks(names["model"])
    mpfx.save(names["model"], tmp_path / "mine")
    assert "fill_masks" not in (tmp_path / "mine" / CARD).read_text()


def test_a_model_of_the_users_own_has_none(tmp_path: Path) -> None:
    mpfx.save(own(), tmp_path)
    assert not (tmp_path / CARD).exists()


def test_figures_of_the_run() -> None:
    text = model_card("out/small", CAUSAL, report())
    assert "base_model: someone/a-model\n" in text
    assert "# small\n" in text
    assert "| perplexity | 20.000 | 21.000 | 1.050 |" in text
    assert "| bytes | 4,000 | 1,000 | 0.250 |" in text
    assert "| stored bits per weight |  | 4.250 |  |" in text
    assert "- a note" in text


@pytest.mark.parametrize("model", ["smollm2-135m", "/data/a-model", "model.gguf", "a/b/c"])
def test_what_is_not_on_the_hub_is_no_base_model(model: str) -> None:
    assert "base_model" not in model_card("x", CAUSAL, report(model))


def test_other_classes_are_loaded_as_themselves() -> None:
    text = model_card("x", named("LlamaForSequenceClassification"))
    assert 'LlamaForSequenceClassification.from_pretrained("x")' in text
    assert "pipeline_tag" not in text


def test_a_card_of_the_users_stays(tmp_path: Path) -> None:
    write_card(tmp_path, tmp_path, model_card(tmp_path, CAUSAL))
    write_card(tmp_path, tmp_path, model_card(tmp_path, CAUSAL, report()))
    assert "4.250" in (tmp_path / CARD).read_text()
    (tmp_path / CARD).write_text("mine")
    write_card(tmp_path, tmp_path, model_card(tmp_path, CAUSAL))
    assert (tmp_path / CARD).read_text() == "mine"
