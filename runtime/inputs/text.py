"""From the text that a user types to token ids: cleaning, then the published tokenizer.

Source: TurboDiffusion, rcm/utils/umt5.py (docs/sources.md).
"""

import html
import math
from pathlib import Path

from tokenizers import Tokenizer as Tokens

from wanforge.errors import CheckpointError, RequestError
from wanforge.regular_file import check_regular

END = "</s>"
MOST_BYTES = 64 << 20
"""The most bytes of a ``tokenizer.json``. The published one has 17 MB for its 256,000 pieces."""


def clean(prompt: str) -> str:
    """Repair the encoding, resolve HTML entities twice, and replace every run of white space by one space."""
    return " ".join(html.unescape(html.unescape(repaired(prompt))).split())


def repaired(prompt: str) -> str:
    """A prompt with its encoding repaired by ftfy, which is imported only for what it could change: not for printable
    ASCII without entities."""
    if prompt.isascii() and prompt.isprintable() and "&" not in prompt:
        return prompt
    import ftfy

    fixed: str = ftfy.fix_text(prompt)
    return fixed


class Tokenizer:
    """The tokenizer of umT5, read from the published ``tokenizer.json``.

    Raises:
        CheckpointError: The file is missing or too large, or is not a tokenizer with an end-of-text token.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path, CheckpointError, MOST_BYTES)
        try:
            self.tokens = Tokens.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for every kind of damage
            raise CheckpointError(f"{path}: not a tokenizer.json ({error})") from None
        end = self.tokens.token_to_id(END)
        if end is None:
            raise CheckpointError(f"{path}: has no token {END}; this is not umT5's tokenizer")
        self.end: int = end
        self.tokens.no_padding()
        self.tokens.no_truncation()

    def __len__(self) -> int:
        size: int = self.tokens.get_vocab_size()
        return size

    def encode(self, prompt: str, max_tokens: int) -> list[int]:
        """Clean a prompt and return its token ids, ending in end-of-text.

        Raises:
            RequestError: The prompt is empty, or has more than `max_tokens` tokens.
        """
        cleaned = clean(prompt)
        if not cleaned:
            raise RequestError("the prompt is empty; describe the video in a sentence or more, in English")
        ids = [*self.tokens.encode(cleaned, add_special_tokens=False).ids, self.end]
        if len(ids) > max_tokens:
            excess = len(ids) - max_tokens
            words = math.ceil(excess * len(cleaned.split()) / len(ids))
            raise RequestError(
                f"the prompt is {len(ids)} tokens long, {excess} more than the {max_tokens} that the model reads; "
                f"shorten it by about {words} word{'s' if words > 1 else ''}"
            )
        return ids


def find_tokenizer(path: Path) -> Path:
    """The ``tokenizer.json`` at `path`, which is that file or the published folder.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    raise CheckpointError(
        f"{path}: no tokenizer.json here; it is published as google/umt5-xxl in the repositories of Wan 2.1"
    )
