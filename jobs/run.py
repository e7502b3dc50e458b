"""The whole way in one command: images to latents and maps, an index, names, and pages to look at.

    python -m jobs.run --demo --out runs/demo
    python -m jobs.run --images photos/ --clip openai/clip-vit-base-patch16 --sae SAE --vocabulary words.txt --out runs/photos

    explain -> index -> name, where there is a vocabulary -> report

Each step is the command of that name, called in this process with the flags that concern it; each says itself what it does.
The same command again does what is missing: explain resumes or says that the run is complete, index takes what is new; names
and pages, which take little time, are made again. A step that fails ends the command with the exit code of the step.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from saecore.naming.vocabulary import read_vocabulary
from saecore.pipeline.config import keeps_results

from . import cluster, commands, exits, explain, index, name, report


@dataclasses.dataclass(frozen=True)
class Arguments(explain.Arguments):
    """Images to latents, maps, an index, names and pages.

    Needs --images, --clip and --sae, or --demo in place of these three; and --out. Without --vocabulary latents have no names.
    """

    vocabulary: str = dataclasses.field(default="", metadata=keeps_results("names come after the images"))
    """Words or phrases that latents may be called by: a UTF-8 file with one a line. The CLIP `demo` has one of its own."""
    templates: tuple[str, ...] = dataclasses.field(
        default=("{}",), metadata=keeps_results("names come after the images")
    )
    """What each word is put into, at {}. Of several, the mean of their L2-normalised embeddings."""
    pages: str = dataclasses.field(default="", metadata=keeps_results("pages come after the images"))
    """Local folder for the pages; by default `report` in the run."""
    keep_embeddings: bool = dataclasses.field(
        default=True, metadata=keeps_results("`ExplainConfig.embeddings` holds it")
    )
    """Write the CLIP embeddings too: they make names better."""

    def check(self) -> None:
        """See `explain.Arguments.check`."""
        super().check()
        commands.check_templates(self.templates)
        if not self.pages and "://" in self.out:
            raise ValueError(f"--out {self.out} is at an address: name a local folder for the pages with --pages")

    @property
    def names(self) -> bool:
        """Whether there is a vocabulary for this CLIP."""
        return bool(self.vocabulary) or (self.clip or "demo") == "demo"


class Step(NamedTuple):
    """A command of the way."""

    name: str
    what: str
    main: Callable[[Sequence[str]], int]
    words: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    """Check what can be checked before the work, take all steps, say what came of them."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "run")
        if arguments.vocabulary:
            check_vocabulary(arguments.vocabulary)
    steps = way(arguments)
    if arguments.dry_run:
        code = take(steps[0])
        if not code:
            print(f"then would {', '.join(step.name for step in steps[1:])}")
        return code
    end = exits.COMPLETE
    for place, step in enumerate(steps, 1):
        print(f"{'' if place == 1 else chr(10)}{place} of {len(steps)}  {step.name}: {step.what}", flush=True)
        code = take(step)
        if code == exits.REFUSED:  # the run is complete, and the other steps have their work
            end = code
        elif code:
            # Else a signal, or a reader that has gone: the step has said so. A mistake in the first step has begun nothing.
            if code < 128 and (place > 1 or code != exits.MISTAKE):
                print(
                    f"ended at step {place} of {len(steps)}, {step.name}; the same command goes on there",
                    file=sys.stderr,
                )
            return code
    if not arguments.names:
        adds = commands.line("name", "--run", arguments.out, "--vocabulary", "WORDS.txt")
        print(f"no names      latents get some from a file with one word a line, by --vocabulary or {adds}")
    ask = commands.line("query", *(("find", arguments.out, "WORD") if arguments.names else ("latents", arguments.out)))
    print(f"next          {ask}")
    return end


def check_vocabulary(address: str) -> None:
    """ValueError if names could not be found later: a mistake is told before the long work."""
    with commands.given("--vocabulary"):
        words = read_vocabulary(address).words
    if len(words) < 2:
        raise ValueError(f"--vocabulary {address}: one word leaves no choice; at least 2 are needed")


def way(arguments: Arguments) -> list[Step]:
    """The steps, each with its command line."""
    about = ["--run", arguments.out]
    steps = [
        Step(
            "explain",
            "which latents fire for each image, and where",
            explain.main,
            commands.words(arguments, explain.Arguments),
        ),
        Step("index", "sort the run by latent", index.main, about),
    ]
    if arguments.names:
        given = ["--vocabulary", arguments.vocabulary] if arguments.vocabulary else []
        given += ["--templates", *arguments.templates] if arguments.templates != ("{}",) else []
        steps.append(Step("name", "words for the latents", name.main, [*about, *given]))
    pages = ["--out", arguments.pages] if arguments.pages else []
    return [*steps, Step("report", "pages to look at", report.main, [*about, *pages])]


def take(step: Step) -> int:
    """The exit code of one step. Ray, if the step has started it, ends with it."""
    try:
        with commands.followed():
            return step.main(step.words)
    except KeyboardInterrupt as error:
        raise commands.UnfinishedError(commands.RESUMES) from error
    finally:
        cluster.leave()


if __name__ == "__main__":
    sys.exit(main())
