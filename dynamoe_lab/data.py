"""Documents -> splits -> blocks of tokens: the data of calibration, training and evaluation.

A hash of a document's text decides its split, so that train, calibration and held-out never share one, whatever the source, the seed or
the amount asked for. Documents of a split are shuffled by seed and domain, tokenized, joined with a separator and cut into blocks of equal
length; a block holds one domain, and each domain gives the same number of blocks. Same arguments, same blocks, in any process.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xxhash

from dynamoe_lab.errors import InputError
from dynamoe_lab.texts import Source, find_sources

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SPLITS", "Blocks", "as_blocks", "concatenate", "load_blocks", "require_blocks", "split_of", "token_counts"]

Split = Literal["train", "calibration", "heldout", "all"]
SPLITS = ("train", "calibration", "heldout", "all")
SEPARATOR = "<|endoftext|>"  # between documents, if the vocabulary has it; else the end-of-sequence token
_BATCH = 64  # documents tokenized at once


@dataclass(eq=False)
class Blocks:
    """n blocks of T tokens. `blocks[2:5]`, `blocks[3]`, `blocks[[0, 4]]` and `blocks[mask]` are Blocks with the same document numbers.

    Example:
        >>> document = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]])
        >>> blocks = lab.Blocks(torch.arange(8).view(2, 4), document, ["web", "code"])
        >>> len(blocks), blocks.context, blocks.tokens, blocks.domains
        (2, 4, 8, ['web', 'code'])
        >>> blocks.of("code").ids
        tensor([[4, 5, 6, 7]])
    """

    ids: torch.Tensor  # token ids, (n, T) int64
    document: torch.Tensor  # the document each token belongs to, (n, T) int64, one number a document across all domains
    domain: list[str]  # the domain of each block, n

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.document.shape or len(self.domain) != len(self.ids):
            shapes = f"ids {tuple(self.ids.shape)}, document {tuple(self.document.shape)}, {len(self.domain)} domains"
            raise InputError(f"blocks of shapes {shapes}: ids and document are [n, T], with a domain for each of the n blocks")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: "int | slice | Sequence[int] | torch.Tensor") -> "Blocks":
        chosen = range(len(self))[which] if isinstance(which, int | slice) else which
        rows = torch.as_tensor([chosen] if isinstance(chosen, int) else chosen)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        return Blocks(self.ids[rows], self.document[rows], [self.domain[row] for row in rows.tolist()])

    @property
    def tokens(self) -> int:
        """Number of tokens, n * T."""
        return self.ids.numel()

    @property
    def context(self) -> int:
        """Tokens per block, T."""
        return self.ids.shape[1]

    @property
    def domains(self) -> list[str]:
        """The domains, each once, in the order of their first blocks."""
        return list(dict.fromkeys(self.domain))

    def of(self, domain: str) -> "Blocks":
        """The blocks of one domain."""
        return self[[row for row, name in enumerate(self.domain) if name == domain]]

    def fingerprint(self) -> str:
        """Hash of the content, 32 hexadecimal digits: equal blocks have equal fingerprints on every machine."""
        digest = xxhash.xxh3_128(repr(tuple(self.ids.shape)).encode())
        for tensor in (self.ids, self.document):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy(), dtype="<i8").data)
        digest.update("\0".join(self.domain).encode())
        return digest.hexdigest()


def as_blocks(blocks: "Blocks | torch.Tensor") -> Blocks:
    """Blocks from token ids [n, T] (each row a document of domain "text"); Blocks pass through.

    Raises:
        InputError: not a tensor of integers with two dimensions.
    """
    if isinstance(blocks, Blocks):
        return blocks
    if not isinstance(blocks, torch.Tensor) or blocks.ndim != 2 or blocks.is_floating_point() or blocks.is_complex():
        what = f"{blocks.dtype} {list(blocks.shape)}" if isinstance(blocks, torch.Tensor) else type(blocks).__name__
        raise InputError(f"blocks given as {what}: give Blocks (lab.load_blocks) or a LongTensor of token ids [n, T]")
    ids = blocks.long()
    document = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids).clone()
    return Blocks(ids, document, ["text"] * len(ids))


def require_blocks(
    blocks: "Blocks | torch.Tensor", function: str, *, model: "PreTrainedModel | None" = None, batch_size: int = 1, context: int = 1
) -> Blocks:
    """`as_blocks`, for a function that needs at least one block, of token ids that are some, and that `model` has an embedding for.

    Raises:
        InputError: naming the function: as above (torch would say only that an index is out of range), or a batch size below 1, with which
            no forward would run and nothing be measured; or blocks of fewer than `context` tokens.
    """
    blocks = as_blocks(blocks)
    if not blocks.tokens:
        raise InputError(f"{function}: no blocks of text; ask load_blocks for more tokens")
    if blocks.context < context:
        raise InputError(
            f"{function}: context {blocks.context}: give blocks of at least {context} tokens, of which the first predicts the next"
        )
    if batch_size < 1:
        raise InputError(f"{function}: batch_size = {batch_size}: give at least 1 block of a forward")
    least, most = (int(bound) for bound in torch.aminmax(blocks.ids))
    size = most + 1 if model is None else model.get_input_embeddings().num_embeddings
    if least < 0 or most >= size:
        known = "ids begin at 0" if model is None else f"the model has ids 0 to {size - 1}"
        raise InputError(f"{function}: token id {least if least < 0 else most}: {known}; give ids of the model's own tokenizer")
    return blocks


def concatenate(parts: Iterable[Blocks]) -> Blocks:
    """One Blocks of all parts, in order. Documents are numbered anew: parts share none.

    Raises:
        InputError: no part, or parts of different context.
    """
    parts = list(parts)
    if len({part.context for part in parts}) != 1:
        contexts = sorted({part.context for part in parts})
        raise InputError(f"blocks of contexts {contexts} cannot be joined: give at least one part, all of one context")
    documents, first = [], 0
    for part in parts:
        numbers, inverse = torch.unique(part.document, return_inverse=True)
        documents.append(inverse + first)
        first += len(numbers)
    return Blocks(
        torch.cat([part.ids for part in parts]),
        torch.cat(documents),
        [name for part in parts for name in part.domain],
    )


def token_counts(blocks: "Blocks | torch.Tensor") -> "pd.DataFrame":
    """How often each token occurs in blocks: token_id, tokens, share; the most frequent first, tokens that never occur left out.

    Raises:
        InputError: no blocks.

    Example:
        >>> lab.token_counts(torch.tensor([[5, 5, 7, 5]]))
           token_id  tokens  share
        0         5       3   0.75
        1         7       1   0.25
    """
    import pandas as pd

    counts = torch.bincount(require_blocks(blocks, "token_counts").ids.flatten()).numpy()
    frame = pd.DataFrame({"token_id": np.arange(len(counts)), "tokens": counts, "share": counts / counts.sum()})
    return frame[frame["tokens"] > 0].sort_values("tokens", ascending=False, kind="stable").reset_index(drop=True)


def split_of(document: str) -> str:
    """The split a document belongs to, by a hash of its text with white space made equal: 80 % train, 10 % calibration, 10 % heldout."""
    return _place(_digest(document))


def load_blocks(
    text: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int = 256,
    tokens: int = 100_000,
    split: Split = "train",
    seed: int = 0,
) -> Blocks:
    """Blocks of `context` tokens from the documents of one split, about `tokens` in all (the largest multiple of domains * context).

    Args:
        text: names joined by '+', each giving an equal share (`texts.find_sources` says what a name may be).
        tokenizer: of the model that will read the blocks; no special tokens are added but a separator after each document:
            `<|endoftext|>` if the vocabulary has it, else the end-of-sequence token, else none. It belongs to the document it ends.
        context: tokens per block; what is left over at the end of a domain is dropped.
        tokens: of all blocks together.
        split: train, calibration, heldout, or all three. Documents with the same text (white space aside) are in the same one, once.
        seed: of the order of documents, within each domain.

    Returns:
        Blocks, the domains taking turns. Hub datasets are read no further than needed; their first documents are what is shuffled.

    Raises:
        InputError: unknown text, unreadable file, a value out of range, or too little text (with the most that can be asked for).

    Example:
        >>> tokenizer = lab.load_tokenizer("smollm2-pico")
        >>> blocks = lab.load_blocks("c4+wiki", tokenizer, context=16, tokens=64, split="heldout")
        >>> blocks.ids.shape, blocks.domain
        (torch.Size([4, 16]), ['c4', 'wiki', 'c4', 'wiki'])
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    if context < 2:
        raise InputError(f"context = {context}: give at least 2 tokens per block")
    sources = find_sources(text)
    wanted = tokens // (context * len(sources))  # blocks of each domain
    if wanted < 1:
        each = f"each of {len(sources)} domains" if len(sources) > 1 else "the text"
        raise InputError(f"tokens = {tokens}: less than one block of {context} for {each}; ask for at least {context * len(sources)}")

    separator = _separator(tokenizer)
    seen: set[bytes] = set()
    found = [
        _tokenize(
            source,
            _documents(source, split, seen),
            tokenizer,
            separator,
            wanted * context,
            f"{seed}/{source.domain}",
        )
        for source in sources
    ]
    lengths = [sum(map(len, documents)) for documents in found]
    if min(lengths) < wanted * context:
        raise InputError(_too_little(text, split, context, tokens, dict(zip([s.domain for s in sources], lengths, strict=True))))

    ids, numbers, first = [], [], 0
    for documents in found:
        number = np.repeat(np.arange(first, first + len(documents)), [len(document) for document in documents])
        ids.append(np.concatenate(documents)[: wanted * context])
        numbers.append(number[: wanted * context])
        first += len(documents)
    highest = max(int(part.max()) for part in ids)
    if highest >= len(tokenizer):
        raise InputError(f"the tokenizer gives id {highest} but says it has {len(tokenizer)} entries; its files do not belong together")

    def take_turns(
        parts: list[np.ndarray],
    ) -> torch.Tensor:  # domains x (wanted * context) -> (wanted * domains, context)
        return torch.from_numpy(np.stack(parts).reshape(len(parts), wanted, context).swapaxes(0, 1).reshape(-1, context).astype(np.int64))

    return Blocks(take_turns(ids), take_turns(numbers), [source.domain for source in sources] * wanted)


