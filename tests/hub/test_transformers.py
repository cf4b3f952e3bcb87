"""transformers' own way: ``from_pretrained``, ``save_pretrained``, ``generate``, ``pipeline``, and lm-eval on it."""

import copy
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)

import mpfx
import mpfx.hub
from mpfx.bench.models import random_model
from mpfx.hub import MpfxConfig
from mpfx.hub.checkpoint import CheckpointError, tensor_bytes
from mpfx.nn import MixedPrecisionLinear
from mpfx.nn.experts import PackedExperts
from tests.conftest import BUILDERS, build_llama
from tests.hub.models import Change, changed, edit, edit_weights, full, pack_linears, without
from tests.hub.test_experts import language_model as moe
from tests.hub.test_experts import pack_experts


def tokenizer(vocabulary: int = 160) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"[end]": vocabulary - 1}
    built = Tokenizer(models.WordLevel(words, unk_token="[end]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[end]", eos_token="[end]", pad_token="[end]")


def ids(length: int = 9) -> Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))


def experts(name: str, masked: bool) -> Callable[[], Any]:
    def build() -> Any:
        model = moe(name)
        pack_experts(model, transposed=name == "GptOss", masked=masked, coded=masked)
        return model

    return build


PACKED: dict[str, Callable[[], Any]] = {
    **{name: lambda build=build: pack_linears(build()) for name, build in BUILDERS.items()},  # type: ignore[misc]
    "tied": lambda: pack_linears(build_llama(tie_word_embeddings=True)),
    "Mixtral": experts("Mixtral", masked=False),
    "GptOss": experts("GptOss", masked=True),
}


@pytest.fixture(params=list(PACKED))
def model(request: pytest.FixtureRequest) -> Any:
    return PACKED[request.param]()


@pytest.fixture
def llama() -> Any:
    return PACKED["llama"]()


