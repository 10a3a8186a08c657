"""An environment that has everything but dynamoe_lab, and what a fresh process in it finds out about checkpoints."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch
from conftest import PICO

PROGRAM = """
import importlib.util, json, sys, traceback
from pathlib import Path
assert importlib.util.find_spec("dynamoe_lab") is None, "dynamoe_lab can be imported here"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


@torch.no_grad()
def check(folder):
    found = {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found["module"] = type(model).__module__
    expected = torch.load(folder / "expected.pt", weights_only=True)
    ids = expected.pop("ids")
    output = model(ids, output_router_logits=True)
    found["logits"] = float((output.logits - expected.pop("logits")).abs().max())
    loss = expected.pop("loss", None)
    for name, value in expected.items():
        found[name] = float((torch.stack(output[name]) - value).abs().max())

    prompt = greedy = ids[:2, :6]
    for _ in range(8):  # without a cache, one whole forward a token
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    found["generates"] = torch.equal(cached, greedy)

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, trust_remote_code=True)
    text = write(tokenizer.decode(prompt[0]), return_full_text=False, **options)[0]["generated_text"]
    found["pipeline"] = [text.split(), tokenizer.decode(greedy[0, 6:]).split()]

    again = folder / "again"
    model.save_pretrained(again)
    assert not list(again.glob("*.bin"))
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    found["reloaded"] = float((reloaded(ids).logits - output.logits).abs().max())
    if loss is not None:
        torch.manual_seed(0)
        with torch.enable_grad():
            ours = model.train()(ids, labels=ids).loss
            ours.backward()
        found["loss"] = [float(ours.detach()), float(loss)]
    return found


results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        results[folder.name] = check(folder)
    except Exception:
        results[folder.name] = {"error": traceback.format_exc()}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


def bare_environment(folder: Path) -> Path:
    """The Python of a virtual environment with everything that is installed here but this package and .pth files."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if (
                not entry.name.startswith(("dynamoe_lab", "__editable__"))
                and entry.suffix != ".pth"
                and not (packages / entry.name).exists()
            ):
                (packages / entry.name).symlink_to(entry)
    return Path(sysconfig.get_path("scripts", "venv", vars={"base": str(folder)})) / Path(sys.executable).name


def word_tokenizer():
    """A tokenizer of one word a token, made here: `w17` is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(PICO["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pack(model, folder: Path, expected: dict) -> None:
    """Save a checkpoint with a tokenizer, and what `PROGRAM` compares: ids, logits, loss (in training, seed 0), and stacked outputs."""
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    torch.save(expected, folder / "expected.pt")


def travel(folder: Path) -> dict[str, dict]:
    """What one fresh process without this package finds in each checkpoint of `folder/models`."""
    (folder / "program.py").write_text(PROGRAM)
    keep = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HF_MODULES_CACHE": str(folder / "modules"), "HOME": str(folder)}
    command = [bare_environment(folder / "venv"), folder / "program.py", folder / "models", folder / "results.json"]
    done = subprocess.run(command, cwd=folder, env={**keep, **cache}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "results.json").read_text())
