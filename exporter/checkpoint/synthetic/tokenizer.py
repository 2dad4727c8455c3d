"""A small tokenizer of the kind that the published models share."""

import math
from collections import Counter

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

# Enough text to train a small vocabulary on; what it says does not matter.
CORPUS = (
    "A red kite turns slowly over a windy beach at dusk while the camera follows it from below.",
    "Two children run through tall yellow grass towards a white house under a bright blue sky.",
    "A black cat jumps from the window onto a wooden table, knocks over a glass and looks away.",
    "Close-up of rain falling on dark green leaves, with soft light and a shallow depth of field.",
    "An old steam train crosses a stone bridge in the mountains, smoke drifting to the left.",
    "A large circle moves right, a small square moves up, a blue triangle turns in the middle.",
    "The astronaut walks across grey dust, her visor reflecting the earth; slow motion, wide shot.",
    "Waves break on the rocks again and again; gulls cry; the sun sets behind a distant ship.",
)


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A small tokenizer of umT5's kind: unigram pieces, ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2."""
    special = ["<pad>", "</s>", "<unk>"]
    words = [f"\u2581{word}" for sentence in CORPUS for word in sentence.split()]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    counts = Counter(word[i:j] for word in words for i in range(len(word)) for j in range(i + 2, len(word) + 1))
    common = sorted((piece for piece in counts if counts[piece] > 1), key=lambda p: (-counts[p] * len(p), p))
    singles = sorted({"\u2581", *letters, *"".join(words)})
    pieces = [*special, *singles, *common][: min(vocab_size, 384)]
    tokenizer = Tokenizer(models.Unigram([(piece, math.log(counts[piece] or 1) - 8) for piece in pieces], unk_id=2))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
