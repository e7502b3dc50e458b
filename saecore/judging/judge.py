"""Every score of one batch of pictures: are the maps faithful, are they their target's own, do they stay the same?

Of each method, for each target of each picture (`saecore.schema.FAITHFULNESS`):

    srg              symmetric relevance gain, tokens dropped (`saecore.evaluation.faithfulness`); srg_mean, srg_blur: filled
    srg_of_another   the same by the map of another target of the picture
    span             z of the whole picture less z without any patch: what all patches together can explain
    alike            mean |rank correlation| with the maps of the picture's other targets
    occlusion        rank correlation with what each patch's absence alone takes from z
    shapley          rank correlation with Shapley values by sampling
    shapley_error    of the Shapley values: mean standard error over patches, as a share of their deviation over patches
    completeness     |map + remainder - z| / max(1, |z|), before rounding; of decompositions
    localisable      |sum of the map| / (|sum of the map| + |remainder|); likewise
    sink_share       the part of sum |map| that lies on sinks
    other_row        |rank correlation| with the map by a random row of the encoder, of equal norm
    cascade_1, _half, _all    the same with the map after so many last layers were drawn anew (Adebayo et al. 2018)
    shift, jpeg, bfloat16     rank correlation with the map after a shift by 2 pixels, after JPEG 90, by a tower in bfloat16

Two nulls stand beside them, on fewer targets: the same SAE with random rows, and a tower that nobody trained. What a method
scores there, it owes to the picture and to the architecture.

Shapes: B images, n targets, P patches, S scores, C curves, T steps.
"""

import copy
import dataclasses
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saecore import methods
from saecore.evaluation import faithfulness, localisation, nulls, stability
from saecore.judging.settings import Settings
from saecore.judging.subject import Shown, Subject
from saecore.judging.verdict import BASELINES, OTHER_ROWS, SHAPLEY, TRAINED, UNTRAINED, Key
from saecore.methods import METHODS
from saecore.pipeline.inference import OnDevice
from saecore.relevance.agreement import rank_correlation
from saecore.relevance.maps import completeness_error, sink_share
from saecore.removal.shapley import Shapley, shapley

SAMPLED = (methods.SHAPLEY,)
"""Methods that take hundreds of forwards: their maps are not made again of every changed picture and model."""


class Judged(NamedTuple):
    """All scores of B pictures."""

    latents: np.ndarray
    """int32 (B, models, n): the targets that are latents; -1 where there are fewer, and where a target is a word."""
    scores: np.ndarray
    """float32 (B, S, n), in the order of `Judge.keys`; NaN where there is none."""
    curves: np.ndarray
    """float32 (B, C, n, 2, T + 1): MIF and LIF, in the order of `Judge.curve_keys`; NaN where there is none."""
    maps: np.ndarray
    """float32 (B, M, n, P), of `Judge.sources`; M is 0 unless they are asked for."""