@pytest.fixture
def silent() -> Iterator[None]:
    """transformers logs what it makes up or leaves out instead of raising."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not [text for record in records if "token_id" not in (text := record.getMessage())]


def from_pretrained(folder: Path, **options: Any) -> Any:
    both: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    loaded, info = both
    assert not any(info.values()), info
    assert not loaded.training
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    return loaded


@pytest.mark.usefixtures("silent")
def test_all_ways_give_the_same_logits(model: Any, tmp_path: Path) -> None:
    want = model(ids()).logits
    mpfx.save(model, tmp_path)
    ways: list[dict[str, Any]] = [{"device_map": place} for place in (None, "cpu", {"": "cpu"}, "auto")]
    for way in (*ways, {"dtype": "auto"}, {}):
        loaded = from_pretrained(tmp_path, **way)
        assert torch.equal(loaded(ids()).logits, want)
    other: Any = mpfx.load(tmp_path)
    assert torch.equal(other(ids()).logits, want)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    kinds = {type(module) for module in loaded.modules()}
    assert kinds & {MixedPrecisionLinear, PackedExperts} == {type(m) for m in model.modules()} & {
        MixedPrecisionLinear,
        PackedExperts,
    }
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids(5), **options)
    assert torch.equal(loaded.generate(ids(5), **options), generated)
    assert torch.equal(loaded.generate(ids(5), **options, cache_implementation="static"), generated)


@pytest.mark.usefixtures("silent")
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_saving_again_gives_the_same_bytes(model: Any, tmp_path: Path) -> None:
    want = model(ids()).logits
    mpfx.save(model, tmp_path / "first")
    before = load_file(tmp_path / "first" / "model.safetensors")
    for index, loaded in enumerate((from_pretrained(tmp_path / "first"), mpfx.load(tmp_path / "first"))):
        folder = tmp_path / f"again{index}"
        loaded.save_pretrained(folder)
        after = load_file(folder / "model.safetensors")
        assert set(after) == set(before)
        assert all(
            torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
        )
        assert torch.equal(from_pretrained(folder)(ids()).logits, want)
        assert not (folder / "mpfx.json").exists()
        again: Any = mpfx.load(folder)
        assert torch.equal(again(ids()).logits, want)
        mpfx.save(again, folder)  # a folder of ours, so it may be replaced
        assert (folder / "mpfx.json").exists()


def test_shared_permutations_and_tied_tensors_stay_shared(tmp_path: Path) -> None:
    mpfx.save(PACKED["tied"](), tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.permutation is attention.k_proj.permutation
    names = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in names
    assert len([name for name in names if name.startswith("mpfx:permutation:")]) == 2


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("says_tied", [False, True])
def test_what_is_tied_follows_the_model_not_its_config(tmp_path: Path, says_tied: bool) -> None:
    model = pack_linears(build_llama(tie_word_embeddings=says_tied))
    model.lm_head.weight = nn.Parameter(torch.randn(160, 64)) if says_tied else model.model.embed_tokens.weight
    want = model(ids()).logits
    mpfx.save(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) != says_tied
    assert torch.equal(loaded(ids()).logits, want)


class TestBuffers:
    """Buffers that the state dict leaves out, and buffers that are one tensor."""

    @pytest.mark.usefixtures("silent")
    def test_rotary_tables_come_from_the_file(self, llama: Any, tmp_path: Path) -> None:
        llama.model.rotary_emb.inv_freq.mul_(0.5)
        want = llama(ids()).logits
        mpfx.save(llama, tmp_path)
        assert torch.equal(from_pretrained(tmp_path)(ids()).logits, want)

    @pytest.mark.usefixtures("silent")
    @pytest.mark.parametrize("persistent", [False, True])
    def test_shared_buffers(self, llama: Any, tmp_path: Path, monkeypatch: Any, persistent: bool) -> None:
        start = type(llama).__init__

        def build(self: Any, config: Any) -> None:
            start(self, config)
            table = torch.zeros(3)
            for part in (self.model, self.model.norm):
                part.register_buffer("table", table, persistent=persistent)

        for part in (llama.model, llama.model.norm):
            part.register_buffer("table", torch.full((3,), 7.0), persistent=persistent)
        llama.model.norm.table = llama.model.table
        mpfx.save(llama, tmp_path)
        monkeypatch.setattr(type(llama), "__init__", build)
        loaded = from_pretrained(tmp_path)
        assert loaded.model.norm.table.eq(7).all()
        assert loaded.model.table.eq(7).all()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, saved: torch.dtype) -> None:
    model = PACKED["opt"]().to(saved)
    model.model.decoder.final_layer_norm.float()
    mpfx.save(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == kinds
    assert loaded.model.decoder.layers[0].fc1.weight.dtype == saved
    cast = from_pretrained(tmp_path, dtype=torch.float64)
    assert cast.dtype == cast.model.decoder.layers[0].fc1.weight.dtype == torch.float64
    assert cast.model.decoder.layers[0].fc1.bias.dtype == torch.float64
    assert torch.equal(cast(ids()).logits, mpfx.load(tmp_path).to(torch.float64)(ids()).logits)
    cast.save_pretrained(tmp_path / "cast")
    assert torch.equal(from_pretrained(tmp_path / "cast")(ids()).logits, cast(ids()).logits)


@pytest.mark.usefixtures("silent")
def test_shards(llama: Any, tmp_path: Path) -> None:
    want = llama(ids()).logits
    mpfx.save(llama, tmp_path)
    mpfx.save(mpfx.load(tmp_path), tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded: Any = mpfx.load(tmp_path)
    assert torch.equal(loaded(ids()).logits, want)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(ids()).logits, want)
    again.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert torch.equal(from_pretrained(tmp_path / "again")(ids()).logits, want)
    mpfx.save(llama, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="`max_shard_size` to be bytes or a text such as '5GB' but got 'much'"):
        mpfx.save(llama, tmp_path, max_shard_size="much")


INDEXES: list[tuple[Change, str]] = [
    (lambda data: data.pop("weight_map"), "expected `weight_map`"),
    (lambda data: data["weight_map"].update({"lm_head.weight": "../other.safetensors"}), "expected `weight_map`"),
    (lambda data: data["weight_map"].update({"lm_head.weight": 3}), "expected `weight_map`"),
    (lambda data: data["weight_map"].pop("model.norm.weight"), r"\['model.norm.weight'\] are not where it says"),
    (lambda data: data["weight_map"].update({"more": data["weight_map"]["lm_head.weight"]}), r"\['more'\] are not"),
]


@pytest.mark.parametrize(("change", "message"), INDEXES)
def test_a_damaged_index_is_refused(llama: Any, tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(llama, tmp_path, max_shard_size="30KB")
    path = tmp_path / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        mpfx.load(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        mpfx.load(tmp_path)


def test_a_shard_that_is_lacking_or_twice(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path, max_shard_size="30KB")
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=rf"{second.name}: expected .* once but .*{first.name} has it too"):
        mpfx.load(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {second.name}"):
        mpfx.load(tmp_path)


@pytest.mark.usefixtures("silent")
def test_the_two_files_that_the_hub_gives_are_enough(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path / "whole")
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "hub")
    assert torch.equal(from_pretrained(tmp_path / "hub")(ids()).logits, llama(ids()).logits)


def config_edited(change: Change) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mpfx.json").unlink()

    return run


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(os.path.getsize(folder / "model.safetensors") - 1)


SITE = "model.layers.0.mlp.down_proj"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut, "is damaged"),
    (lambda folder: edit_weights(folder, without(f"{SITE}.codes")), "`codes` is missing"),
    (lambda folder: edit_weights(folder, changed(f"{SITE}.codes", lambda t: t[:-1])), f"{SITE}: Expected `codes`"),
    (lambda folder: edit_weights(folder, changed(f"{SITE}.widths", full(77))), "Expected widths in"),
    (
        lambda folder: edit_weights(folder, changed(f"{SITE}.row_scales", full(float("inf")))),
        f"{SITE}: Expected `row_s",
    ),
    (lambda folder: edit_weights(folder, changed("mpfx:permutation:0", torch.zeros_like)), "to be a permutation"),
    (lambda folder: edit_weights(folder, without("model.norm.weight")), r"lacks \['model\.norm\.weight'\]"),
    (lambda folder: edit_weights(folder, changed("model.norm.weight", lambda t: t[:-1])), "other shapes"),
    (lambda folder: edit(folder, lambda m: m["sites"].pop(SITE)), rf"lacks \['{SITE}\.weight'"),
    (lambda folder: edit(folder, lambda m: m["sites"][SITE].update(in_features=32)), "Expected|expected"),
    (
        config_edited(lambda c: c.update(version=9)),
        r"config\.json to be 'mpfx' version 3 or 4 but got 'mpfx' version 9",
    ),
    (config_edited(lambda c: c.update(segment=16)), r"config\.json: expected `segment` to be 32"),
    (config_edited(lambda c: c.pop("sites")), r"config\.json: expected the fields"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_folders_are_refused(llama: Any, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    mpfx.save(llama, tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        mpfx.load(tmp_path)


def test_a_manifest_and_a_config_of_two_checkpoints(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path)
    manifest = json.loads((tmp_path / "mpfx.json").read_text())
    manifest["sites"][SITE]["dtype"] = "float16"
    (tmp_path / "mpfx.json").write_text(json.dumps(manifest))
    for load in (AutoModelForCausalLM.from_pretrained, mpfx.load):
        with pytest.raises(CheckpointError, match=r"describe the same checkpoint but got other `sites`"):
            load(tmp_path)


def test_other_classes_and_uses_are_refused(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"LlamaModel lacks: .* the class of model that was saved"):
        AutoModel.from_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"to be \.safetensors files but got none"):
        LlamaForCausalLM.from_pretrained(None, config=llama_config(tmp_path / "packed"), state_dict={})
    build_llama().save_pretrained(tmp_path / "dense")
    config = MpfxConfig(**json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"])
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)


def llama_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_layers_on_the_disk(tmp_path: Path) -> None:
    model = PACKED["opt"]()
    want = model(ids()).logits
    mpfx.save(model, tmp_path / "model")
    places = {"model.decoder.layers.1": "disk", "model.decoder.layers.0": "cpu", "lm_head": "cpu"}
    places |= {f"model.decoder.{n}": "cpu" for n in ("embed_tokens", "embed_positions", "final_layer_norm")}
    options: dict[str, Any] = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert torch.equal(loaded(ids()).logits, want)
    with pytest.raises(ValueError, match="is offloaded: leave `offload_buffers` out"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options, offload_buffers=True)


def test_config_and_quantizer_can_be_copied_and_shown(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path)
    loaded = copy.deepcopy(from_pretrained(tmp_path))
    assert "MpfxConfig(sites=21, experts=0)" in repr(loaded.config.quantization_config)
    assert loaded.hf_quantizer.is_serializable()
    assert not loaded.hf_quantizer.is_trainable
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["quantization_config"]["quant_method"] == "mpfx"
    assert "extra" not in written["quantization_config"]
    assert not hasattr(llama.config, "quantization_config")  # the user's model stays as it is


def test_pipeline(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path, tokenizer=tokenizer())
    generate: Any = pipeline("text-generation", model=str(tmp_path))
    (result,) = generate("w1 w2 w3", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("w1 w2 w3")
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, MixedPrecisionLinear)


def run_python(code: str, *arguments: Any) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_one_import_is_enough_and_mpfx_alone_stays_light(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path)
    load = "import mpfx.hub, sys; from transformers import AutoModelForCausalLM; "
    print_class = "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    assert run_python(load + print_class, tmp_path).strip() == "MixedPrecisionLinear"
    light = (
        "import sys, mpfx; print('transformers' in sys.modules, 'mpfx.hub' in sys.modules); print(mpfx.load.__name__)"
    )
    assert run_python(light).split() == ["False", "False", "load"]


@pytest.mark.filterwarnings("ignore")  # of lm-eval's own, and of transformers about how lm-eval calls it
def test_lm_eval(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    mpfx.save(llama, tmp_path / "model", tokenizer=tokenizer())
    questions: list[dict[str, Any]] = [
        {"q": f"w{i} w{i + 1}", "answers": [f"w{i + 2}", f"w{i + 9}"], "gold": i % 2} for i in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        **{
            "task": "tiny",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/data.jsonl"}},
        },
        **{"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "answers"},
        **{"doc_to_target": "gold", "metric_list": [{"metric": "acc"}]},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(task))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "max_length": 64},
        tasks=["tiny"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    choices = [[llama_choice(llama, row["q"], answer) for answer in row["answers"]] for row in questions]
    right = [
        max((0, 1), key=lambda k: scores[k]) == row["gold"] for scores, row in zip(choices, questions, strict=True)
    ]
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(sum(right) / len(right))


def llama_choice(model: Any, question: str, answer: str) -> float:
    words = torch.tensor([[int(word[1:]) for word in (*question.split(), answer)]])
    logits: Tensor = model(words).logits
    return float(logits[0, -2].log_softmax(-1)[words[0, -1]])


STATIC: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def compressed_llama() -> Any:
    """A Llama whose layers mix widths, as most plans have them."""
    return random_model(build_llama().config, torch.device("cpu"), torch.float32, bits=4.9)


def test_a_static_cache_generates_the_same(tmp_path: Path) -> None:
    mpfx.save(compressed_llama(), tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.hf_quantizer.is_compileable
    tokens = loaded.generate(ids(5), **STATIC)
    assert torch.equal(loaded.generate(ids(5), **STATIC, cache_implementation="static"), tokens)
    assert len(set(tokens[:, 5:].flatten().tolist())) > 3


@pytest.mark.parametrize("load", [from_pretrained, mpfx.load])
def test_what_no_graph_can_hold_is_not_compiled(load: Callable[[Path], Any], tmp_path: Path) -> None:
    """A bitmask, which all layers of ``llama`` have, and experts."""
    models = {"plain": compressed_llama(), "masked": PACKED["llama"](), "experts": PACKED["Mixtral"]()}
    found = {}
    for name, model in models.items():
        mpfx.save(model, tmp_path / name)
        found[name] = load(tmp_path / name).hf_quantizer.is_compileable
    assert found == {"plain": True, "masked": False, "experts": False}


@pytest.mark.parametrize("load", [from_pretrained, mpfx.load])
def test_filled_masks_can_be_compiled(load: Callable[[Path], Any], tmp_path: Path) -> None:
    mpfx.save(PACKED["llama"](), tmp_path)
    model = load(tmp_path)
    other = copy.deepcopy(model)
    tokens = model.generate(ids(5), **STATIC)
    assert mpfx.fill_masks(model) == 3 * 7
    assert model.hf_quantizer.is_compileable
    assert not other.hf_quantizer.is_compileable
    assert torch.equal(model.generate(ids(5), **STATIC, cache_implementation="static"), tokens)


@torch.no_grad()
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", ["llama", "tied", "opt", "GptOss"])
@pytest.mark.parametrize("load", [from_pretrained, mpfx.load])
def test_filled_masks(name: str, load: Callable[[Path], Any], tmp_path: Path) -> None:
    """The same logits, in a file as large as the model has become."""
    small = mpfx.save(PACKED[name](), tmp_path / "small")
    model = load(tmp_path / "small")
    exact, logits = copy.deepcopy(model).double()(ids()).logits, model(ids()).logits
    assert mpfx.fill_masks(model)
    assert torch.equal(copy.deepcopy(model).double()(ids()).logits, exact)  # in plain PyTorch
    found = model(ids()).logits
    assert float((found - logits).norm()) <= 1e-3 * float(logits.norm())
    large = mpfx.save(model, tmp_path / "large")
    assert large == tensor_bytes(model) > small
    model.save_pretrained(tmp_path / "again")
    for folder in ("large", "again"):
        assert not [tensor for tensor in load_file(tmp_path / folder / "model.safetensors") if tensor.endswith(".mask")]
        loaded = load(tmp_path / folder)
        assert torch.equal(loaded(ids()).logits, found)
        assert mpfx.fill_masks(loaded) == 0


@pytest.mark.parametrize("load", [from_pretrained, mpfx.load])
def test_a_model_that_is_let_go_of_is_gone(load: Callable[[Path], Any], tmp_path: Path) -> None:
    """Its dense weights at once: what it is loaded with does not keep it."""
    mpfx.save(PACKED["llama"](), tmp_path)
    model = load(tmp_path)
    head = weakref.ref(model.lm_head.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert head() is None
    finally:
        gc.enable()


def test_packed_models_compile_as_one_graph() -> None:
    """What ``generate`` compiles on a CUDA device: a decoding step over a static cache."""
    model = compressed_llama()
    cache = StaticCache(config=model.config, max_cache_len=16)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        model(ids(5)[:1], past_key_values=cache)
        step: Any = torch.compile(model, backend=backend, fullgraph=True)
        found = step(ids(6)[:1, 5:], past_key_values=cache).logits
        assert torch.allclose(found, model(ids(6)[:1]).logits[:, -1:], atol=1e-3)
    assert len(graphs) == 1
    assert str(graphs[0].code).count("mpfx.linear") == 3 * 7
    torch._dynamo.reset()


def test_generate_compiles_where_it_is_told_to(tmp_path: Path) -> None:
    """By default it does so on CUDA devices alone."""
    mpfx.save(compressed_llama(), tmp_path)
    loaded = from_pretrained(tmp_path)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True)
    config._compile_all_devices = True  # type: ignore[assignment]
    tokens = loaded.generate(ids(5), **STATIC)
    assert torch.equal(loaded.generate(ids(5), **STATIC, cache_implementation="static"), tokens)
    assert not graphs
    options = {**STATIC, "cache_implementation": "static", "compile_config": config}
    assert torch.equal(loaded.generate(ids(5), **options), tokens)
    assert graphs
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # the compiler imports it
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_static_cache_compiles_and_generates_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` compiles by itself where the quantizer lets it."""
    mpfx.save(compressed_llama(), tmp_path)
    loaded = from_pretrained(tmp_path, device_map="cuda")
    compiled: list[Any] = []
    compile = torch.compile

    def counted(*arguments: Any, **options: Any) -> Any:
        compiled.append(arguments)
        return compile(*arguments, **options)

    monkeypatch.setattr(torch, "compile", counted)
    tokens = loaded.generate(ids(5).cuda(), **STATIC)
    assert torch.equal(loaded.generate(ids(5).cuda(), **STATIC, cache_implementation="static"), tokens)
    assert compiled
    torch._dynamo.reset()


def test_shards_outside_of_the_folder_are_refused(llama: Any, tmp_path: Path) -> None:
    mpfx.save(llama, tmp_path / "model", max_shard_size=20_000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    shard.rename(tmp_path / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(CheckpointError, match="expected all weights in this folder but got"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
