"""How prepared sequences are cut to ``max_length``, and what a dataset says of it to those who would cut it again."""

import re
from typing import Any, Literal, NamedTuple

from prefkern import check

TruncationMode = Literal["keep_start", "keep_end"]
METADATA = b"prefkern.truncation"
"""The key under which a table of rows carries the sentence of `mark`."""
_MARK = "prefkern.data.prepare cut rows with max_length={}, truncation_mode={}"
_PATTERN = re.compile(_MARK.format(r"(\d+)", r"(\w+)").replace(".", r"\."))


class Truncation(NamedTuple):
    max_length: int
    mode: TruncationMode

    def cut(
        self, prompt: list[int], texts: list[list[int]], *, baseline: bool
    ) -> tuple[list[int], list[list[int]], int]:
        """Prompt and completions without what a collator of this length and mode cuts from all of their sequences, and
        how many tokens it cuts. ``baseline``: completions are read behind other prompts too."""
        most = self.max_length
        lost = sum(max(0, len(prompt) + len(text) - most) for text in texts)
        if self.mode == "keep_start":
            # behind a shorter prompt more of a completion is left
            return prompt, [text[: most if baseline else most - len(prompt)] for text in texts], lost
        texts = [text[-most:] for text in texts]
        # before a shorter completion more of the prompt is left
        kept = most if baseline else most - min(map(len, texts))
        return prompt[len(prompt) - min(kept, len(prompt)) :], texts, lost

    @property
    def mark(self) -> str:
        return _MARK.format(self.max_length, self.mode)


def marked(said: str | None) -> Truncation | None:
    """What a `Truncation.mark` in a text says; None where there is none."""
    found = _PATTERN.search(said or "")
    return None if found is None else Truncation(int(found[1]), found[2])  # type: ignore[arg-type]


def truncation_of(dataset: Any) -> Truncation | None:
    """How `prepare` cut the rows of a dataset, where it cut any."""
    return marked(getattr(getattr(dataset, "info", None), "description", None))


def refuse_other_end(where: str, cut: Truncation | None, mode: str) -> None:
    """A sequence that lost one end cannot be cut to keep it."""
    if cut is not None and cut.mode != mode:
        check.fail(
            where,
            f"truncation_mode={mode!r} would cut rows that prefkern.data.prepare has cut already, with "
            f"max_length={cut.max_length} and truncation_mode={cut.mode!r}: prepare them with truncation_mode={mode!r}",
        )
