"""A command that is to run elsewhere: its words, and the places that they name, looked at from here.

Left out: what is read at a place. The command itself looks closely, where it runs.
"""

import os
import re
from typing import Any, NamedTuple

from saecore import storage
from saecore.runs.run import holds_run
from saecore.storage import reason, resolved, split_settings

from . import commands

READ = ("images", "run", "embeddings", "labels", "texts", "text", "vocabulary", "interpreter", "masks")
WRITTEN = ("out", "save", "pages", "npy", "log_json")
MODELS = ("clip", "sae", "head", "start", "against")
"""Arguments of commands that name places: to read, to write, and models, which may also be names on the Hugging Face Hub."""

NO_PLACES = ("", "demo", "demo-patches", "-")
"""Values of these that name nothing, what every machine has, and the output of the job."""


class Order(NamedTuple):
    """The command that is to run on the cluster."""

    name: str
    words: list[str]
    arguments: Any


def placed(order: Order, is_shared: bool) -> list[str]:
    """The command's words with paths made absolute, since a job starts in another folder; says what could not be looked at.

    ValueError for a path that the cluster cannot see, a place at which there is nothing, and a folder that takes no run.
    """
    words = list(order.words)
    for field in (*READ, *WRITTEN, *MODELS):
        given = getattr(order.arguments, field, ())
        for place in (given,) if isinstance(given, str) else given:
            with commands.given(commands.flag(field)):
                if place not in NO_PLACES and (field not in MODELS or "://" in place or os.path.exists(place)):
                    check_place(place, field, is_shared)
                    words = moved(words, order.arguments, field, place)
    if order.name in ("explain", "embed", "run") and not getattr(order.arguments, "text", ""):
        check_run(order.arguments.out)
    return words


def moved(words: list[str], arguments: Any, field: str, place: str) -> list[str]:
    """A command line with a field's path made absolute: after the field's flag, or where it is no other flag's value."""
    flag, before, found = commands.flag(field), "", []
    for word in words:
        if word.startswith("--"):
            before = word.partition("=")[0].replace("_", "-")
        name = before.removeprefix("--").replace("-", "_")
        is_free = before in ("", flag) or isinstance(getattr(arguments, name, None), bool)
        if word == place and is_free:
            word = resolved(place)
        elif before == flag and word.partition("=")[2] == place:
            word = f"{flag}={resolved(place)}"
        found.append(word)
    return found


def check_run(out: str) -> None:
    """ValueError if a folder takes no run."""
    with commands.given("--out"):
        try:
            holds_run(resolved(out))
        except ValueError as error:
            if not isinstance(error.__cause__, OSError) or "://" not in out:
                raise
            print(f"not looked at from here: {out}: {reason(error.__cause__)}", flush=True)


def check_place(place: str, field: str, is_shared: bool) -> None:
    """ValueError for a path that the cluster cannot see, and for a place to read that is not there.

    What this machine may not ask is no mistake: the cluster's machines may have rights of their own. Of a glob, only the folder
    is looked at, since it may hold 10^8 files.
    """
    if "://" not in place and not is_shared:
        raise ValueError(
            f"{place} is a path of this machine; name an address that the cluster can reach, such as s3://, or say "
            "--shared-disk if all of its machines see this path"
        )
    if field in WRITTEN or place.startswith(("hf://", "http://", "https://")):
        return
    address, settings = split_settings(resolved(place))
    glob = re.match(r"(.*?)/[^/]*[*?[]", address)
    try:
        is_there = storage.exists(place) or (glob is not None and storage.exists((glob[1] or "/") + settings))
    except OSError as error:
        print(f"not looked at from here: {place}: {reason(error)}", flush=True)
        return
    if not is_there:
        raise ValueError(f"{place}: there is nothing")
