"""Models that come quantised, offloaded, adapted or wrapped: read right, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import probe
from probe.errors import UnsupportedModelError
from probe.fingerprint import fingerprint
from probe.tap import Tap, run
from tests.conftest import tiny_model
from tests.parallel import group as group
from tests.references import batch_of, eager, real_rows, same, watch
from tests.references import no_grad as no_grad

# what peft and torch.ao say about releases to come
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
]
Make = Callable[[str], Any]  # attention implementation -> model
BATCH = batch_of("llama", "left")
ROWS = real_rows(BATCH)[:, None, :, None]


def check(make: Make, tolerance: float = 1e-6) -> None:
    """Under eager the patterns are its own; under sdpa each layer is proven, the logits kept."""
    wanted = make("eager")(**BATCH, output_attentions=True).attentions
    tap = Tap(make("eager"))
    same(watch(tap, BATCH, "pattern")[1]["pattern"], [w.float() for w in wanted], tolerance, ROWS)
    tap.close()
    model = make("sdpa")
    logits = model(**BATCH).logits
    tap = Tap(model)
    assert torch.equal(model(**BATCH).logits, logits)
    read: list[int] = []
    output = run(tap, lambda i, _: read.append(i), BATCH, layers=tuple(tap.layers), proof=True)
    assert torch.equal(output.logits, logits)
    assert read == list(tap.layers)
    tap.close()
    assert torch.equal(model(**BATCH).logits, logits)


# ------------------------------------------------------------------------------ quantised weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama as wide as the blocks in which bitsandbytes quantises."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_quantised_by_bitsandbytes(checkpoint: Path, bits: int) -> None:
    config = cast(Any, BitsAndBytesConfig)(**{f"load_in_{bits}bit": True})

    def make(kernel: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint,
            quantization_config=config,
            device_map="cpu",
            attn_implementation=kernel,
        )

    assert "bitsandbytes" in type(make("sdpa").model.layers[0].mlp.up_proj).__module__
    check(make)


def test_linears_quantised_to_int8_while_running(family: str) -> None:
    def make(kernel: str) -> Any:
        model = tiny_model(family, kernel)
        quantize: Any = torch.ao.quantization.quantize_dynamic
        return quantize(model, {nn.Linear}, dtype=torch.qint8)

    if family != "gpt2":  # its projections are no Linear
        assert "quantized" in type(make("sdpa").model.layers[0].self_attn.q_proj).__module__
    check(make)


def test_two_models_quantised_to_int8_while_running_are_told_apart() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    prints = []
    for factor in (1, 1, 2):
        model: Any = tiny_model("llama")
        model.model.layers[0].self_attn.q_proj.weight.mul_(factor)
        model = quantize(model, {nn.Linear}, dtype=torch.qint8)
        prints.append(fingerprint(model, model))
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=["fp16", "bf16"]
)
def test_half_precision(family: str, dtype: torch.dtype, unit: float) -> None:
    # Eager rounds its scores, of up to about ten, and its pattern; the tap rounds neither.
    check(lambda kernel: tiny_model(family, kernel, dtype), tolerance=8 * unit)


# ------------------------------------------------------------------------------ offloaded weights


def offloaded_to_cpu(model: Any, _: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Path) -> Any:
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = dict.fromkeys(("model.layers.2", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return dispatch_model(model, places | rest, main_device="cpu", offload_dir=str(folder))


OFFLOADS = [offloaded_to_cpu, offloaded_to_disk, dispatched]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights(offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    folders = (tmp_path / str(n) for n in range(9))
    assert offload(tiny_model("llama"), next(folders)).device.type == "meta"
    check(lambda kernel: offload(tiny_model("llama", kernel), next(folders)))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_are_captured(
    offload: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    ids = BATCH["input_ids"].tolist()
    with probe.load(tiny_model("llama")) as model:
        wanted = probe.capture(model, ids, tmp_path / "all.zarr", progress=False).load()
        logits = model(ids).logits
    with probe.load(offload(tiny_model("llama"), tmp_path / "weights")) as model:
        got = probe.capture(model, ids, tmp_path / "off.zarr", progress=False).load()
        assert torch.equal(model(ids).logits, logits)
    assert (got.pattern == wanted.pattern).all()


# ------------------------------------------------------------------------------ adapters


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config)
    return adapted.train(mode=False)


def test_an_adapter_put_on_before_loading() -> None:
    check(lambda kernel: with_lora(tiny_model("llama", kernel)))


@pytest.mark.parametrize("touched", [False, True], ids=["", "tree touched before"])
def test_an_adapter_put_on_a_tapped_model(touched: bool) -> None:
    wanted = with_lora(tiny_model("llama", "eager"))(**BATCH, output_attentions=True).attentions
    assert float(((wanted[0] - eager("llama", BATCH)[0]) * ROWS).abs().max()) > 0.1
    model = tiny_model("llama")
    tap = Tap(model)
    if touched:
        str(tap.envoy)  # wraps every module
    adapted = with_lora(model)
    output, seen = watch(tap, BATCH, "pattern")
    same(seen["pattern"], wanted, 3e-6, ROWS)
    assert torch.equal(output.logits, adapted(**BATCH).logits)
    merged = adapted.merge_and_unload()
    same(watch(tap, BATCH, "pattern")[1]["pattern"], wanted, 5e-6, ROWS)
    tap.close()
    assert merged is model
    same([model(**BATCH).logits[ROWS[:, 0, :, 0]]], [output.logits[ROWS[:, 0, :, 0]]], 1e-5)


def test_an_adapter_that_is_switched_off_and_on_while_tapped() -> None:
    tap = Tap(with_lora(tiny_model("llama")))
    wrapped: Any = tap.module
    with wrapped.disable_adapter():
        same(watch(tap, BATCH, "pattern")[1]["pattern"], eager("llama", BATCH), 3e-6, ROWS)
    adapted = with_lora(tiny_model("llama", "eager"))(**BATCH, output_attentions=True).attentions
    same(watch(tap, BATCH, "pattern")[1]["pattern"], adapted, 3e-6, ROWS)
    tap.close()


def with_prompt(kernel: str) -> Any:
    torch.manual_seed(1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted: Any = get_peft_model(tiny_model("llama", kernel), config)
    return adapted.train(mode=False)


def with_prefix(kernel: str) -> Any:
    torch.manual_seed(1)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted: Any = get_peft_model(tiny_model("llama", kernel), config)
    return adapted.train(mode=False)


@pytest.mark.parametrize("make", [with_prompt, with_prefix])
def test_virtual_tokens_are_never_taken_for_the_text(make: Make) -> None:
    model = make("sdpa")
    logits = model(**BATCH).logits
    with pytest.raises(
        UnsupportedModelError, match=r"given 16 tokens, a LlamaAttention attends from 1[69] rows"
    ):
        probe.load(model)
    assert torch.equal(model(**BATCH).logits, logits)


# ------------------------------------------------------------------------------ wrappers


def sharded(kernel: str) -> Any:
    model: Any = tiny_model("llama", kernel)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Make] = {
    "DistributedDataParallel": lambda kernel: nn.parallel.DistributedDataParallel(
        tiny_model("llama", kernel)
    ),
    "DataParallel": lambda kernel: nn.DataParallel(tiny_model("llama", kernel)),
    "FSDP2": sharded,
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_inside_a_wrapper_of_torch(wrapper: str) -> None:
    check(WRAPPERS[wrapper])
