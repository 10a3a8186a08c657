"""Load models and tokenizers: an offline default by name, a local folder, or a Hub id; always safetensors, never a pickle.

The offline defaults are made once from the asset and saved in `home()/models`. `smollm2-135m` is SmolLM2-135M-Instruct read from its Q4_1
GGUF into float32 (18 s; the saved checkpoint loads in well under a second). `smollm2-pico` is a random model with the same tokenizer, for
tests: its numbers mean nothing. A checkpoint is used only if every weight of the model is in it: a missing one would be random. Hub ids
go through the Hugging Face cache (`$HF_HOME`) as everywhere else.
"""

import contextlib
import difflib
import io
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.assets import ASSETS, build_once, fetch, home
from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.vetting import INDEX, UNTRUSTED, check_config, check_finite, check_folder, check_index, check_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MODELS", "load_model", "load_tokenizer"]

DTYPES = ("float32", "bfloat16", "float16")
_SOURCE = ASSETS["smollm2-135m"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_model(
    name: str | Path,
    *,
    dtype: "str | torch.dtype" = "float32",
    device: "str | torch.device" = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: `"smollm2-135m"` or `"smollm2-pico"` (no Hub needed), a local folder (dense or converted), or a Hub id.
        dtype: of the weights, one of `DTYPES` or the torch dtype of that name.
        device: a torch device.
        trust_remote_code: run Python code that a checkpoint brings along. Converted checkpoints do not need it here.
        attn_implementation: transformers' name of the attention code.

    Raises:
        InputError: no such name, folder or Hub id; no network; a broken config; weights that are missing, do not fit, are cut off or
            come as a pickle; code that was not trusted; no tokenizer; an unknown dtype or device.

    Example:
        >>> model, tokenizer = lab.load_model("smollm2-pico")
        >>> type(model).__name__, model.config.num_hidden_layers, model.dtype
        ('LlamaForCausalLM', 3, torch.float32)
    """
    from transformers import AutoModelForCausalLM

    import dynamoe_lab.models  # noqa: F401  registers the classes of converted checkpoints

    dtype, device = _dtype(dtype), _device(device)
    place = _locate(name)
    _vet(name, place, trust_remote_code)
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
    }
    with _quiet(bars=not isinstance(place, Path)), _as_input_error(name, place):
        # mismatched sizes are let through here and refused below, where their names are known
        model, found = AutoModelForCausalLM.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for problem, keys in (
        ("lacks", found["missing_keys"]),
        ("has other shapes for", found["mismatched_keys"]),
    ):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            kind = type(model).__name__
            raise InputError(f"model {name}: the checkpoint {problem} {shown}, which {kind} needs; give a complete checkpoint")
    if unused := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"model {name}: {len(unused)} weights of the checkpoint are not used, e.g. {unused[0]}",
            stacklevel=2,
        )
    check_finite(model, name)
    tokenizer = _load_tokenizer(name, place, trust_remote_code)
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device}: not usable here ({first_line(error)}); try cpu") from error


def _vet(name: str | Path, place: str | Path, trust_remote_code: bool) -> None:
    """Refuse a checkpoint for what can be seen without opening its weights."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.utils import cached_file

    if isinstance(place, Path):
        check_folder(place, trust_remote_code)
        with _quiet(), _as_input_error(name, place):
            check_config(PreTrainedConfig.get_config_dict(place)[0], name, trust_remote_code)  # which may be another file than config.json
            if not trust_remote_code:
                check_size(place, AutoConfig.from_pretrained(place, trust_remote_code=False), name)
        return
    with _quiet(bars=True), _as_input_error(name, place):
        check_config(PreTrainedConfig.get_config_dict(place)[0], name, trust_remote_code)
        index = cached_file(place, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        check_index(Path(index), name)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer alone, by the names that `load_model` takes.

    Raises:
        InputError: no such name, folder or Hub id; no network; no tokenizer there, or a broken one.

    Example:
        >>> tokenizer = lab.load_tokenizer("smollm2-pico")
        >>> tokenizer.decode(tokenizer("Hello there")["input_ids"])
        'Hello there'
    """
    return _load_tokenizer(name, _locate(name), trust_remote_code)


def _load_tokenizer(name: str | Path, place: str | Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    import dynamoe_lab.models  # noqa: F401

    files = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tokenizer_config.json",
    )
    if isinstance(place, Path) and not any((place / file).is_file() for file in files):
        raise InputError(f"model {name}: the folder holds no tokenizer; save one there with tokenizer.save_pretrained({str(place)!r})")
    with _quiet(bars=not isinstance(place, Path)), _as_input_error(f"{name}, its tokenizer", place):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)


def _locate(name: str | Path) -> str | Path:
    """The folder for a known name or an existing folder, else the name as a Hub id."""
    if name in MODELS:
        build, megabytes = MODELS[name]
        recipe = {"asset": _SOURCE.sha256, "recipe": _RECIPE}
        return build_once(home() / "models" / name, recipe, build, what=f"model {name}", megabytes=megabytes)
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long for a file, or of a user that is not there
        folder, is_folder, is_file = Path(), False, False
    if str(name) and is_folder:  # Path("") is the working directory
        return folder
    if is_file:
        raise InputError(f"model {name}: a file; give the folder that holds its config.json and safetensors")
    near = difflib.get_close_matches(str(name)[:100], MODELS, n=1, cutoff=0.75)
    if isinstance(name, Path) or near or not _HUB_ID.fullmatch(name):
        hint = f"; did you mean {near[0]}?" if near else f"; known names: {', '.join(MODELS)}"
        raise InputError(f"model {str(name)!r}: no such folder, and not a Hub id (owner/name){hint}")
    return name


def _dtype(dtype: "str | torch.dtype") -> "torch.dtype":
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _device(device: "str | torch.device") -> "torch.device":
    import torch

    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r}: not a torch device; write cpu, cuda, cuda:0 or mps") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: torch sees no CUDA device here; use cpu")
    return chosen


@contextlib.contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """Transformers without progress bars (unless `bars`, for downloads) and warnings: what matters becomes an error of ours."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if shown and not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown and not bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_input_error(name: str | Path, place: str | Path) -> Iterator[None]:
    """Turn what transformers raises about a bad checkpoint into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise InputError(f"model {name}: a safetensors file is cut off or damaged ({first_line(error)}); copy it again") from error
    except InputError:
        raise
    except Exception as error:  # a config may lead transformers and torch into anything
        if "trust_remote_code" in str(error):
            raise InputError(f"model {name}: {UNTRUSTED}") from error
        if isinstance(place, Path):
            raise InputError(f"model {name}: cannot be loaded ({first_line(error)}); give a checkpoint that transformers loads") from error
        raise InputError(
            f"model {name!r}: no such folder, and the Hub did not give it ({first_line(error)}); without the Hub: {', '.join(MODELS)}"
        ) from error


# ---- the offline defaults ----

_RECIPE = 1  # count up when what the functions below write changes: saved models are then made again


def _build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a plain float32 checkpoint: transformers refuses to save what it read from a GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    print("making model smollm2-135m from its GGUF, once, about 20 s", file=sys.stderr, flush=True)
    source, file = _gguf()
    with (
        _quiet(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # the GGUF reader draws a bar that no setting turns off
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    old = read.config
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=float(f"{old.rms_norm_eps:.6g}"),  # a float32 in the GGUF
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    _save(folder, source, model, _gguf_tokenizer(source, file))


def _build_pico(folder: Path) -> None:
    """A random three-layer Llama with the real tokenizer, so that tests walk every path in seconds.

    Weights are drawn with standard deviation 0.2 (0.02 would leave the residual stream to the embeddings alone), and the columns of each
    down projection are scaled by a log-normal, more widely in later layers: after reordering at theta 0.9, layers 0, 1, 2 label about
    1/24/65/10, 5/49/44/2 and 19/63/17/0 % of the tokens with experts 0 to 3, so every table of labels has something in it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source, file = _gguf()
    tokenizer = _gguf_tokenizer(source, file)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for layer, spread in zip(model.model.layers, (0.2, 0.4, 0.6), strict=True):
            layer.mlp.down_proj.weight.mul_(torch.exp(spread * torch.randn(config.intermediate_size)))
    _save(folder, source, model, tokenizer)


def _gguf() -> tuple[Path, str]:
    folder, _, file = _SOURCE.members[0].rpartition("/")
    return fetch("smollm2-135m") / folder, file


def _gguf_tokenizer(source: Path, file: str) -> "PreTrainedTokenizerBase":
    """The GGUF's tokenizer, with the one thing transformers drops put back: it splits off digits before anything else.

    The GGUF says `tokenizer.ggml.pre = smollm` (llama.cpp: split at every `\\p{N}`, then as GPT-2). Without that, spaces before a number
    are cut differently; on code lines with numbers the model's loss is then 1.3 % higher.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _quiet():
        read = AutoTokenizer.from_pretrained(source, gguf_file=file)
    backend = read.backend_tokenizer
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    special = {f"{kind}_token": getattr(read, f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=read.chat_template, model_max_length=8192, **special)


def _save(folder: Path, source: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copyfile(source.parent / _SOURCE.licence, folder / "LICENSE")


MODELS: dict[str, tuple[Callable[[Path], None], int]] = {  # name -> (how it is made, MB it takes)
    "smollm2-135m": (_build_smollm2, 545),
    "smollm2-pico": (_build_pico, 20),
}
