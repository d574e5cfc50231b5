"""Plain text: what a document says in short, and the sections it falls into."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

SECTION_WORDS: Final = 220
SUMMARY_SENTENCES: Final = 2
_WORD: Final = re.compile(r"[^\W\d_]{4,}")
_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def summarise(text: str) -> str:
    """Return the sentences whose words are the most frequent in the text, in their order.

    Source: H. P. Luhn, "The Automatic Creation of Literature Abstracts", 1958.
    """
    sentences = [" ".join(part.split()) for part in _SENTENCE.split(text)]
    sentences = [sentence for sentence in sentences if 40 <= len(sentence) <= 400]
    frequency = Counter(word.lower() for word in _WORD.findall(text))

    def weight(sentence: str) -> float:
        words = [word.lower() for word in _WORD.findall(sentence)]
        return sum(frequency[word] for word in words) / (len(words) + 5)

    best = sorted(sentences, key=weight, reverse=True)[:SUMMARY_SENTENCES]
    return " ".join(sentence for sentence in sentences if sentence in best)


def split(text: str) -> list[str]:
    """Return the text as sections of about 220 words, broken between paragraphs."""
    sections: list[str] = []
    current: list[str] = []
    words = 0
    for paragraph in re.split(r"\n\s*\n", text):
        current.append(paragraph.strip())
        words += len(paragraph.split())
        if words >= SECTION_WORDS:
            sections.append("\n\n".join(current))
            current, words = [], 0
    if words:
        sections.append("\n\n".join(current))
    return sections


def keywords(text: str, count: int = 5) -> list[str]:
    """Return the most frequent long words of a text."""
    frequency = Counter(word.lower() for word in _WORD.findall(text) if len(word) > 5)
    return [word for word, _ in frequency.most_common(count)]
