"""A packed language model."""

from typing import Any

import pytest

from mpfx.callbacks import ModelCompression
from mpfx.lm import CausalLM
from tests.hub.models import CONFIG, Batches


@pytest.fixture
def packed(llama: Any, batches: Batches, validate: Any) -> Any:
    validate(CausalLM(llama), batches, ModelCompression(CONFIG, module="model"))
    return llama
