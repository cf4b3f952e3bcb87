"""Tiny models and batches that the whole suite shares."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mpfx.lm import make_trainer, quiet_lightning

VOCABULARY = 160

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several processes share the cores


def build_llama(**overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()
    with torch.no_grad():  # initial weights are so small that every token comes out equally likely
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "embed" not in name else 30)
    return model


def build_opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return OPTForCausalLM(config).eval()


def build_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).eval()


BUILDERS: dict[str, Callable[[], Any]] = {"llama": build_llama, "opt": build_opt, "gpt2": build_gpt2}


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    return build_llama


@pytest.fixture
def llama() -> Any:
    return build_llama()


@pytest.fixture(params=list(BUILDERS))
def language_model(request: pytest.FixtureRequest) -> Any:
    return BUILDERS[request.param]()


def token_batches(count: int = 4, batch: int = 4, length: int = 48, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)} for _ in range(count)]


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return token_batches()


@pytest.fixture
def validate() -> Callable[..., None]:
    """Run one validation loop, as a user would, with the callbacks given."""

    def run(module: pl.LightningModule, batches: Any, *callbacks: pl.Callback, **trainer: Any) -> None:
        options = {"accelerator": "cpu", "devices": 1, "progress": False, **trainer}
        with quiet_lightning():
            loader = DataLoader(batches, batch_size=None)
            make_trainer(callbacks=callbacks, **options).validate(module, loader, verbose=False)

    return run


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(GPU)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No test may leave a global switch of torch changed."""
    call, grad = nn.Module.__call__, torch.is_grad_enabled()
    yield
    assert nn.Module.__call__ is call
    assert torch.is_grad_enabled() == grad


@pytest.fixture
def chain() -> nn.Module:
    """Two MLPs, each of which reads its input twice, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(GatedMLP(8, 12), GatedMLP(8, 12), nn.Linear(8, 3)).eval()


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return x + out
