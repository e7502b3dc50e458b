"""The arguments of `python -m benchmarks precision`, whose measurements are in `benchmarks.rounding`."""

import dataclasses
import json
import platform
from typing import Any

from jobs import commands


@dataclasses.dataclass(frozen=True)
class Precision:
    """bfloat16 against float32 on a CPU: images a second with 32 maps, beside the ordinary script, and which latents and maps
    it changes."""

    batches: tuple[int, ...] = (8, 32, 64)
    """Images at once of ours; the ordinary script has 64."""
    rounds: int = 5
    """Rounds in which all ways are timed in turn; 0 omits the speed."""
    threads: int = 1
    """CPU threads. One is timed by its CPU time, several by the clock."""
    scenes: int = 512
    """Scenes on which latents and maps of the embedded model are compared; 0 omits that."""
    photographs: int = 256
    """Parts of photographs on which those of B/32 are compared; 0 omits that."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, rounds=0, threads=1, scenes=0, photographs=0)
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"--batches {self.batches}: at least one number, none below 1")

    def tell(self) -> None:
        """Measure and print."""
        import torch

        from benchmarks import rounding
        from saecore.pipeline.inference import bfloat16_gain

        with commands.mistakes():
            rows = rounding.speed(self.batches, self.rounds, self.threads) if self.rounds else []
            compared = [rounding.of_demo(self.scenes)] if self.scenes else []
            compared += [rounding.of_shape(self.photographs)] if self.photographs else []
        about: dict[str, Any] = {
            "machine": f"{platform.machine()}, torch {torch.__version__}",
            "bfloat16_gain": round(bfloat16_gain(), 2),
            "config": dataclasses.asdict(self),
        }
        if self.json:
            print(
                json.dumps(about | {"speed": [r._asdict() for r in rows], "agreement": [c._asdict() for c in compared]})
            )
            return
        gain = f"the processor multiplies in bfloat16 at {about['bfloat16_gain']} times the speed of float32"
        print(f"{about['machine']}; {gain}; {self.threads} threads")
        print("", rounding.told(rows, compared), sep="\n")
