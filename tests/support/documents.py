"""The guides as text: their fenced blocks, headings and links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What a link may name behind its `#`: the headings, as GitHub writes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeats = sum(1 for a in found if re.fullmatch(re.escape(kept) + r"(-\d+)?", a))
        found.add(f"{kept}-{repeats}" if repeats else kept)
    return found


def links(text: str) -> list[str]:
    """The targets of links and pictures; what looks like one in `code` is none."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def guides() -> list[Path]:
    """Every committed *.md."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.split("\0") if name]
    folders = (ROOT, *(ROOT / name for name in ("nnj", "nnj_plugins", "examples", "tests")))
    return sorted({p for f in folders for p in (f.glob("*.md") if f == ROOT else f.rglob("*.md"))})
