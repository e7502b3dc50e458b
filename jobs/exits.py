"""Exit codes of all commands, stated once: a script, or a cluster that retries, goes by them."""

COMPLETE = 0
FAULT = 1
MISTAKE = 2
REFUSED = 3
INTERRUPTED = 130
TERMINATED = 143
UNREAD = 141

MEANINGS = {
    COMPLETE: "done",
    FAULT: "a fault, a place that refuses what is written, or an SAE that does not fit the images",
    MISTAKE: "a mistake, told in one sentence before the work begins",
    REFUSED: "done, and more images are refused than --max-error-share allows",
    INTERRUPTED: "Ctrl-C",
    TERMINATED: "SIGTERM",
    UNREAD: "nobody reads the output any more (| head)",
}


def in_words() -> str:
    """All of them, in one paragraph of help."""
    return "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."
