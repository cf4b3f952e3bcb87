"""Causal language models and their texts, as Lightning modules and data modules."""

from mpfx.lm.data import CalibrationData, EvaluationData, TextDataModule
from mpfx.lm.metrics import Perplexity, TokenLoss, target_log_probs
from mpfx.lm.module import CausalLM, losses_of, scored
from mpfx.lm.sharing import EachOnce, leave_out_of_sync
from mpfx.lm.text import TextSource, parse_source, read_documents
from mpfx.lm.trainer import evaluate, is_first_process, make_trainer, quiet_lightning, start_processes

__all__ = [
    "CalibrationData",
    "CausalLM",
    "EachOnce",
    "EvaluationData",
    "Perplexity",
    "TextDataModule",
    "TextSource",
    "TokenLoss",
    "evaluate",
    "is_first_process",
    "leave_out_of_sync",
    "losses_of",
    "make_trainer",
    "parse_source",
    "quiet_lightning",
    "read_documents",
    "scored",
    "start_processes",
    "target_log_probs",
]
