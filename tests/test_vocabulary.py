"""Classes of tokens by their text, and through tokenizers that keep and that drop the space at the start of a text."""

import pytest

from dynamoe_lab.errors import InputError
from dynamoe_lab.vocabulary import TOKEN_CLASSES, token_class, token_classes

EXAMPLES = {
    "word": (" the", " Métis", "\tx", " well-known", " don’t", " слово"),
    "part of a word": ("ing", "The", "'s", "n't", "слово", "字"),
    "digits": ("7", " 2024", "²", "½"),
    "punctuation": (".", ",", " (", '."', " …", "—", "?!", "----", " -", "'"),
    "code or math": ("{", " =", "();", "]):", "**", " \\", "$", "_", "get()", ".get", "x1", "->", "</", "#"),
    "white space": (" ", "\n", "\n\n    ", "\t", "\r\n"),
    "other": ("\ufffd", " \ufffd", "€", "→", ""),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_class_by_text(kind):
    assert {text: token_class(text) for text in EXAMPLES[kind]} == dict.fromkeys(EXAMPLES[kind], kind)


def make_tokenizer(decoder, vocabulary: list[str]):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_a_space_at_the_start_counts_with_every_tokenizer():
    """Byte-level decoders keep it, those with a metaspace drop it where a text begins."""
    from tokenizers import decoders

    expected = ["special", "special", "part of a word", "word", "part of a word", "punctuation", "digits"]
    for mark, decoder in (("Ġ", decoders.ByteLevel()), ("▁", decoders.Metaspace())):
        tokenizer = make_tokenizer(decoder, ["<unk>", "</s>", "a", f"{mark}the", "the", ".", "7"])
        frame = token_classes(tokenizer)
        assert frame["token_class"].tolist() == expected
        assert frame["token"].tolist()[2:] == ["a", " the", "the", ".", "7"]


def test_only_what_is_asked_for_each_once():
    from tokenizers import decoders

    tokenizer = make_tokenizer(decoders.ByteLevel(), ["<unk>", "</s>", "a", "Ġthe", "."])
    frame = token_classes(tokenizer, [4, 3, 4])
    assert frame.to_dict("list") == {"token_id": [3, 4], "token": [" the", "."], "token_class": ["word", "punctuation"]}
    assert token_classes(tokenizer, []).columns.tolist() == ["token_id", "token", "token_class"]
    with pytest.raises(InputError, match="id 5 is not in this tokenizer's 5 entries"):
        token_classes(tokenizer, [1, 5])
    with pytest.raises(InputError, match="id -1 is not in"):
        token_classes(tokenizer, [-1, 1])


@pytest.mark.assets
def test_the_default_models_vocabulary():
    from dynamoe_lab.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-pico")
    ids = tokenizer.encode("The rooks' 42 nests\n\nreturn {x: y}", add_special_tokens=False)
    frame = token_classes(tokenizer, ids).set_index("token_id")
    kinds = [frame.loc[number, "token_class"] for number in ids]
    assert {"word", "digits", "white space", "code or math", "part of a word"} <= set(kinds)
    whole = token_classes(tokenizer)
    assert len(whole) == len(tokenizer)
    assert set(whole["token_class"]) == set(TOKEN_CLASSES)
    shares = whole["token_class"].value_counts(normalize=True)
    assert shares["word"] > shares["part of a word"] > 0.2
