from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import TraceError, bind_inputs, trace


class Flexible(nn.Module):
    """Takes arguments of all kinds, writes to its buffer, and keeps something from each call."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.ones(8)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, scale: float = 2.0, *rest: Tensor, flag: bool = True, **more: Any) -> Any:
        self.calls.add_(1)
        self.seen.append(x)
        self.last = x
        y = self.a(x) * scale + self.plain + self.calls
        for other in (*rest, *more["extra"]["parts"]):
            y = y + other
        return {"y": y if flag else -y, "nothing": None, "list": [y + 1, 3]}


def flexible_call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(4, 8), 3.0, torch.randn(4, 8)), {"extra": {"parts": [torch.randn(4, 8)]}}


def test_arguments_of_all_kinds() -> None:
    module = Flexible()
    args, kwargs = flexible_call()
    gm = trace(module, args, kwargs)
    assert module.calls == 0
    assert module.seen == []
    assert not hasattr(module, "last")
    args, kwargs = flexible_call()
    module.calls.zero_()
    expected = module(*args, **kwargs)
    module.calls.zero_()
    values = bind_inputs(gm, args, kwargs)
    assert values.keys() == {"x", "rest_0", "extra", "scale", "flag"}
    assert values["flag"] is True
    result = gm(**values)
    assert result.keys() == {"y", "list"}
    assert torch.equal(result["y"], expected["y"])
    assert torch.equal(result["list"][0], expected["list"][0])
    assert module.calls == 1


def test_calls_that_differ_from_the_traced_one_are_refused() -> None:
    args, kwargs = flexible_call()
    gm = trace(Flexible(), args, kwargs)
    bind_inputs(gm, args, kwargs)
    with pytest.raises(ValueError, match="`flag` to be True"):
        bind_inputs(gm, args, {**kwargs, "flag": False})
    with pytest.raises(ValueError, match=r"`extra\['more'\]` was not there"):
        bind_inputs(gm, args, {"extra": {**kwargs["extra"], "more": 1}})
    with pytest.raises(ValueError, match=r"`extra\['parts'\]\[0\]`, which was there"):
        bind_inputs(gm, args, {"extra": {"parts": []}})
    with pytest.raises(ValueError, match=r"`x` with 2 dimensions of torch.float32"):
        bind_inputs(gm, (args[0].double(), *args[1:]), kwargs)
    with pytest.raises(ValueError, match=r"`scale` to be 3\.0"):
        bind_inputs(gm, (args[0], 2.0, args[2]), kwargs)
    with pytest.raises(TypeError, match="rest_0"):
        bind_inputs(gm, args[:2], kwargs)


def test_object_that_holds_tensors_is_refused(family: Any) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    model, sample = family("llama")
    cache = cache_utils.DynamicCache()
    gm = trace(model, (), sample(2, 5) | {"past_key_values": cache})
    assert len(cache) == 0
    bind_inputs(gm, (), sample(2, 5) | {"past_key_values": cache_utils.DynamicCache()})
    model(**sample(2, 5), past_key_values=cache)
    with pytest.raises(TraceError, match="`past_key_values` is a DynamicCache that holds tensors"):
        trace(model, (), sample(2, 5) | {"past_key_values": cache})
    with pytest.raises(ValueError, match="past_key_values"):
        gm(**sample(2, 5), past_key_values=cache)
