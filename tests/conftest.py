"""Devices, seeds, poisoned memory, and a tiny model made on the spot."""

import gc
import math
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; threads only wait
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels run on the CPU

# The same examples every time, however busy the machine is.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

REPO = Path(__file__).parent.parent
ARITHMETIC = REPO / "examples" / "arithmetic"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Interpreted, a bf16 tl.dot multiplies the bit patterns: wrong, and no exception.
KERNEL_DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request, monkeypatch) -> str:
    """Each backend in turn. On a CPU Triton is interpreted, and the extension emulated."""
    serve_by(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["triton", "cuda"])
def kernels(request, monkeypatch) -> str:
    """The backends with kernels in turn, on any device."""
    serve_by(request.param, monkeypatch)
    return request.param


@pytest.fixture
def triton_backend(monkeypatch):
    """Triton's kernels, on any device."""
    serve_by("triton", monkeypatch)


@pytest.fixture
def cuda_backend(monkeypatch):
    """The extension, on any device."""
    serve_by("cuda", monkeypatch)


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The number of projections of each group of layers that is computed, in order."""
    from lorapar_kernels import lora_linear_group  # not before Triton knows that it interprets

    seen = []

    def counted(x, projections, **options):
        seen.append(len(projections))
        return lora_linear_group(x, projections, **options)

    monkeypatch.setattr("lorapar.groups.lora_linear_group", counted)
    return seen


def serve_by(backend: str, monkeypatch) -> None:
    """By this backend, and by its kernels however few the rows are."""
    monkeypatch.setenv("LORAPAR_BACKEND", backend)
    monkeypatch.setattr("lorapar_kernels.few_rows.serves", lambda x: False)
    if backend == "cuda":
        _extension(monkeypatch)


def _extension(monkeypatch) -> None:
    """The extension where it is built; on a CPU, one with emulated kernels."""
    from lorapar_kernels import extension

    if DEVICE == "cuda":
        if not extension.available():
            pytest.skip(f"no CUDA extension: {extension.why_not}")
        return
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    from emulator.module import emulated_module

    monkeypatch.setattr(extension, "module", emulated_module())
    monkeypatch.setattr(extension, "device", "cpu")


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, in Python and in C++, so an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    """What is there by now is no garbage: to walk it again and again took a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """What is marked `more` is slow, but for the interpreter's cases on other backends."""
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if DEVICE == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(skip)
        if item.get_closest_marker("more"):
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            if any(value in ("reference", "cuda") for value in values if isinstance(value, str)):
                item.own_markers = [mark for mark in item.own_markers if mark.name != "more"]
            else:
                item.add_marker("slow")


def beyond(some: list, every: list) -> list:
    """Parameters: `every` value, `more` where it is not among `some`."""
    return [
        pytest.param(value, id=str(value), marks=() if value in some else pytest.mark.more)
        for value in every
    ]


def make_tiny_model(seed: int = 0, vocab_size: int = 1024, **changes):
    """A random two-layer Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def make_lora(model, *, init_std: float = 0.05, **changes):
    """The model with a LoRA adapter whose A and B are both random."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    peft_model = get_peft_model(model, LoraConfig(**(settings | changes)))
    if init_std:
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if "lora_" in name:
                    p.normal_(0, init_std)
    return peft_model


@pytest.fixture
def tiny():
    return make_tiny_model()


@pytest.fixture
def lora():
    return make_lora(make_tiny_model())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random tiny model with the example's tokenizer, on disk."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model().save_pretrained(folder)
    AutoTokenizer.from_pretrained(ARITHMETIC / "base").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ARITHMETIC / "base", padding_side="left")


def released_rule(values: list[float], theta: float) -> set[int]:
    """example.py's selection: in descending order, up to the element that reaches theta · total."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    total, running, kept = math.fsum(values), 0.0, set()
    for i in order:
        running += values[i]
        kept.add(i)
        if running >= theta * total:
            break
    return kept


@pytest.fixture
def serve(monkeypatch):
    """Starts a `chat_server.ChatServer` that answers by the function it is given."""
    from chat_server import ChatServer, by_number

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(answer=by_number):
        servers.append(ChatServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
