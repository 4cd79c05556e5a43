"""Where the prompt ends among the tokens, and the special tokens that a tokenizer puts around a text by itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from prefkern.data.text.messages import Refuse


class Specials(NamedTuple):
    """``prefix``, ``suffix``: the tokens that the tokenizer puts around every text. ``all``: every special token."""

    prefix: list[int]
    suffix: list[int]
    end: int | None
    all: frozenset[int]

    def once(self, ids: list[int], *, prompt: bool) -> list[int]:
        """The tokens of a text with each of these once: a text that was rendered with them has its own. The end of
        the sequence is the text's own affair, and nothing stands behind a prompt."""
        begin, end = len(self.prefix), len(self.suffix)
        if end and (prompt or self.suffix == [self.end]):
            ids = ids[:-end]
        return ids[begin:] if begin and ids[begin : 2 * begin] == self.prefix else ids


def specials_of(tokenizer: Any, *, text: bool) -> Specials:
    """``text``: what stands around it matters too, and is found in one letter's tokens, with and without it."""
    known, end = frozenset(getattr(tokenizer, "all_special_ids", ())), getattr(tokenizer, "eos_token_id", None)
    around = _around(tokenizer) if text else None
    prefix, suffix = around or ([], [])
    return Specials(prefix, suffix, end, known)


def _around(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    try:
        bare, full = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    except Exception:  # it cannot be asked: what it makes of the rows is taken as it is
        return None
    places = range(len(full) - len(bare) + 1) if bare else ()
    at = next((at for at in places if full[at : at + len(bare)] == bare), None)
    return None if at is None else (full[:at], full[at + len(bare) :])


def prompt_end(prompt: list[int], whole: Sequence[list[int]], special: frozenset[int]) -> int:
    """How many tokens of the prompt all sequences begin with: tokens may merge across its end.

    Refused where none of them says anything: the whole prompt would be scored.
    """
    shared = min(common(prompt, ids) for ids in whole)
    said = next((at for at, token in enumerate(prompt) if token not in special), None)
    if (prompt and not shared) or (said is not None and shared <= said):
        raise Refuse("the tokens of the prompt alone are not those that prompt and completion begin with")
    return shared


def common_words(texts: Sequence[list[int]], special: frozenset[int]) -> int:
    """How many tokens all completions of a prompt that was found in them begin with: the same space, or the same first
    byte of two letters. An unknown token may stand for two different words."""
    shared = min(common(texts[0], ids) for ids in texts)
    return next((at for at, token in enumerate(texts[0][:shared]) if token in special), shared)


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements both begin with."""
    if other[: len(one)] == one:
        return len(one)
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