class Judge(OnDevice[Judged]):
    """Models on their device, and what is made of them to compare with. All is in float32, since removal subtracts forwards."""

    def __init__(self, subject: Subject, settings: Settings, device: str, keep_maps: bool = False) -> None:
        super().__init__(subject.tower, device, subject.methods, "float32")
        self.settings, self.keep_maps = settings, keep_maps
        words = None if subject.words is None else subject.words.to(self.device)
        references = ("occlusion",) if "agreement" in settings.checks else ()
        self.judged = subject.methods
        every = tuple(dict.fromkeys((*subject.methods, *references)))
        sae, head = subject.sae.to(self.device), None if subject.head is None else subject.head.to(self.device)
        self.subject = dataclasses.replace(subject, sae=sae, methods=every, words=words, head=head)
        own = dataclasses.replace(self.subject, methods=tuple(m for m in subject.methods if m not in SAMPLED))
        self.nulls, self.changed = dict[str, Subject](), dict[str, Subject]()
        if "nulls" in settings.checks and settings.null_latents:
            without = dataclasses.replace(self.subject, words=None)
            self.nulls[OTHER_ROWS] = dataclasses.replace(without, sae=nulls.with_other_rows(sae, settings.seed))
            anew = nulls.untrained(self.tower, settings.seed).to(self.device)
            self.nulls[UNTRAINED] = dataclasses.replace(without, tower=anew)
        if "randomisation" in settings.checks:
            rows = nulls.with_other_rows(sae, settings.seed)
            self.changed["other_row"] = dataclasses.replace(own, sae=rows, words=None)
            n = self.tower.n_layers
            for name, layers in {"cascade_1": 1, "cascade_half": n // 2, "cascade_all": n}.items():
                tower = nulls.cascaded(self.tower, layers, settings.seed).to(self.device)
                self.changed[name] = dataclasses.replace(own, tower=tower)
        self.rounded: Subject | None = None
        if "stability" in settings.checks:
            exact = tuple(name for name in own.methods if not METHODS[name].needs_float32)
            tower = copy.deepcopy(self.tower)
            tower.run_in(torch.bfloat16)
            self.rounded = dataclasses.replace(own, tower=tower, methods=exact)
        self.own = own
        self.keys, self.curve_keys, self.sources = list[Key](), list[Key](), list[str]()

    def _infer(self, pixels: Tensor) -> Judged:
        asked = self.settings.targets.latents
        given = None if self.settings.k else torch.tensor(asked, device=pixels.device).expand(len(pixels), -1)
        shown = self.subject.show(pixels, given, self.settings.k)
        sheet = _Sheet(shown.values.shape[1])
        reference = self._scored(sheet, TRAINED, self.subject, pixels, shown)
        latents = [_numbers(shown, sheet.n)]
        for name, subject in self.nulls.items():
            seen = subject.show(pixels, None, self.settings.null_latents)
            self._scored(sheet, name, subject, pixels, seen)
            latents.append(_numbers(seen, sheet.n))
        own = {name: shown.maps[name].relevance for name in self.own.methods}
        self._changed(sheet, pixels, shown, own)
        self.keys, self.curve_keys = list(sheet.scores), list(sheet.curves)
        maps = self._sources(pixels, shown, reference) if self.keep_maps else {}
        self.sources = list(maps)
        kept = torch.stack(list(maps.values()), 1) if maps else shown.values[:, None, :, None][:, :0]
        made = (
            torch.stack(latents, 1).int(),
            torch.stack(list(sheet.scores.values()), 1),
            torch.stack(list(sheet.curves.values()), 1),
            kept.masked_fill(~shown.fires[:, None, :, None], torch.nan),
        )
        return Judged(*(tensor.cpu().numpy() for tensor in made))

    def _sources(self, pixels: Tensor, shown: Shown, reference: Shapley | None) -> dict[str, Tensor]:
        """The maps whose orders are judged, (B, n, P) each."""
        maps = {name: shown.maps[name].relevance for name in self.judged}
        if reference is not None:
            maps[SHAPLEY] = reference.values
        return maps | {name: m.expand_as(next(iter(maps.values()))) for name, m in self._baselines(pixels).items()}

    def _baselines(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 1, P) each."""
        shown, grid = pixels.cpu().numpy(), self.tower.grid
        # By the picture, not by the batch: rows must not depend on how pictures are batched.
        noise = [localisation.noise(1, grid, zlib.crc32(picture.tobytes()))[0] for picture in shown]
        side = self.tower.vision.config.patch_size
        in_patches = shown[:, : grid[0] * side, : grid[1] * side]  # pixels at the edges may fill no patch
        made = (np.stack(noise), localisation.centre(len(shown), grid), localisation.edges(in_patches, grid))
        return {
            name: torch.from_numpy(m).float()[:, None].to(pixels.device)
            for name, m in zip(BASELINES, made, strict=True)
        }

    def _scored(self, sheet: "_Sheet", model: str, subject: Subject, pixels: Tensor, shown: Shown) -> Shapley | None:
        """Write the scores that need nothing but this model; returns the Shapley values if they were sampled."""
        settings, fires = self.settings, shown.fires
        drop, P = shown.remove("drop"), self.tower.grid[0] * self.tower.grid[1]
        reference = None
        # Without a token of its own, a model makes nothing of no patches, and there is no Shapley value.
        if settings.shapley_subsets and model == TRAINED and self.tower.n_own:
            reference = shapley(drop, P, len(pixels), settings.shapley_subsets, settings.seed)
            spread = reference.values.std(-1)
            sheet.write(Key(model, SHAPLEY, "shapley_error"), reference.error.mean(-1) / spread, fires)
        for name, relevance in self._sources(pixels, shown, reference).items():
            order = faithfulness.order_of(relevance)
            for way in settings.ways if model == TRAINED else settings.ways[:1]:
                found = faithfulness.curves(shown.remove(way), order, settings.steps, subject.least)
                first = way == settings.ways[0]
                sheet.curve(Key(model, name, way), found, fires)
                sheet.write(Key(model, name, "srg" if way == "drop" else f"srg_{way}"), found.srg, fires)
                if first and name == self.judged[0]:
                    sheet.write(Key(model, name, "span"), found.mif[..., 0] - found.mif[..., -1], fires)
                if first and fires.shape[1] > 1 and name not in BASELINES:
                    sheet.write(Key(model, name, "srg_of_another"), found.srg_of_another, fires)
            if name not in BASELINES:
                sheet.write(Key(model, name, "alike"), faithfulness.alikeness(relevance), fires)
            if "occlusion" in shown.maps and name != "occlusion":
                agreed = rank_correlation(relevance, shown.maps["occlusion"].relevance)
                sheet.write(Key(model, name, "occlusion"), agreed, fires)
            if reference is not None and name != SHAPLEY:
                sheet.write(Key(model, name, "shapley"), rank_correlation(relevance, reference.values), fires)
        for name in self.judged:
            maps = shown.maps[name]
            sheet.write(Key(model, name, "sink_share"), sink_share(maps, shown.sinks), fires)
            if METHODS[name].decomposes:
                placed, rest = maps.relevance.sum(-1).abs(), maps.remainder.abs()
                sheet.write(Key(model, name, "completeness"), completeness_error(maps, shown.values), fires)
                sheet.write(Key(model, name, "localisable"), placed / (placed + rest), fires)
        return reference

    def _changed(self, sheet: "_Sheet", pixels: Tensor, shown: Shown, own: dict[str, Tensor]) -> None:
        """Write how maps of the same targets change with the model, and with the picture."""
        for metric, subject in self.changed.items():
            other = subject.show(pixels, shown.latents)
            for name, relevance in own.items():
                n = other.values.shape[1]  # a random row is of a latent: texts and concepts have none
                agreed = rank_correlation(relevance[:, :n], other.maps[name].relevance).abs()
                sheet.write(Key(TRAINED, name, metric), agreed, shown.fires[:, :n])
        if self.rounded is None:
            return
        again = {name: (self.own, change(pixels)) for name, change in stability.CHANGES.items()}
        for metric, (subject, picture) in (again | {"bfloat16": (self.rounded, pixels)}).items():
            other = subject.show(picture, shown.latents)
            for name in subject.methods:
                agreed = rank_correlation(own[name], other.maps[name].relevance)
                sheet.write(Key(TRAINED, name, metric), agreed, shown.fires)


class _Sheet:
    """Scores and curves of one batch by their keys, in the order in which they are written."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.scores, self.curves = dict[Key, Tensor](), dict[Key, Tensor]()

    def write(self, key: Key, values: Tensor, fires: Tensor) -> None:
        """Values (B, m) of the first m targets; none where a latent does not fire."""
        self.scores[key] = _padded(values.float().masked_fill(~fires, torch.nan), self.n)

    def curve(self, key: Key, found: faithfulness.Curves, fires: Tensor) -> None:
        """Both curves, (B, m, T + 1) each."""
        both = torch.stack([found.mif, found.lif], 2).float().masked_fill(~fires[..., None, None], torch.nan)
        self.curves[key] = _padded(both.movedim(1, -1), self.n).movedim(-1, 1)


def _padded(values: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, n - values.shape[-1]), value=torch.nan)


def _numbers(shown: Shown, n: int) -> Tensor:
    return torch.nn.functional.pad(shown.latents, (0, n - shown.latents.shape[1]), value=-1)
