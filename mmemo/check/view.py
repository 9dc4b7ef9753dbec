"""The output of ``mmemo check``."""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from mmemo.check.changes import Fit
from mmemo.check.memory import FORMULA, FORMULA_OF_REFERENCE, MemoryEstimate
from mmemo.check.notes import FILE_KINDS, MEANINGS, MediaNote, by_kind
from mmemo.console import console
from mmemo.features.keys import Span
from mmemo.media.clip import BadClip

_REPEATED = re.compile(r"(<\|[^<>|]+\|>)\1+")
_BARS = 10
_SHOWN_BAD = 5
_SHOWN_NOTES = 3


@dataclass(frozen=True, slots=True)
class Preview:
    """A row as the model sees it, with its tokens by modality. ``learnt``: tokens in the loss."""

    sample_id: str
    text: str
    tokens: Mapping[str, int]
    learnt: int


def shorten(text: str) -> str:
    """The text with runs of one special token as ``<|video|> x 8``."""
    return _REPEATED.sub(lambda run: f"{run[1]} x {len(run[0]) // len(run[1])} ", text)


def show_media(rows: int, clips: int, there: int, files: int, *, probed: bool) -> None:
    """Print how many files were found."""
    what = "read through" if probed else "found"
    console.print(f"{rows} rows, {clips} clips, {there} of {files} files {what}.")


def show_bad(bad: Sequence[BadClip]) -> None:
    """Print the first clips that cannot be used."""
    for clip in bad[:_SHOWN_BAD]:
        console.print(f"  {clip.path}: {clip.kind}: {clip.detail}", style="yellow")
    if len(bad) > _SHOWN_BAD:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(b.kind for b in bad).items())
        console.print(f"  and {len(bad) - _SHOWN_BAD} more ({kinds} in all)", style="yellow")


def show_notes(notes: Sequence[MediaNote], clips: int, *, probed: bool) -> None:
    """Print a table of the notes on ``clips`` clips, and the first clips of each kind."""
    of = f"{clips} clip{'' if clips == 1 else 's'}" + ("" if probed else "; --probe reads all")
    if not notes:
        console.print(f"No notes on {of}.")
        return
    table = Table(title=f"Notes on {of}", box=None, title_justify="left")
    table.add_column("note")
    table.add_column("clips", justify="right")
    table.add_column("what it means")
    found = by_kind(notes)
    for kind, some in found.items():
        count = len({(note.path, note.start, note.end) for note in some})
        table.add_row(kind, str(count), MEANINGS[kind])
    console.print(table)
    for kind, some in found.items():
        # What is odd about a whole file is said once, however many clips it holds.
        lines = list(dict.fromkeys((note.path, _span(note), note.detail) for note in some))
        for path, span, detail in lines[:_SHOWN_NOTES]:
            line = f"  {kind}: {path}: {detail}{span}"
            console.print(line, style="yellow", soft_wrap=True)
        if len(lines) > _SHOWN_NOTES:
            console.print(f"  {kind}: and {len(lines) - _SHOWN_NOTES} more", style="yellow")


def _span(note: MediaNote) -> str:
    if note.kind in FILE_KINDS:
        return ""
    return Span(note.path, note.start, note.end).label


def show_preview(preview: Preview) -> None:
    """Print one row as the model will see it."""
    counts = ", ".join(f"{count} {name}" for name, count in preview.tokens.items())
    total = sum(preview.tokens.values())
    learnt = f"; {preview.learnt} of them are trained on" if preview.learnt else ""
    console.rule(Text(preview.sample_id, style="bold"), align="left")
    console.print(shorten(preview.text))
    console.print(f"{total} tokens: {counts}{learnt}.", style="dim")


def show_lengths(lengths: Sequence[int], limit: int | None, new_tokens: int) -> None:
    """Print a histogram of row lengths, with the median and the longest."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    table = Table(title="Tokens per row", box=None, title_justify="left", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for place in range((high - low) // width + 1):
        start = low + place * width
        end = min(start + width - 1, high)
        bar = "█" * max(bool(counts[place]), round(40 * counts[place] / most))
        over = limit is not None and end > limit
        name = str(start) if start == end else f"{start} to {end}"
        table.add_row(name, Text(bar, style="red" if over else ""), str(counts[place]))
    console.rule(style="dim")
    console.print(table)
    room = "no limit" if limit is None else f"at most {limit} fit"
    if limit is not None and new_tokens:
        room += f" beside an answer of {new_tokens}"
    middle = round(statistics.median(lengths))
    console.print(f"median {middle}, longest {high}; {room}. Nothing is ever truncated.")


def show_memory(estimate: MemoryEstimate) -> None:
    """Print the estimate by phase and part, and its formula."""
    learnt = f"; {estimate.trainable:,} trainable parameters" if estimate.trainable else ""
    console.print(
        f"Memory of one device at the longest batch: about {size(estimate.total)}{learnt}"
    )
    for name, parts in memory_parts(estimate):
        shown = ", ".join(f"{part} {size(amount)}" for part, amount in parts.items() if amount)
        console.print(f"  {name}: {shown}")
    formula = FORMULA + (FORMULA_OF_REFERENCE if estimate.reference else "")
    console.print(f"  ({formula})", style="dim")


def show_changes(there: tuple[str, int], fits: Sequence[Fit]) -> None:
    """Print that a run does not fit, and with which overrides it does.

    Args:
        there: what the run was to fit into, and its bytes.
    """
    name, amount = there
    what = "a device" if name == "a device" else f"{name} that is free"
    console.print(f"That is more than the {size(amount)} of {what}.", style="red")
    if not fits:
        console.print("No change that keeps the experiment makes it fit; use larger devices.")
        return
    console.print("It fits with one of these, the cheapest first:")
    for fit in fits:
        shown = " ".join(shlex.quote(f"--{one}") for one in fit.overrides)
        text = f"  {shown}  (about {size(fit.estimate.total)})"
        console.print(Text(text), soft_wrap=True)


def memory_parts(estimate: MemoryEstimate) -> list[tuple[str, Mapping[str, int]]]:
    """The parts of an estimate: what is always there, and what each phase adds."""
    kept = {
        "weights": estimate.weights,
        "trained weights": estimate.adapter,
        "optimizer": estimate.optimizer,
        "reference": estimate.reference,
    }
    return [("always", kept), *((phase.name, phase.parts) for phase in estimate.phases)]


def show_disk(store: int | None, checkpoints: int | None, *, free: int, budget: int | None) -> None:
    """Print what a run would write, beside the free bytes and the budget of the store."""
    found = [f"features {size(store)}" if store is not None else "no feature store"]
    found += [f"checkpoints {size(checkpoints)}"] if checkpoints is not None else []
    console.print(f"Disk: {', '.join(found)}; {size(free)} free.")
    if budget is not None and store is not None and store > budget:
        console.print(
            f"  The features are larger than store.budget_gb={budget / 1e9:g}; some will "
            "be computed again in every epoch.",
            style="yellow",
        )
    if (store or 0) + (checkpoints or 0) > free:
        console.print("  That does not fit: free some space first.", style="yellow")


def size(amount: float) -> str:
    """Bytes in readable form, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
