"""Bad inputs that come with a model, an archive, a task file or a report of others; see `bad_inputs`."""

import functools
import hashlib
import json
import os
import pickle
import shutil
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import Case, alias_bomb, hostile_yaml, written

__all__ = ["CHECKPOINTS", "Bomb", "saved"]


class Bomb:
    """An object whose pickle writes the file `ran` when it is opened."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


def byte_tokenizer():
    """A byte-level tokenizer of 257 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@functools.cache
def saved(kind: str) -> Path:
    """A pico checkpoint with a tokenizer, made once a process: dense, dynamoe, masked or tomoe."""
    from conftest import make_converted, make_dense, make_tomoe

    from dynamoe_lab.conversion import export

    makers = {"dense": make_dense, "dynamoe": make_converted, "masked": make_tomoe, "tomoe": lambda: export(make_tomoe())}
    folder = Path(tempfile.mkdtemp(prefix="pico-")) / kind
    makers[kind]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def model(change: Callable[[Path], object], kind: str = "dense") -> Callable[[Path], object]:
    """Loading of a pico checkpoint with one thing wrong."""

    def call(place):
        from dynamoe_lab.loading import load_model

        folder = place / "model"
        shutil.copytree(saved(kind), folder)
        change(folder)
        return load_model(folder)

    return call


def config(kind: str = "dense", **changes) -> Callable[[Path], object]:
    return model(lambda folder: edit(folder / "config.json", changes), kind)


def moe(kind: str = "dynamoe", **changes) -> Callable[[Path], object]:
    def change(folder):
        own = json.loads((folder / "config.json").read_text())["moe"]
        edit(folder / "config.json", {"moe": {**own, **changes}})

    return model(change, kind)


