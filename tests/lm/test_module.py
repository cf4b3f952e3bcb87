from __future__ import annotations

import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mpfx.lm.module
from mpfx.lm import CausalLM, make_trainer
from mpfx.lm import evaluate as evaluate_loader
from mpfx.lm.module import next_tokens

Batch = dict[str, Tensor]


def make_batches(rows: tuple[int, ...] = (3, 1), length: int = 12) -> list[Batch]:
    """Batches of unequal size with right and left padding."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in rows:
        ids = torch.randint(1, 257, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 5 :] = 0
        mask[-1, :2] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


@torch.no_grad()
def reference(model: nn.Module, batches: list[Batch]) -> float:
    """Mean negative log-likelihood over all batches, in float64, one position at a time."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        labels = batch.get("labels", batch["input_ids"])
        for row in range(len(labels)):
            for position in range(1, labels.shape[1]):
                label = int(labels[row, position])
                if label == -100 or not batch["attention_mask"][row, position - 1 : position + 1].all():
                    continue
                scores = logits[row, position - 1]
                total += float(scores.logsumexp(0) - scores[label])
                count += 1
    return total / count


def evaluate(trainer: Trainer, module: CausalLM, batches: list[Batch]) -> dict[str, float]:
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    return evaluate_loader(trainer, module, loader)


def quiet_trainer(**options: Any) -> Trainer:
    return make_trainer(accelerator="cpu", devices=1, progress=False, **options)


def test_perplexity_agrees_with_float64_padding_included(llama: nn.Module) -> None:
    batches = make_batches()
    result = evaluate(quiet_trainer(), CausalLM(llama), batches)
    expected = reference(llama, batches)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_labels_of_minus_100_are_not_scored(llama: nn.Module) -> None:
    batches = make_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, 3:6] = -100
    expected = reference(llama, batches)
    assert expected != pytest.approx(reference(llama, make_batches()), rel=1e-3)
    assert evaluate(quiet_trainer(), CausalLM(llama), batches)["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_a_mask_every_token_but_the_first_counts(llama: nn.Module) -> None:
    ids = make_batches()[0]["input_ids"]
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    result = evaluate(quiet_trainer(), CausalLM(llama), [{"input_ids": ids}])
    assert result["loss"] == pytest.approx(reference(llama, [full]), rel=1e-5)


def test_content_of_right_padding_does_not_matter(llama: nn.Module) -> None:
    batches = make_batches()
    other = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    other[0]["input_ids"][0, -5:] = 99
    module = CausalLM(llama)
    results = [evaluate(quiet_trainer(), module, case)["loss"] for case in (batches, other)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_metrics_start_afresh_in_every_validation(llama: nn.Module) -> None:
    module, trainer = CausalLM(llama), quiet_trainer()
    first, second = make_batches((2,)), make_batches((3, 2))
    evaluate(trainer, module, first)
    assert evaluate(trainer, module, second) == evaluate(quiet_trainer(), CausalLM(llama), second)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_logits_are_scored_in_float32(llama: nn.Module, precision: str) -> None:
    batches = make_batches((4, 4, 4))
    expected = reference(llama, batches)
    result = evaluate(quiet_trainer(precision=precision), CausalLM(llama), batches)
    assert result["loss"] == pytest.approx(expected, rel=2e-2)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-5)
    if precision == "bf16-true":  # the model is bfloat16 now: its own logits in float64 are the reference
        assert result["loss"] == pytest.approx(reference(llama, batches), rel=1e-5)


def test_16_mixed_falls_back_to_bf16_on_a_cpu(llama: nn.Module) -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        trainer = quiet_trainer(precision="16-mixed")
    batches = make_batches()
    result = evaluate(trainer, CausalLM(llama), batches)
    assert result["loss"] == pytest.approx(reference(llama, batches), rel=2e-2)


class Recorder(nn.Module):
    """Returns fixed logits in one of the allowed forms, and remembers how it was called."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.calls: list[set[str]] = []

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        self.calls.append({"input_ids", *kwargs})
        logits = torch.nn.functional.one_hot(input_ids, 300).float()
        forms = {
            "tensor": logits,
            "tuple": (logits, None),
            "mapping": {"logits": logits},
            "object": SimpleNamespace(logits=logits),
            "nothing": None,
        }
        return forms[self.form]


class CacheRecorder(Recorder):
    def forward(self, input_ids: Tensor, use_cache: bool = True, **kwargs: Any) -> Any:
        assert use_cache is False
        return super().forward(input_ids, use_cache=use_cache, **kwargs)


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "object"])
def test_logits_are_found_in_every_form(form: str) -> None:
    result = evaluate(quiet_trainer(), CausalLM(Recorder(form)), [{"input_ids": torch.tensor([[5, 5, 5]])}])
    assert result["loss"] == pytest.approx(math.log(math.e + 299) - 1, rel=1e-5)


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(TypeError, match=r"logits of shape .* got NoneType"):
        evaluate(quiet_trainer(), CausalLM(Recorder("nothing")), make_batches())


def test_only_what_the_model_and_the_batch_know_is_passed() -> None:
    plain, cached = Recorder("tensor"), CacheRecorder("tensor")
    evaluate(quiet_trainer(), CausalLM(plain), [{"input_ids": torch.tensor([[1, 2]])}])
    evaluate(quiet_trainer(), CausalLM(cached), make_batches((2,)))
    assert plain.calls == [{"input_ids"}]
    assert cached.calls == [{"input_ids", "attention_mask", "use_cache"}]


def test_forward_calls_the_model(llama: nn.Module) -> None:
    batch = make_batches((2,))[0]
    module = CausalLM(llama)
    assert module.model is llama
    with torch.no_grad():
        assert torch.equal(module(**batch).logits, llama(**batch).logits)


def test_next_tokens_scores_real_tokens_after_real_tokens() -> None:
    batch = {"input_ids": torch.tensor([[7, 8, 9, 10, 11]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 0]])}
    assert next_tokens(batch).tolist() == [[-100, 9, 10, -100]]


@pytest.mark.parametrize("path", sorted(Path(mpfx.lm.module.__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    names = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            names.add(statement.module or "")
    assert names or path.name == "__init__.py"
    assert not {name.partition(".")[0] for name in names} & {"transformers", "datasets"}
