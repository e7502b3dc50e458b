"""How long a run took, in the words that the terminal and the pages share. run.json has two kinds of seconds:

    session_seconds    of the session that completed the run, by the clock: start, images, close
    step_seconds       of all sessions and processes, added up: read, decode, explain, write

A person waits for the first. The second are more than the first if processes work side by side, and less if they wait.
"""

from saecore.runs.record import Record

WORDS = {
    "start": "to start",
    "images": "for {images} ({rate} a second, loading of models included)",
    "close": "to close",
}


def waited(record: Record) -> str:
    """A session by the clock, from the command to its last word, without the start of Python and the end of Ray."""
    seconds, images = record.session_seconds, record.session_images
    rate = f"{images / max(seconds.get('images', 0.0), 1e-9):,.1f}"
    counted = "1 image" if images == 1 else f"{images:,} images"
    parts = [
        f"{seconds[part]:.1f} s {words.format(images=counted, rate=rate)}"
        for part, words in WORDS.items()
        if part in seconds
    ]
    last = "" if images == record.images else "the last session took "
    return f"{last}{sum(seconds.values()):.1f} s in all: {', '.join(parts)}"


def worked(record: Record) -> str:
    """How long all processes worked together, and the share of each step."""
    steps = record.step_seconds
    total = sum(steps.values())
    shares = ", ".join(f"{step} {seconds / (total or 1.0):.0%}" for step, seconds in steps.items())
    return f"{total:.1f} s added up over processes{': ' if shares else ''}{shares}"
