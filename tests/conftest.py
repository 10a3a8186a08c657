"""Pico models of every family, random blocks, and a tidy machine: no Hub, no windows, caches in temporary folders."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; processes started here would inherit it
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

PICO = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that experts differ and labels vary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a family's pico model has besides or instead; None: a field that its config does not have
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": False},  # of 3 layers, every 4th would be none
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,  # shorter than the blocks, so that it matters
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "olmo2": {},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": False},
    "gpt_neox": {"num_key_value_heads": None, "tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False},
    "opt": {
        "num_key_value_heads": None,
        "intermediate_size": None,
        "ffn_dim": PICO["intermediate_size"],
        "initializer_range": None,
        "init_std": PICO["initializer_range"],
        "tie_word_embeddings": False,
    },
}


def make_dense(family: str = "llama", *, dtype: str = "float32", **changes):
    """A random dense model of a family, in eval mode, the same for the same arguments; biases are random, too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {name: value for name, value in {**PICO, **FAMILIES[family], **changes}.items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in fresh models, where a bias that is lost or not reordered would not show
                parameter.normal_(std=PICO["initializer_range"])
    return model


def make_blocks(n: int = 8, context: int = 24, seed: int = 0):
    """Random token blocks; one document a block, two domains."""
    import torch

    from dynamoe_lab.data import Blocks

    ids = torch.randint(3, PICO["vocab_size"], (n, context), generator=torch.Generator().manual_seed(seed))
    document = torch.arange(n)[:, None].expand(n, context).clone()
    return Blocks(ids, document, ["web" if row % 2 else "code" for row in range(n)])


def make_converted(family: str = "llama", experts=(0.25, 0.5, 0.75, 1.0), theta: float = 0.7, dense=None, **changes):
    """A converted pico model whose routers disagree with each other token by token."""
    from dynamoe_lab.conversion import convert
    from dynamoe_lab.models import DynaMoEConfig

    config = DynaMoEConfig(experts=experts, theta=theta, router_hidden_size=16, router_init_std=1.0, **changes)
    return convert(make_dense(family) if dense is None else dense, config, calibration=make_blocks(seed=7))


def make_tomoe(family: str = "llama", *, dense=None, **changes):
    """A masked pico model in eval mode, fresh: nearly everything open; attention is left whole where a family's heads cannot be pruned."""
    from dynamoe_lab.conversion import convert
    from dynamoe_lab.models import FAMILIES, ToMoEConfig

    attention = "none" if FAMILIES[family].whole_heads else "hybrid"
    values = {"num_experts": 4, "embedding_size": 16, "noise_size": 8, "attention": attention, **changes}
    return convert(make_dense(family) if dense is None else dense, ToMoEConfig(**values))


def weights(model):
    """A copy of a model's weights and buffers by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def close(ours, theirs):
    """Equal but for the rounding of sums in another order."""
    import torch

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def interrupt(process, number=signal.SIGINT):
    """Ctrl-C, again if need be, as a person does: an interrupt that lands in a callback of the event loop is lost. -> stdout, stderr"""
    for _ in range(4):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=30)
    process.kill()
    raise AssertionError(f"four interrupts did not stop it: {process.communicate()}")


LONG = ("test_notebooks.py", "test_sweep.py", "test_training.py", "test_notebook_runner.py", "test_bad_inputs.py")


def pytest_collection_modifyitems(items):
    """Files that take longest first, so that two workers end together."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))  # stable


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of the test's own: configs/ and an empty notebooks/, the working directory in it."""
    root = tmp_path / "project"
    shutil.copytree(Path(__file__).parents[1] / "configs", root / "configs")
    (root / "notebooks").mkdir()
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def blocks():
    return make_blocks()


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch, request):
    """Tests write to a cache of their own; those that need the real assets share the machine's."""
    if "real" not in request.keywords and "assets" not in request.keywords:
        monkeypatch.setenv("DYNAMOE_LAB_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of the test module's own for steps; the assets in it are those of the machine."""
    from dynamoe_lab.assets import home as machine_home
    from dynamoe_lab.data import load_blocks
    from dynamoe_lab.loading import load_model

    _, tokenizer = load_model("smollm2-pico")
    load_blocks("c4", tokenizer, context=8, tokens=8)
    folder = tmp_path_factory.mktemp("home-with-assets")
    for part in ("assets", "models"):
        (folder / part).symlink_to(machine_home() / part)
    return folder


@pytest.fixture(scope="module")
def stepping(home):
    """`step` as `Run.step` is, and what it was asked: (function, cached)."""
    from dynamoe_lab.workbench.steps import run_step

    asked = []

    def step(function, *args, **kwargs):
        done = run_step(function, args, kwargs, home=home)
        asked.append((function.__name__, done.cached))
        return done.value

    return step, asked