def _digest(document: str) -> bytes:
    return hashlib.sha256(" ".join(document.split()).encode()).digest()


def _place(digest: bytes) -> str:
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.8 else "calibration" if share < 0.9 else "heldout"


def _documents(source: Source, split: str, seen: set[bytes]) -> Iterator[str]:
    """The documents of a source that belong to the split, each text once; `seen` is shared by the sources of one call."""
    for document in source.read():
        digest = _digest(document)
        if digest not in seen and split in ("all", _place(digest)):
            seen.add(digest)
            yield document


def _separator(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    known = tokenizer.get_vocab().get(SEPARATOR, tokenizer.eos_token_id)
    return [] if known is None else [known]


def _tokenize(
    source: Source,
    documents: Iterator[str],
    tokenizer: "PreTrainedTokenizerBase",
    separator: list[int],
    enough: int,
    seed: str,
) -> list[np.ndarray]:
    """Shuffled documents as token ids with their separators, until there are `enough` tokens or no document is left."""
    order = random.Random(seed)  # seeded by a string: the same in every process
    if not source.streamed:
        shuffled = list(documents)
        order.shuffle(shuffled)
        documents = iter(shuffled)
    found: list[np.ndarray] = []
    count = 0
    while count < enough and (batch := list(islice(documents, _BATCH))):
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            found.append(np.asarray([*ids, *separator], dtype=np.int32))
            count += len(found[-1])
    if source.streamed:
        order.shuffle(found)
    return found


def _too_little(text: str | Path, split: str, context: int, tokens: int, lengths: dict[str, int]) -> str:
    """`lengths` counts tokens up to what was needed, so the shortest domain, which decides, is counted in full."""
    domain = min(lengths, key=lambda name: lengths[name])
    most = min(lengths.values()) // context * context * len(lengths)
    share = f", an equal share from each of {len(lengths)} domains" if len(lengths) > 1 else ""
    advice = f"ask for at most {most}" if most else "choose a shorter context or another split, or give more text"
    return (
        f"text {text}: split {split} of {domain} has {lengths[domain]} tokens, too few for {tokens}{share} in blocks of {context}; {advice}"
    )