def edit(path: Path, changes: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edited(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return model(edited)


def file(name: str, content: str | bytes | None) -> Callable[[Path], object]:
    """A checkpoint one file of which has this content, or is gone."""
    return model(lambda folder: (folder / name).unlink() if content is None else written(folder, name, content))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def a_pickle_for_a_shard(folder: Path) -> None:
    """With `use_safetensors=True`, too, transformers opens what the index names."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "shard.bin").write_bytes(pickle.dumps(Bomb()))
    written(folder, "model.safetensors.index.json", json.dumps({"weight_map": {"model.norm.weight": "shard.bin"}}))


def shards(mapping: object) -> Callable[[Path], object]:
    def change(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        written(folder, "model.safetensors.index.json", json.dumps(mapping))

    return model(change)


def own_code(folder: Path) -> None:
    edit(folder / "config.json", {"model_type": "foo", "auto_map": {"AutoConfig": "foo.Config", "AutoModelForCausalLM": "foo.Model"}})
    written(folder, "foo.py", "open('ran', 'w')")


def tokenizer_code(folder: Path) -> None:
    written(folder, "tokenizer_config.json", json.dumps({"tokenizer_class": "Foo", "auto_map": {"AutoTokenizer": ["foo.Foo", None]}}))
    written(folder, "foo.py", "open('ran', 'w')")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def set_nan(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def set_infinite(tensors: dict) -> None:
    tensors["model.embed_tokens.weight"][3, 5] = float("inf")


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("toy/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def encrypted(path: Path) -> None:
    """The flag alone, in both headers: zipfile asks for a password before it reads a byte."""
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    path.write_bytes(data)


def archive(*members, raw: bytes | None = None, change: Callable[[Path], object] | None = None, pinned: bool = True):
    """`fetch` of an asset whose wheel holds these (name, bytes) beside a licence."""

    def call(place):
        from dynamoe_lab import assets

        wheel = place / "toy-1.0-py3-none-any.whl"
        with warnings.catch_warnings(), zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as content:
            warnings.simplefilter("ignore")  # of a name that is there twice
            for name, data in (("toy/LICENSE", b"free"), *members):
                content.writestr(name, data)
        if change is not None:
            change(wheel)
        if raw is not None:
            wheel.write_bytes(raw)
        sha = hashlib.sha256(wheel.read_bytes() if pinned else b"").hexdigest()
        toy = assets.Asset("toy", "1.0", wheel.name, sha, 1, 1, "toy/LICENSE", ("toy/",))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(assets.ASSETS, "toy", toy)
            patch.setattr(assets, "_download", lambda *_: wheel)
            return assets.fetch("toy")

    return call


TASK = (
    "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\noutput_type: multiple_choice\n"
    "doc_to_text: '{{q}}'\ndoc_to_target: a\ndoc_to_choice: c\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)


def task(*changes: tuple[str, str], content: str | bytes | None = None, data: str = '{"q": "a", "c": ["x", "y"], "a": 0}\n'):
    """A task file with one thing wrong."""

    def call(place):
        from dynamoe_lab.evaluation.tasks import load_tasks

        written(place, "d.jsonl", data)
        written(place, "mine.py", "open('ran', 'w')\ndef text(document):\n    return ''")
        own = TASK
        for old, new in changes:
            assert old in own
            own = own.replace(old, new, 1)
        return load_tasks([written(place, "mine.yaml", own if content is None else content)])

    return call


def record(**changes) -> Callable[[Path], object]:
    """The report page of a record with one thing wrong."""

    def call(place):
        from dynamoe_lab.workbench.records import Record, RunInfo
        from dynamoe_lab.workbench.report import build_report

        folder = place / "report" / "01_a"
        folder.mkdir(parents=True)
        Record(RunInfo("01_a", status="ok")).write(folder)
        content = json.loads((folder / "record.json").read_text())
        for section, values in changes.items():
            content[section] |= values
        written(folder, "record.json", json.dumps(content))
        return build_report(folder.parent, expected=[])

    return call


def raw_record(content: str | bytes) -> Callable[[Path], object]:
    def call(place):
        from dynamoe_lab.workbench.records import load_record

        return load_record(written(place, "record.json", content).parent)

    return call


def listing(name: str) -> dict:
    return {"results": {"tables": [{"stem": "x", "caption": "c", "files": [{"name": name, "sha256": "0", "bytes": 1}]}]}}


UP = "model.layers.0.mlp.up_proj.weight"
MODELS: dict[str, Case] = {
    "model: no config": (file("config.json", None), ["no config.json", "give the folder of a checkpoint"]),
    "model: config no JSON": (file("config.json", '{"model_type":'), ["config.json", "not valid JSON", "restore it"]),
    "model: config too deep": (file("config.json", "[" * 100_000), ["config.json", "nested too deeply"]),
    "model: config UTF-16": (file("config.json", "{}".encode("utf-16")), ["config.json", "utf-8"]),
    "model: no model_type": (file("config.json", "[1]"), ["has no model_type"]),
    "model: unknown type": (config(model_type="gpt9"), ["gpt9", "cannot be loaded"]),
    "model: wrong type of field": (config(hidden_size="x"), ["cannot be loaded", "hidden_size"]),
    "model: no heads": (config(num_attention_heads=0), ["cannot be loaded", "ZeroDivisionError"]),
    "model: unknown activation": (config(hidden_act="evil"), ["cannot be loaded", "evil"]),
    "model: a million layers": (config(num_hidden_layers=10**6), ["1,000,000 layers", "restore config.json"]),
    "model: more memory than there is": (config(hidden_size=10**9), ["parameters", "restore config.json"]),
    "model: other shapes": (config(intermediate_size=100), ["other shapes for", "give a complete checkpoint"]),
    "model: a weight is missing": (weights(lambda tensors: tensors.pop(UP)), ["lacks", UP]),
    "model: a weight of another shape": (weights(lambda t: t.update({UP: t[UP][:5].clone()})), ["other shapes for", UP]),
    "model: nan weights": (weights(set_nan), ["model.layers.1.mlp.up_proj.weight", "not finite"]),
    "model: infinite weights": (weights(set_infinite), ["model.embed_tokens.weight", "not finite"]),
    "model: weights cut off": (model(cut), ["cut off or damaged", "copy it again"]),
    "model: weights are a page": (file("model.safetensors", "<html>not found</html>"), ["cut off or damaged"]),
    "model: no weights": (file("model.safetensors", None), ["no *.safetensors file"]),
    "model: only a pickle": (model(only_a_pickle), ["pickle", "pytorch_model.bin", "refused"]),
    "model: a pickle for a shard": (model(a_pickle_for_a_shard), ["shard.bin", "pickle", "refused"]),
    "model: a shard elsewhere": (shards({"weight_map": {"a": "../../x.safetensors"}}), ["../../x.safetensors", "refused"]),
    "model: a shard gone": (shards({"weight_map": {"a": "x.safetensors"}}), ["x.safetensors", "not there"]),
    "model: an index of nothing": (shards({}), ["no weight_map", "copy it again"]),
    "model: weights by another name": (config(transformers_weights="../x.bin"), ["transformers_weights", "refused"]),
    "model: its own code": (model(own_code), ["own Python code", "trust_remote_code=true"]),
    "model: a kernel of the Hub": (config(_attn_implementation="owner/kernel"), ["owner/kernel", "trust_remote_code=true"]),
    "model: an adapter": (file("adapter_config.json", '{"base_model_name_or_path": "../x"}'), ["adapter", "merge it"]),
    "model: no tokenizer": (model(no_tokenizer), ["holds no tokenizer", "save_pretrained"]),
    "model: a broken tokenizer": (file("tokenizer.json", "[]"), ["its tokenizer", "cannot be loaded"]),
    "model: a tokenizer's code": (model(tokenizer_code), ["its tokenizer", "own Python code", "trust_remote_code=true"]),
    "model: converted, settings gone": (config("dynamoe", moe=None), ["moe is empty"]),
    "model: converted, odd experts": (moe(experts=5), ["dynamoe.experts = 5"]),
    "model: converted, odd theta": (moe(theta="x"), ["dynamoe.theta = 'x'", "give a number"]),
    "model: converted, absurd router": (moe(router_hidden_size=10**9), ["parameters", "restore config.json"]),
    "model: deployed, no sizes": (moe("tomoe", union_sizes=None), ["cannot be loaded"]),
    "model: masked, no experts": (moe("masked", num_experts=-1), ["tomoe.num_experts = -1"]),
}
ARCHIVES: dict[str, Case] = {
    "archive: another hash": (archive(pinned=False), ["sha256", "try again"]),
    "archive: no zip": (archive(raw=b"PK, but no more"), ["not a readable wheel", "remove it"]),
    "archive: leads out": (archive(("toy/../../ran", b"x")), ["leads outside", "refused"]),
    "archive: leads out backwards": (archive(("toy/..\\..\\ran", b"x")), ["leads outside", "refused"]),
    "archive: a drive": (archive(("toy/C:ran", b"x")), ["leads outside", "refused"]),
    "archive: a link": (archive((link(), b"/etc/passwd")), ["is a link", "refused"]),
    "archive: a bomb": (archive(("toy/zeros", bytes(3_000_000))), ["more than 1 MB", "refused"]),
    "archive: a name twice": (archive(("toy/a", b"1"), ("toy/a", b"2")), ["'toy/a' twice", "refused"]),
    "archive: a password": (archive(change=encrypted), ["not a readable wheel", "encrypted"]),
}
TASKS: dict[str, Case] = {
    "task: no file": (lambda place: command_eval(place, "nowhere.yaml"), ["nowhere.yaml", "no such file"]),
    "task: no name": (task(("task: mine\n", "")), ["names no task"]),
    "task: a name that leads out": (task(("mine", "../../mine")), ["'../../mine' is no name"]),
    "task: a number for a name": (task(("mine", "3")), ["3 is no name"]),
    "task: holds itself": (task(content="a: &a [*a]\ntask: mine"), ["mine.yaml", "an alias"]),
    "task: an alias bomb": (task(content=alias_bomb() + "\ntask: mine"), ["mine.yaml", "more than 100,000 values"]),
    "task: too deep": (task(content="a: " + "{a: " * 2000 + "}" * 2000), ["mine.yaml", "nested too deeply"]),
    "task: python tags": (task(content=hostile_yaml("task")), ["mine.yaml", "os.system"]),
    "task: a bad date": (task(content="task: !!timestamp never"), ["mine.yaml", "cannot be loaded"]),
    "task: includes itself": (task(("task: mine", "task: mine\ninclude: mine.yaml")), ["includes itself", "take it out"]),
    "task: no data": (task(("d.jsonl", "gone.jsonl")), ["gone.jsonl", "write it"]),
    "task: broken data": (task(data='{"q": "a"}\n{"q":\n'), ["mine.yaml", "row 1"]),
    "task: empty data": (task(data=""), ["no documents", "write some"]),
    "task: a function beside it": (task(("'{{q}}'", "!function mine.text")), ["!function mine.text", "trust_remote_code=true"]),
    "task: a function of Python": (task(("'{{q}}'", "!function os.system")), ["!function os.system", "trust_remote_code=true"]),
    "task: a metric of the Hub": (task(("metric: acc", "metric: owner/m, hf_evaluate: true")), ["owner/m", "trust_remote_code=true"]),
    "task: a misspelt metric": (task(("metric: acc", "metric: accc")), ["'accc'", "did you mean acc"]),
    "task: a metric that is none": (task(("metric: acc", "metric: 3")), ["metric 3", "metric: acc"]),
    "task: a template that reaches Python": (
        task(("'{{q}}'", "\"{{ cycler.__init__.__globals__.os.system('touch ran') }}\"")),
        ["mine.yaml", "unsafe"],
    ),
    "task: a template without end": (task(("'{{q}}'", "'{% for i in range(10**9) %}x{% endfor %}'")), ["mine.yaml", "Range too big"]),
}
RECORDS: dict[str, Case] = {
    "record: no JSON": (raw_record('{"run":'), ["record.json", "not readable as JSON", "remove it"]),
    "record: too deep": (raw_record("[" * 100_000), ["record.json", "nested too deeply"]),
    "record: no record": (raw_record("[1]"), ["record.json", "not a record", "run the notebook again"]),
    "record: a name that leads out": (record(run={"name": "../../x"}), ["'../../x' is no plain file name"]),
    "record: a file that leads out": (record(**listing("../../secret.csv")), ["no plain file name"]),
    "record: an absolute file": (record(**listing("/etc/passwd")), ["no plain file name"]),
}
CHECKPOINTS: dict[str, Case] = {**MODELS, **ARCHIVES, **TASKS, **RECORDS}


def command_eval(place: Path, name: str) -> object:
    from bad_inputs import command

    return command("eval", "smollm2-pico", "--tasks", name, "--output", place / "scores")(place)
