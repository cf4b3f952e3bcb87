from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from mpfx.lm import CausalLM, evaluate, make_trainer, quiet_lightning


def loader(batches: int = 1) -> DataLoader[Any]:
    windows: Any = [{"input_ids": torch.tensor([1, 2, 3])}] * batches
    return DataLoader(windows)


class Counter(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_validation_batch_end(self, *args: Any) -> None:
        self.batches += 1


def test_validation_is_silent_and_writes_nothing(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    counter = Counter()
    trainer = make_trainer(accelerator="cpu", devices=1, callbacks=(counter,), progress=False)
    result = evaluate(trainer, CausalLM(llama), loader(batches=2))
    assert set(result) == {"perplexity", "loss"}
    assert all(type(value) is float for value in result.values())
    assert counter.batches == 2
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_progress_can_be_shown(llama: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(accelerator="cpu", devices=1, progress=True)
    evaluate(trainer, CausalLM(llama), loader())
    assert "Validation" in "".join(capfd.readouterr())


def test_quiet_lightning_lets_warnings_pass_and_restores(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(logger.filters)
    with caplog.at_level(logging.INFO, logger=logger.name):
        with quiet_lightning():
            logger.info("banner")
            logger.warning("important")
        with pytest.raises(KeyError), quiet_lightning():
            raise KeyError
    assert logger.filters == before
    assert "important" in caplog.text
    assert "banner" not in caplog.text


class Silent(LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def test_a_module_that_logs_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="logged nothing"):
        evaluate(make_trainer("cpu", 1, progress=False), Silent(), loader())
