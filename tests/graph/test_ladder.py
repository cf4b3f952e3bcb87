"""What becomes of a model of which only parts can be recorded, and what is known of the other parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import TraceError, bind_inputs, input_groups, sites, trace
from mpfx.graph.attempt import record
from mpfx.graph.errors import Diagnosis
from mpfx.graph.live import WHOLE, opaque_parts, record_of

WIDTH = 8
Body = Callable[[Any, Tensor], Any]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return y


class Gated(nn.Module):
    """Two MLPs, called in another order than they are registered in; decides on values."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.never = Mlp(), Mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e9:  # the line of the report
            y = -y
        z: Tensor = self.second(y) + x
        return z


class Body1(nn.Module):
    """Calls ``body(self, x)``; has a linear layer, so that it is no leaf."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.lin, self.body = nn.Linear(WIDTH, WIDTH), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Around(nn.Module):
    """Goes on with the result of a part by ``after(self, result, x)``."""

    def __init__(self, body: Body, after: Callable[[Any, Any, Tensor], Any]) -> None:
        super().__init__()
        self.part, self.lin, self.after = Body1(body), nn.Linear(WIDTH, WIDTH), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.part(x), x)


def decided(x: Tensor) -> bool:
    return bool(x.sum() < 1e9)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_report_of_an_opaque_part() -> None:
    module = nn.Sequential(Mlp(), Gated(), Mlp())
    gm = trace(module, (torch.randn(2, 5, WIDTH),))
    (part,) = opaque_parts(gm)
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "line of the report" in text)
    assert (part.path, part.module_type) == ("1", "Gated")
    assert part.where == f"{__file__}:{line}"
    assert "values of a tensor" in part.problem
    assert "torch.where" in part.advice
    names = ("gate", "up", "down")
    assert part.calls == (*(f"1.first.{name}" for name in names), *(f"1.second.{name}" for name in names))
    assert "6 linear layers" in str(part)
    assert "`second`, `first`" in str(part)
    assert str(part).startswith(Diagnosis.__str__(part))
    with pytest.raises(TraceError) as refused:
        trace(module, (torch.randn(2, 5, WIDTH),), whole=True)
    assert str(refused.value) == f"Cannot trace {Diagnosis.__str__(part)}"
    assert record_of(gm).opaque == {"1": part}
    assert record_of(gm).linears["1.first.gate"].dense_reason is None


def test_the_inside_of_an_opaque_part() -> None:
    module = nn.Sequential(Mlp(), Gated())
    (part,) = opaque_parts(trace(module, (torch.randn(2, 5, WIDTH),)))
    assert list(part.inside) == ["second", "first"]
    inner, x = part.inside["first"], torch.randn(3, 4, WIDTH)
    assert torch.equal(inner(x), module[1].first(x))  # type: ignore[operator]
    assert [[site.path for site in group.sites] for group in input_groups(inner)] == [["gate", "up"], ["down"]]
    assert record_of(inner).model is module.get_submodule("1.first")
    module.set_submodule("1.first.gate", nn.Linear(WIDTH, 6))
    assert torch.equal(inner(x), module[1].first(x))  # type: ignore[operator]


@pytest.mark.parametrize("whole", [False, True])
def test_replaced_modules_reach_opaque_parts(whole: bool) -> None:
    inner = Gated()
    module: nn.Module = inner if whole else nn.Sequential(Mlp(), inner)
    gm, x = trace(module, (torch.randn(2, 5, WIDTH),)), torch.randn(3, 4, WIDTH)
    before = gm(x)
    prefix = "" if whole else "1."
    module.set_submodule(f"{prefix}first.gate", nn.Linear(WIDTH, 6))
    gm.set_submodule(f"{prefix}second.down", nn.Linear(6, WIDTH))
    assert not torch.allclose(gm(x), before)
    assert torch.equal(gm(x), module(x))


def test_the_call_of_a_whole_model() -> None:
    module = Gated()
    gm = trace(module, (torch.randn(2, 5, WIDTH),))
    (part,) = opaque_parts(gm)
    assert (part.path, list(part.inside)) == ("", ["second", "first"])
    assert part.calls[0] == "first.gate"
    calls = gm.graph.find_nodes(op="call_module")
    assert [node.target for node in calls] == [WHOLE]
    assert gm.get_submodule(WHOLE) is module
    assert WHOLE not in dict(gm.named_modules())
    assert gm.state_dict().keys() == module.state_dict().keys()
    assert tuple(site.path for site in sites(gm)) == part.calls
    assert bind_inputs(gm, (torch.randn(4, 2, WIDTH),)).keys() == {"x"}
    with pytest.raises(ValueError, match="3 dimensions of"):
        gm(torch.randn(2, WIDTH))


def test_arguments_of_a_whole_model() -> None:
    class Settings:
        scale = 3.0

    class Flexible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor, *rest: Tensor, flag: bool = True, extra: Any = None, **more: Any) -> Any:
            y = self.mlp(x) * (extra.scale if extra else 1) + sum(rest) + more["parts"]["a"][0]
            if y.sum() > 1e9 or not flag:
                y = -y
            return {"y": y, "flag": flag, "list": [y, None]}

    module, x = Flexible(), torch.randn(2, 5, WIDTH)
    gm = trace(module, (x, x), {"extra": Settings(), "parts": {"a": [x]}})
    other = torch.randn(3, 4, WIDTH)
    values = bind_inputs(gm, (other, other), {"extra": Settings(), "parts": {"a": [other]}})
    expected = module(other, other, extra=Settings(), parts={"a": [other]})
    found = gm(**values)
    assert found.keys() == {"y", "list"}
    assert torch.equal(found["y"], expected["y"])
    left_out = gm(x=other, rest_0=other, parts={"a": [other]})  # the object of the trace takes its place
    assert torch.equal(left_out["y"], expected["y"])
    with pytest.raises(ValueError, match="`flag` to be True"):
        gm(**{**values, "flag": False})


def test_layers_of_one_class_need_no_attempt_each(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def counted(*args: Any) -> None:
        attempts.append(args)
        record(*args)

    monkeypatch.setattr("mpfx.graph.ladder.record", counted)
    module = nn.Sequential(*[Body1(lambda s, x: s.lin(x) if decided(x) else x) for _ in range(8)])
    gm = trace(module, (torch.randn(2, 5, WIDTH),))
    assert len(opaque_parts(gm)) == 8
    assert len(attempts) == 3  # whole; opaque on fakes; opaque, learned from real runs


# Learned forms

FORMS: dict[str, tuple[Body, Callable[[Any, Any, Tensor], Any]]] = {
    "same": (lambda s, x: s.lin(x) if decided(x) else x, lambda s, y, x: s.lin(y) + x),
    "flat": (lambda s, x: x.reshape(-1, WIDTH) if decided(x) else x, lambda s, y, x: s.lin(y).view(x.shape)),
    "one more": (lambda s, x: torch.cat([x, x[:, :1]], 1) if decided(x) else x, lambda s, y, x: s.lin(y)[:, 1:] + x),
    "half": (
        lambda s, x: x[:, : x.shape[1] // 2] if decided(x) else x,
        lambda s, y, x: s.lin(y).view(-1, x.shape[1] // 2, 2, 4),
    ),
    "half up": (lambda s, x: x[:, ::2] if decided(x) else x, lambda s, y, x: s.lin(y) + x[:, ::2]),
    "twice": (lambda s, x: torch.cat([x, x]) if decided(x) else x, lambda s, y, x: s.lin(y) + torch.cat([x, x])),
    "chosen rows": (
        lambda s, x: x.reshape(-1, WIDTH)[(x.reshape(-1, WIDTH)[:, 0] > float(x[0, 0, 0]) - 1)],
        lambda s, y, x: s.lin(y).sum(0) + x,
    ),
    "transposed": (lambda s, x: x.transpose(0, 1) if decided(x) else x, lambda s, y, x: s.lin(y) + x.transpose(0, 1)),
    "itself": (lambda s, x: x if decided(x) else -x, lambda s, y, x: s.lin(y) + x.mul_(2)),
    "size": (
        lambda s, x: (s.lin(x), x.shape[1] + 1, "on", None) if decided(x) else x,
        lambda s, y, x: s.lin(y[0]) * y[1] if y[2] == "on" else x,
    ),
    "dict": (
        lambda s, x: {"a": [s.lin(x)], "b": x.sum(1)} if decided(x) else x,
        lambda s, y, x: y["a"][0] + y["b"][:, None],
    ),
    "object": (lambda s, x: (s.lin(x), {1, 2}) if decided(x) else x, lambda s, y, x: s.lin(y[0])),
    "integers": (lambda s, x: x.argmax(-1) if decided(x) else x, lambda s, y, x: s.lin(x) + y[..., None]),
}


@pytest.mark.parametrize(("body", "after"), FORMS.values(), ids=FORMS)
def test_sizes_of_results_that_only_a_real_run_shows(body: Body, after: Any, run_in_blocks: Any) -> None:
    module = Around(body, after)
    gm = trace(module, (torch.randn(3, 5, WIDTH),))
    assert [part.path for part in opaque_parts(gm)] == ["part"]
    inside = list(opaque_parts(gm)[0].calls)
    assert [site.path for site in sites(gm)] == inside + (["lin"] if "lin" in after.__code__.co_names else [])
    for batch, length in [(2, 9), (5, 4), (4, 30)]:
        x = torch.randn(batch, length, WIDTH)
        torch.testing.assert_close(gm(x.clone()), module(x.clone()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run_in_blocks(gm, x.clone()), module(x.clone()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("traced", [1, 3])
def test_batch_of_one(traced: int) -> None:
    module = Around(*FORMS["same"])
    gm = trace(module, (torch.randn(traced, 5, WIDTH),))
    for batch in (1, 2, 4):
        x = torch.randn(batch, 7, WIDTH)
        assert torch.equal(gm(x), module(x))


def test_other_form_of_a_result_is_an_error_and_no_wrong_result() -> None:
    def grows(self: Any, x: Tensor) -> Any:
        return self.lin(x) if x.abs().max() < 100 else self.lin(x)[:, :2]

    gm = trace(Around(grows, lambda s, y, x: s.lin(y).sum(1)), (torch.randn(3, 5, WIDTH),))
    gm(torch.randn(2, 7, WIDTH))
    with pytest.raises(
        ValueError, match=r"`result` of `part` to be .*\(2, 7, 8\).*but got .*\(2, 2, 8\).*What to change"
    ):
        gm(torch.full((2, 7, WIDTH), 200.0))


@pytest.mark.parametrize(
    ("large", "got"),
    [
        (lambda y: (y, False), "True, .* got False"),
        (lambda y: (y, True, y), "nothing, .* got a tensor"),
        (lambda y: (y,), "True, .* got nothing"),
        (lambda y: (None, True), "a tensor of .* got None"),
        (lambda y: (y.double(), True), "torch.float32 .* got a tensor of torch.float64"),
    ],
)
def test_other_values_in_a_result_are_an_error(large: Any, got: str) -> None:
    def flagged(self: Any, x: Tensor) -> Any:
        y = self.lin(x)
        return (y, True) if x.abs().max() < 100 else large(y)

    gm = trace(Around(flagged, lambda s, y, x: y[0] if y[1] else -y[0]), (torch.randn(3, 5, WIDTH),))
    assert [part.path for part in opaque_parts(gm)] == ["part"]
    gm(torch.randn(2, 7, WIDTH))
    with pytest.raises(ValueError, match=got):
        gm(torch.full((2, 7, WIDTH), 200.0))


def test_flag_that_depends_on_values_leaves_the_decision_to_the_model() -> None:
    module = Around(lambda s, x: (s.lin(x), bool(x.sum() > 0)), lambda s, y, x: y[0] if y[1] else -s.lin(y[0]))
    gm = trace(module, (torch.randn(3, 5, WIDTH),))
    assert [part.path for part in opaque_parts(gm)] == [""]
    for shift in (-1, 1):
        x = torch.randn(2, 4, WIDTH) + shift
        assert torch.equal(gm(x), module(x))


class Cache:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


def test_object_with_tensors_in_a_result() -> None:
    def cached(self: Any, x: Tensor) -> Any:
        cache = Cache()
        cache.tensors.append(self.lin(x) if decided(x) else x)
        return cache.tensors[0], cache

    handed_on = Around(cached, lambda s, y, x: (s.lin(y[0]), y[1]))
    gm, x = trace(handed_on, (torch.randn(3, 5, WIDTH),)), torch.randn(2, 4, WIDTH)
    assert [part.path for part in opaque_parts(gm)] == ["part"]
    assert torch.equal(gm(x)[0], handed_on(x)[0])
    read = Around(cached, lambda s, y, x: s.lin(y[0]) + y[1].tensors[0])
    gm = trace(read, (torch.randn(3, 5, WIDTH),))
    assert [part.path for part in opaque_parts(gm)] == [""]
    assert torch.equal(gm(x), read(x))


def test_model_that_runs_on_the_example_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.w = (
                Body1(lambda s, x: s.lin(x) if decided(x) else x),
                nn.Parameter(torch.randn(3, 5, WIDTH)),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x) * self.w
            return y

    module = Fixed()
    gm, x = trace(module, (torch.randn(3, 5, WIDTH),)), torch.randn(3, 5, WIDTH)
    assert torch.equal(gm(x), module(x))


def test_part_that_is_called_twice() -> None:
    module = Around(lambda s, x: s.lin(x) if decided(x) else x, lambda s, y, x: s.lin(s.part(torch.cat([y, x], 1))))
    gm, x = trace(module, (torch.randn(3, 5, WIDTH),)), torch.randn(2, 7, WIDTH)
    assert torch.equal(gm(x), module(x))
    assert len([node for node in gm.graph.find_nodes(op="call_module") if node.target == "part"]) == 2


def test_part_without_result_still_runs() -> None:
    def counts(self: Any, x: Tensor) -> None:
        self.count = getattr(self, "count", 0) + (1 if decided(x) else 2)

    module = Around(counts, lambda s, y, x: s.lin(x))
    gm = trace(module, (torch.randn(3, 5, WIDTH),))
    gm(torch.randn(2, 7, WIDTH))
    assert module.part.count == 1


def test_autocast_around_the_trace_and_inside() -> None:
    def cast(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.lin(x)

    module = Around(cast, lambda s, y, x: s.lin(y.float()))
    gm, x = trace(module, (torch.randn(3, 5, WIDTH),)), torch.randn(2, 7, WIDTH)
    assert torch.equal(gm(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gm(x), module(x))


def test_inside_is_traced_in_the_autocast_of_its_call() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y: Tensor = self.second(self.first(x))
            return y.float()

    module = Casts()
    (part,) = opaque_parts(trace(module, (torch.randn(3, 5, WIDTH),)))
    assert list(part.inside) == ["first", "second"]  # the second reads bfloat16 with weights in float32


def test_language_model_with_an_opaque_attention(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = family("llama")
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def decides(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.sum() > 1e9:
            hidden_states = -hidden_states
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", decides)
    gm = trace(model, (), sample(2, 9) | {"use_cache": False})
    assert [part.path for part in opaque_parts(gm)] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [path.rpartition(".")[2] for path in opaque_parts(gm)[0].calls] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert len(sites(gm)) == 15
    for other in (sample(3, 13), sample(1, 6)):
        batch = other | {"use_cache": False}
        with torch.no_grad():
            assert torch.allclose(gm(**batch)["logits"], model(**batch).logits, atol=1e-5)
