"""A text with every token coloured by the compute it used: frame -> HTML, no script, nothing loaded from elsewhere.

Hovering (or tabbing to) a token shows the expert that every layer used for it. All text is escaped: it comes from models and people.
"""

import html

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from dynamoe_lab.analysis.fractions import Fractions, expert_count, row_fractions
from dynamoe_lab.analysis.frames import require
from dynamoe_lab.analysis.style import expert_colors
from dynamoe_lab.plural import plural

__all__ = ["render_tokens"]

_STYLE = """<style>
.dml-text{position:relative;font:15px/2.1 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;color:#222;
background:#fff;padding:.6em .6em 6.2em}
.dml-tok{border-radius:3px;padding:2px 0;outline-offset:1px}
.dml-tok:hover,.dml-tok:focus{outline:2px solid #222}
.dml-tip{display:none;position:absolute;left:.6em;bottom:.5em;z-index:9;background:#fff;
border:1px solid #999;border-radius:4px;padding:6px 8px;
font:11px/1.4 system-ui,sans-serif;white-space:nowrap;box-shadow:0 2px 8px #0003;color:#222}
.dml-tok:hover .dml-tip,.dml-tok:focus .dml-tip{display:block}
.dml-tip i{display:inline-block;width:9px;vertical-align:bottom;margin-right:1px}
.dml-bars{display:block;height:34px;margin-top:3px}
.dml-key{font:12px/1.6 system-ui,sans-serif;color:#444}
.dml-key b{display:inline-block;width:1.6em;height:1em;border-radius:2px;border:1px solid #999;vertical-align:-.15em;margin:0 .3em 0 .9em}
</style>"""
_BARS = 34  # pixels of the full MLP's bar


def _mix(share: float) -> str:
    """White at 0 to a strong blue at 1, light enough for dark text."""
    low, high = np.array([1.0, 1.0, 1.0]), np.array([0.36, 0.62, 0.86])
    return to_hex(low + (high - low) * float(np.clip(share, 0, 1)))


def render_tokens(routing: pd.DataFrame, *, fractions: Fractions, title: str = "") -> str:
    """HTML of one text whose tokens are coloured by their mean active share of the MLP.

    Args:
        routing: table `routing` of a single text with a column `token` (from `trace_text`): position, token, layer, expert, surprisal, and
            label where the method has labels; one row per token and layer.
        fractions: share of the MLP of each expert: [E], [L, E], or the frame of `lab.expert_fractions`.
        title: a line above the text.

    Returns:
        A self-contained fragment; the colour scale runs from this text's cheapest token (white) to its dearest (blue).

    Raises:
        InputError: a column is missing, or `fractions` says nothing about a layer or expert of the frame.

    Example:
        >>> routing = pd.DataFrame({"position": [0, 1], "token": ["Hi", " <b>"], "layer": 0, "expert": [0, 1], "surprisal": [np.nan, 2.0]})
        >>> html = lab.render_tokens(routing, fractions=(0.5, 1.0))
        >>> html.count('class="dml-tok"'), "&lt;b&gt;" in html  # a piece per token; what the text holds is escaped
        (2, True)
    """
    require(routing, ("position", "token", "layer", "expert", "surprisal"), "render_tokens")
    colors = [to_hex(color) for color in expert_colors(expert_count(fractions, "render_tokens"))]
    routing = routing.assign(width=row_fractions(fractions, routing["layer"], routing["expert"], "render_tokens"))
    names = ("expert", "width", *(("label",) if "label" in routing else ()))
    tables = {name: routing.pivot(index="position", columns="layer", values=name).to_numpy() for name in names}  # [tokens, layers] each
    experts, widths = tables["expert"], tables["width"]
    agreed = (experts == tables["label"]).mean(axis=1) if "label" in tables else None
    first = routing[routing["layer"] == routing["layer"].min()].sort_values("position")
    active = widths.mean(axis=1)
    least, most = float(active.min()), float(active.max())
    spans, layers = [], experts.shape[1]
    place = f"layer 0 to {layers - 1}" if layers > 1 else "layer 0"
    for row, (token, surprisal, share) in enumerate(zip(first["token"], first["surprisal"], active, strict=True)):
        bars = "".join(
            f'<i style="height:{max(1, round(_BARS * width))}px;background:{colors[expert]}"></i>'
            for expert, width in zip(experts[row], widths[row], strict=True)
        )
        surprise = "" if pd.isna(surprisal) else f", surprisal {surprisal:.1f} nats"
        says = f"{share:.0%} of the MLPs{surprise}" + ("" if agreed is None else f"; the label in {agreed[row]:.0%} of the layers")
        piece = html.escape(str(token)) or "&#8203;"
        tip = f'<span class="dml-tip">{says}<span class="dml-bars">{bars}</span>{place}</span>'
        color = _mix((share - least) / max(most - least, 1e-9))
        spans.append(f'<span class="dml-tok" tabindex="0" style="background:{color}">{piece}{tip}</span>')
    steps = "".join(f'<b style="background:{_mix(place)}"></b>{least + place * (most - least):.0%}' for place in (0, 0.5, 1))
    summary = f"{plural(len(first), 'token')}, {active.mean():.0%} of the MLP neurons run on average"
    heading = f"<p class='dml-key'><strong>{html.escape(title)}</strong></p>" if title else ""
    key = f"<p class='dml-key'>{summary}. Mean active share of the MLPs:{steps}. Point at a token for its layers.</p>"
    return f'{_STYLE}{heading}{key}<div class="dml-text">{"".join(spans)}</div>'
