"""What kind of token an id is: a word, a part of one, digits, punctuation, a sign of code or mathematics, white space.

The class belongs to the id, not to where it stands, so that it can be read from the vocabulary alone and shuffled among ids. A price of
that: a token with a space before its letters counts as a word though it may only begin one, and a word without a space before it (at the
start of a line, after a bracket, in scripts without spaces) counts as a part.
"""

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dynamoe_lab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKEN_CLASSES", "token_class", "token_classes"]

TOKEN_CLASSES = ("word", "part of a word", "digits", "punctuation", "code or math", "white space", "special", "other")
_CODE = frozenset("{}[]<>=+*/\\|&^%$#@~_`")
_WORD = frozenset("'’-")  # inside words: don't, well-known
_ANCHOR = "a"  # decoded before each token: some tokenizers drop the space at the start of a text


def token_class(text: str) -> str:
    """The class of a token by its text, with the space before it: one of `TOKEN_CLASSES` but "special".

    word: letters with white space before them; part of a word: letters without; digits; white space (also line ends); punctuation: marks
    of prose; code or math: a sign of either (``{}[]<>=+*/\\|&^%$#@~_` ``) in it, an empty pair of brackets, or letters glued to other marks
    (`.get`, `x1`); other: the rest, such as pieces of characters.
    """
    bare = text.strip()
    if not bare:
        return "white space" if text else "other"
    if "\ufffd" in bare:
        return "other"
    letters = [unicodedata.category(character)[0] in "LM" for character in bare]
    if all(unicodedata.category(character)[0] == "N" for character in bare):
        return "digits"
    if any(letters) and all(is_letter or character in _WORD for is_letter, character in zip(letters, bare, strict=True)):
        return "word" if text[0].isspace() else "part of a word"
    if any(character in _CODE for character in bare) or "()" in bare or any(letters):
        return "code or math"
    if all(unicodedata.category(character)[0] == "P" for character in bare):
        return "punctuation"
    return "other"


def token_classes(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int] | None = None) -> "pd.DataFrame":
    """The class of each token id, from the tokenizer alone.

    Args:
        tokenizer: of the model; any that can decode.
        ids: the ids that are asked for, repeated or not, e.g. `routing["token_id"]`; None: all that it has.

    Returns:
        token_id (rising, each once), token (its text, with the space before it), token_class (one of `TOKEN_CLASSES`).

    Raises:
        InputError: an id that the tokenizer does not have.

    Example:
        >>> tokenizer = lab.load_tokenizer("smollm2-pico")
        >>> lab.token_classes(tokenizer, tokenizer("Feed 2 cats.")["input_ids"])  # by id
           token_id  token     token_class
        0        30      .     punctuation
        1        34      2          digits
        2       216            white space
        3      7680   cats            word
        4     27268   Feed  part of a word
    """
    import pandas as pd

    wanted = list(range(len(tokenizer))) if ids is None else sorted({int(number) for number in ids})
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(tokenizer):
        stranger = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise InputError(f"token_classes: id {stranger} is not in this tokenizer's {len(tokenizer)} entries; use the model's own")
    special = set(tokenizer.all_special_ids) | {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    before = tokenizer.decode(anchor)
    decoded = tokenizer.batch_decode([[*anchor, number] for number in wanted], clean_up_tokenization_spaces=False) if wanted else []
    texts = [text.removeprefix(before) for text in decoded]
    kinds = ["special" if number in special else token_class(text) for number, text in zip(wanted, texts, strict=True)]
    return pd.DataFrame({"token_id": wanted, "token": texts, "token_class": kinds})
