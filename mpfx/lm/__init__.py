"""Causal language models and their texts, as Lightning modules and data modules."""

from mpfx.lm.data import CalibrationData, EvaluationData, TextDataModule
from mpfx.lm.metrics import Perplexity, TokenLoss, target_log_probs
from mpfx.lm.module import CausalLM, losses_of, scored
from mpfx.lm.text import TextSource, parse_source, read_documents
from mpfx.lm.trainer import evaluate, make_trainer, quiet_lightning

__all__ = [
    "CalibrationData",
    "CausalLM",
    "EvaluationData",
    "Perplexity",
    "TextDataModule",
    "TextSource",
    "TokenLoss",
    "evaluate",
    "losses_of",
    "make_trainer",
    "parse_source",
    "quiet_lightning",
    "read_documents",
    "scored",
    "target_log_probs",
]
