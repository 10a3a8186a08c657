"""A sentence of one's own: pieces, colours, escaping, the widget."""

import re

import pytest
from conftest import make_converted
from deployed_models import make_deployed, make_masked

from dynamoe_lab.analysis.tokens import render_tokens
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import trace_text
from dynamoe_lab.workbench.explore import continue_text, explorer

HOSTILE = "<script>alert(1)</script> & \"quotes\" <img src=x onerror='alert(2)'>"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer made here, so that any text has tokens and no asset is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_first = [token for token in alphabet if token.isascii()] + [token for token in alphabet if not token.isascii()]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(ascii_first[:128])}, [], unk_token=ascii_first[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=ascii_first[2], pad_token=ascii_first[0])


def test_pieces_make_up_the_text(tokenizer):
    routing = trace_text(make_converted(), tokenizer, HOSTILE)
    pieces = routing[routing["layer"] == 0].sort_values("position")["token"]
    assert "".join(pieces) == HOSTILE
    assert len(routing) == 3 * len(pieces)


def test_characters_of_several_tokens_are_shown_once(tokenizer):
    text = "a\N{GRINNING FACE}b \N{LATIN SMALL LETTER E WITH ACUTE}"
    routing = trace_text(make_converted(), tokenizer, text)
    pieces = routing[routing["layer"] == 0].sort_values("position")["token"]
    assert len(pieces) > len(text)
    assert "".join(pieces) == text


def test_text_is_escaped(tokenizer):
    page = render_tokens(trace_text(make_converted(), tokenizer, HOSTILE), fractions=(0.25, 0.5, 0.75, 1.0), title=HOSTILE)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;" in page
    assert not re.search(r"(https?:)?//", page.replace("</", "")), "nothing is loaded from elsewhere"


def test_colours_follow_the_compute(tokenizer):
    """The cheapest token is white, the dearest the strongest blue, and the key says what they use."""
    model = make_converted()
    routing = trace_text(model, tokenizer, "some words of different difficulty")
    page = render_tokens(routing, fractions=model.moe.experts)
    shown = re.findall(r'tabindex="0" style="background:(#\w+)"', page)
    share = routing.assign(size=[model.moe.experts[expert] for expert in routing["expert"]]).groupby("position")["size"].mean()
    assert share.nunique() > 2
    assert shown[share.argmin()] == "#ffffff"
    brightness = [sum(int(colour[k : k + 2], 16) for k in (1, 3, 5)) for colour in shown]
    assert all((a > b) == (x < y) for a, x in zip(brightness, share, strict=True) for b, y in zip(brightness, share, strict=True) if x != y)
    assert f"</b>{share.min():.0%}" in page
    assert f"</b>{share.max():.0%}" in page
    assert f"{share.mean():.0%} of the MLP neurons run on average" in page
    assert page.count("<i style") == len(share) * 3, "a bar for every layer of every token"


@pytest.mark.parametrize(("text", "says"), [("", "empty"), ("x" * 40, "more than max_tokens = 32")])
def test_unusable_texts_are_refused(tokenizer, text, says):
    with pytest.raises(InputError, match=says):
        trace_text(make_converted(), tokenizer, text, max_tokens=32)


def test_continuation_is_greedy_and_repeatable(tokenizer):
    model = make_converted()
    first = continue_text(model, tokenizer, "some words", new_tokens=6)
    assert first.startswith("some words")
    assert len(first) > len("some words")
    assert first == continue_text(model, tokenizer, "some words", new_tokens=6)
    with pytest.raises(InputError, match="do not fit"):
        continue_text(model, tokenizer, "some words", new_tokens=1000)
    with pytest.raises(InputError, match="empty"):
        continue_text(model, tokenizer, "", new_tokens=5)


@pytest.mark.parametrize("make", [make_masked, make_deployed])
def test_the_box_answers_for_experts_of_any_width(tokenizer, make):
    model = make()
    widget = explorer(model, tokenizer, text="hello")
    _, buttons, shown = widget.children
    assert "5 tokens" in shown.value
    assert "the label in" not in shown.value
    model.set_routing("full")
    buttons.children[0].click()
    assert "uses no expert" in shown.value


def test_the_box_answers(tokenizer):
    widget = explorer(make_converted(), tokenizer, text="hello", new_tokens=4)
    box, buttons, shown = widget.children
    colour, extend = buttons.children
    assert "5 tokens" in shown.value
    box.value = HOSTILE
    colour.click()
    assert f"{len(HOSTILE)} tokens" in shown.value
    assert "<script" not in shown.value
    extend.click()
    assert box.value.startswith(HOSTILE)
    assert len(box.value) > len(HOSTILE)
    box.value = ""
    colour.click()
    assert "the text is empty" in shown.value
    assert not colour.disabled
