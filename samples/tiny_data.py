"""The text of the tiny sample: documentation that every Python carries, and graded arithmetic.

Tokens are bytes. Whole topics of `pydoc_data.topics`, and whole pairs of operands, are held out:
no held-out topic and no problem over a held-out pair is ever trained on.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

GRADES = (1, 2, 3, 4)
"""Difficulties of arithmetic: the digits of the larger operand."""

PROBLEM = re.compile(r"^(\d+)([-+*])(\d+)=(\d+)$", re.MULTILINE)
"""A line of arithmetic: operands, operator, result."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes: u8[N] each, prose and arithmetic apart; the topics' names."""

    prose: Tensor
    arithmetic: Tensor
    heldout: str
    topics: tuple[str, ...]
    heldout_topics: tuple[str, ...]

    def to_profile(self) -> bytes:
        """64 KiB of training text, a quarter of it arithmetic: `samples/corpus.txt`."""
        return bytes([*self.prose[: 48 * 1024].tolist(), *self.arithmetic[: 16 * 1024].tolist()])


def as_bytes(text: str) -> Tensor:
    """Text as UTF-8 bytes u8[N]; a byte is a token."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def related(topics: dict[str, str]) -> list[list[str]]:
    """Groups of topics that share a line of over 40 characters: some are chapters of others."""
    group = {name: name for name in topics}
    seen: dict[str, str] = {}
    for name, text in topics.items():
        for line in text.splitlines():
            if len(line.strip()) <= 40:
                continue
            other = group[seen.setdefault(line.strip(), name)]
            mine = group[name]
            if other != mine:
                group = {n: other if g == mine else g for n, g in group.items()}
    members: dict[str, list[str]] = {}
    for name, leader in group.items():
        members.setdefault(leader, []).append(name)
    return list(members.values())


def split_topics(share: float = 0.1) -> tuple[dict[str, str], dict[str, str]]:
    """The topics (training, held out): groups of related ones stay together.

    Groups are taken in the order of a hash of their names, skipping those that would make more
    than `share` of the text: the seed has no say.
    """
    from pydoc_data.topics import topics

    budget = share * sum(map(len, topics.values()))
    held: set[str] = set()
    groups = related({name: topics[name] for name in sorted(topics)})
    for group in sorted(groups, key=lambda g: zlib.crc32(" ".join(g).encode())):
        size = sum(len(topics[name]) for name in group)
        if size <= budget:
            held |= set(group)
            budget -= size
    names = sorted(topics)
    train = {name: topics[name] for name in names if name not in held}
    return train, {name: topics[name] for name in names if name in held}


def is_heldout_pair(a: int, b: int) -> bool:
    """Whether the unordered pair of operands is held out: one in ten."""
    return zlib.crc32(f"{min(a, b)},{max(a, b)}".encode()) % 10 == 0


def grade(a: int, b: int) -> int:
    """The difficulty of a problem: digits of its larger operand."""
    return len(str(max(a, b)))


def arithmetic(count: int, seed: int, *, heldout: bool) -> str:
    """`count` lines such as 47+385=432, every grade and operator equally often.

    Sums and differences (never negative) have operands of up to 4 digits; the smaller factor of
    a product has one digit. Grades follow each other at random.
    """
    rng = random.Random(f"{seed} {heldout}")
    lines: list[str] = []
    while len(lines) < count:
        level, operator = rng.choice(GRADES), rng.choice("+-*")
        a = rng.randrange(10 ** (level - 1) if level > 1 else 0, 10**level)
        b = rng.randrange(10 if operator == "*" else 10 ** rng.randint(1, level))
        if is_heldout_pair(a, b) != heldout:
            continue
        if operator == "-":
            a, b = max(a, b), min(a, b)
        elif rng.random() < 0.5:
            a, b = b, a
        result = {"+": a + b, "-": a - b, "*": a * b}[operator]
        lines.append(f"{a}{operator}{b}={result}\n")
    return "".join(lines)


def build(seed: int, problems: int = 200_000, heldout_problems: int = 1_500) -> Corpus:
    """The corpus of a seed; the topics and pairs held out are the same for every seed."""
    train, held = split_topics()
    return Corpus(
        prose=as_bytes("\n".join(train.values())),
        arithmetic=as_bytes(arithmetic(problems, seed, heldout=False)),
        heldout="\n".join(held.values()) + "\n" + arithmetic(heldout_problems, seed, heldout=True),
        topics=tuple(train),
        heldout_topics=tuple(held),
    )


def batch(
    corpus: Corpus, rows: int, length: int, generator: torch.Generator, arithmetic_share: float
) -> Tensor:
    """Random windows i64[rows, length]; about `arithmetic_share` of them are arithmetic."""
    numeric = int(torch.rand(rows, generator=generator).lt(arithmetic_share).sum())
    sources = [corpus.arithmetic] * numeric + [corpus.prose] * (rows - numeric)
    windows = []
    for source in sources:
        start = int(torch.randint(len(source) - length + 1, (), generator=generator))
        windows.append(source[start : start + length])
    return torch.stack(windows).to(torch.int64)


def windows(text: str, length: int) -> Tensor:
    """Text cut into consecutive windows i64[N, length + 1] that overlap by one byte."""
    data = as_bytes(text).to(torch.int64)
    return data.unfold(0, length + 1, length).contiguous()


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer in the `tokenizers` format: the id is the byte's value, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in symbols)
    symbols |= {b: chr(256 + i) for i, b in enumerate(others)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbols[b]: b for b in range(256)},
            "merges": [],
        },
    }
    path.write_text(json.dumps(tokenizer, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
