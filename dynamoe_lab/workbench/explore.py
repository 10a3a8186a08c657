"""A box for your own sentence in a notebook: its tokens coloured by the compute they used, and a continuation in the same colours."""

import html
from typing import TYPE_CHECKING

from dynamoe_lab.errors import InputError

if TYPE_CHECKING:
    import ipywidgets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["continue_text", "explorer"]


def continue_text(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str, *, new_tokens: int = 40, seed: int | None = None
) -> str:
    """The text with a continuation of at most `new_tokens` tokens under the model's current routing: greedy, or sampled from `seed`.

    Args:
        model, tokenizer: dense or converted, of one vocabulary; no special tokens are put before the text.

    Raises:
        InputError: the text is empty, or the model has no room for the continuation.

    Example:
        >>> model, tokenizer = lab.load_model("smollm2-pico")
        >>> text = lab.continue_text(model, tokenizer, "Once upon a time", new_tokens=4)
        >>> text.startswith("Once upon a time"), len(text) > len("Once upon a time")
        (True, True)
    """
    import torch

    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    if encoded["input_ids"].shape[1] == 0:
        raise InputError("continue_text: the text is empty; write a sentence")
    room = model.config.max_position_embeddings - encoded["input_ids"].shape[1]
    if room < new_tokens:
        raise InputError(f"continue_text: {new_tokens} new tokens do not fit behind this text; the model has room for {max(room, 0)}")
    options = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    with torch.no_grad():
        ids = model.generate(
            encoded["input_ids"].to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    return text + tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def explorer(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, text: str = "", new_tokens: int = 40, max_tokens: int = 512
) -> "ipywidgets.Widget":
    """A text box with two buttons: colour this text, and continue it. Shows `text` at once; bad input is told below the box.

    Args:
        model, tokenizer: a converted model of any method; its routing at the moment of the click counts.
        text: what stands in the box at first.
        new_tokens: length of a continuation.
        max_tokens: longest text that is traced.

    Returns:
        A box of the text, the buttons, and the page that they fill.

    Example:
        >>> dense, tokenizer = lab.load_model("smollm2-pico")
        >>> model = lab.convert(dense, calibration=torch.arange(64).view(1, 64))
        >>> box, buttons, shown = lab.explorer(model, tokenizer, text="Hello there").children
        >>> box.value, "2 tokens" in shown.value
        ('Hello there', True)
    """
    import ipywidgets

    from dynamoe_lab.analysis.tokens import render_tokens
    from dynamoe_lab.evaluation import expert_fractions, trace_text

    box = ipywidgets.Textarea(value=text, layout=ipywidgets.Layout(width="100%", height="90px"), placeholder="Write a sentence")
    colour = ipywidgets.Button(description="Colour", tooltip="Trace this text", button_style="primary")
    extend = ipywidgets.Button(description="Continue", tooltip=f"Add up to {new_tokens} tokens, greedily, and trace the whole")
    shown = ipywidgets.HTML()

    def show(_button=None, *, grow: bool = False) -> None:
        for button in (colour, extend):
            button.disabled = True
        try:
            if grow:
                box.value = continue_text(model, tokenizer, box.value, new_tokens=new_tokens)
            routing = trace_text(model, tokenizer, box.value, max_tokens=max_tokens)
            shown.value = render_tokens(routing, fractions=expert_fractions(model))
        except InputError as error:
            shown.value = f"<p style='color:#a00'>{html.escape(str(error))}</p>"
        finally:
            for button in (colour, extend):
                button.disabled = False

    colour.on_click(show)
    extend.on_click(lambda button: show(button, grow=True))
    if text:
        show()
    return ipywidgets.VBox([box, ipywidgets.HBox([colour, extend]), shown])
