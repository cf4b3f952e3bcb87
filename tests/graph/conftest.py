"""Models that the graph tests trace: members of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx, nn

from mpfx.graph import OUTPUT, bind_inputs, blocks, last_readers, run_block
from tests.zoo import Sample, build

Family = Callable[..., tuple[nn.Module, Callable[..., Sample]]]


@pytest.fixture
def family() -> Family:
    """Build ``(model, sample)``: the model in evaluation mode, and ``sample(batch, length, padded=True)``."""
    return build


@pytest.fixture
def run_in_blocks() -> Callable[..., Any]:
    """Run the blocks of a graph one after the other, each of them twice, as a solver does."""

    def run(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        parts = blocks(gm)
        readers = last_readers(parts)
        env = bind_inputs(gm, args, kwargs)
        for block in parts:
            run_block(block, env, readers)
            env = run_block(block, env, readers)
        return env[OUTPUT]

    return run
