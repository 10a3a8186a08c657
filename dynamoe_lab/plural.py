"""Counts as people read them, for findings, figures and commands alike."""

__all__ = ["plural"]


def plural(count: float, noun: str) -> str:
    """A count with its noun: 1 layer, 2 layers, 8,160 tokens, 2 entries.

    >>> from dynamoe_lab.plural import plural
    >>> plural(1, "layer"), plural(8160, "token"), plural(0, "entry")
    ('1 layer', '8,160 tokens', '0 entries')
    """
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{int(count):,} {noun if count == 1 else several}"
