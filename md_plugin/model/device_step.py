"""A whole step of fused inference, recorded and replayed where that is faster.

Launching a hundred small kernels takes the host longer than a GPU needs for them. A `FusedStep`
copies atoms and pairs into buffers that stay in place (`md_plugin.model.buffers`), records the step
in CUDA graphs (`md_plugin.model.graphs`) and replays these from then on, until the buffers become
too small or much too large. Where ghosts are exchanged, each segment between two exchanges is a
graph of its own; without ghosts there is one graph.

The first step in new buffers runs as it is: kernels are compiled, operators counted. The second is
recorded, segment by segment, each of them replayed at once. Every step therefore exchanges as often
as any other, and a rank that records never keeps others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from md_plugin.halo import Halo, NoHalo, check_filled
from md_plugin.model.buffers import GROWTH, Buffers
from md_plugin.model.fusion import Exchange, Fused, FusedHipnn, Segments, resume, run, total
from md_plugin.model.graphs import CudaRecorder, Recorder, Watch
from md_plugin.pairs import Geometry, Pairs

logger = logging.getLogger("md_plugin")

GRAPHS = ("auto", "always", "never")
# "auto" records where a launch does less work than this on average: what a GPU does, at an assumed
# 5e13 floating-point operations per second, in the 20 microseconds that a launch takes Python.
WORK_PER_LAUNCH = 1e9
KERNELS = 8  # of a layer, about, in one block of receivers; `Watch` sees none of them
MOST_LAUNCHES = 5000  # in a graph; each takes memory of the GPU, and time to record

Segment = Callable[[], Exchange | Fused]


class CaptureError(RuntimeError):
    """A step was not recorded."""


def check_graphs(graphs: str) -> str:
    """The setting itself.

    Raises:
        ValueError: it is none of `GRAPHS`.
    """
    if graphs not in GRAPHS:
        raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {graphs!r}")
    return graphs


def fused_step(parts: Sequence[FusedHipnn], device: torch.device, graphs: str) -> FusedStep:
    """The step of a sum of networks on a device.

    Args:
        parts: the networks.
        device: theirs.
        graphs: "auto" records small steps on GPUs, "always" all of them, "never" none.

    Raises:
        ValueError: graphs are asked for where there are none, or the setting is none of `GRAPHS`.
    """
    check_graphs(graphs)
    there = device.type == "cuda" and not any(part.engine.threads for part in parts)
    if graphs == "always" and not there:
        raise ValueError(
            "graphs='always' needs the fused layers of backend 'triton' on a CUDA device, but the "
            f"potential computes on {device}; graphs='auto' records where it can"
        )
    recorder = CudaRecorder(device) if there and graphs != "never" else None
    return FusedStep(parts, recorder, forced=graphs == "always")


class FusedStep:
    """Energies and forces of a sum of networks; see the top of this file.

    Args:
        parts: the networks.
        recorder: records and replays; None runs each step as it is.
        forced: records whatever the size, and raises where that is not possible.
    """

    def __init__(
        self, parts: Sequence[FusedHipnn], recorder: Recorder | None = None, forced: bool = False
    ):
        self.parts, self.recorder, self.forced = tuple(parts), recorder, forced
        self._buffers: Buffers | None = None
        self._pieces: list[tuple[Callable[[], object], Exchange | Fused]] = []
        self._warm = False
        self._work = sum(part.work for part in self.parts)
        # Atoms for which launches do not matter, lowered by what steps turn out to launch.
        most = WORK_PER_LAUNCH * MOST_LAUNCHES / self._work
        self._too_many = float("inf") if forced else most

    @torch.no_grad()
    def evaluate(
        self, species: Tensor, geometry: Geometry, halo: Halo | None = None, split: str = ""
    ) -> Fused:
        """See `FusedHipnn.evaluate`; nothing of what comes back is written again.

        Virials of atoms are not recorded: they are rarely wanted, and cost more than launches.

        Raises:
            CaptureError: recording failed, and other ranks are waiting.
            RuntimeError: the positions ask for a derivative, or a step that has to be recorded
                cannot be.
            ValueError: ghosts, several layers, and no halo.
        """
        n_recv = geometry.pairs.n_recv
        plain = self.recorder is None or n_recv >= self._too_many or split == "atoms"
        if plain or geometry.x.requires_grad:
            return self._as_it_is(species, geometry, halo, split)
        if halo is None and any(len(part.layers) > 1 for part in self.parts):
            check_filled(geometry.x[:n_recv], geometry.pairs)
        buffers = self._buffers
        if buffers is None or not buffers.fit(geometry, halo):
            pad, growth = self.parts[0].model.species[0], GROWTH if buffers else 1.0
            self._buffers = buffers = Buffers.build(geometry, halo, pad, growth)
            self._pieces, self._warm = [], False
        buffers.fill(species, geometry)
        if self._pieces:
            return buffers.cut(self._replay(buffers, halo), split)
        if not self._warm:
            return buffers.cut(self._warm_up(buffers, halo), split)
        recorded = self._record(buffers, halo)
        if recorded is None:
            return self._as_it_is(species, geometry, halo, split)
        return buffers.cut(recorded, split)

    def _as_it_is(
        self, species: Tensor, geometry: Geometry, halo: Halo | None, split: str
    ) -> Fused:
        return total([part.evaluate(species, geometry, halo, split) for part in self.parts])

    def _segments(self, buffers: Buffers) -> Segments:
        found = []
        for part in self.parts:
            segments = part.segments(buffers.species, buffers.geometry, split="structures")
            found.append((yield from segments))
        return total(found)

    def _run(
        self, buffers: Buffers, halo: Halo | None, around: Callable[[Segment], Exchange | Fused]
    ) -> Fused:
        """All segments, each of them inside `around`."""
        segments = self._segments(buffers)
        if not buffers.exchanges or halo is None:
            return cast(Fused, around(lambda: run(segments, NoHalo(), buffers.geometry.pairs)))
        found, n = around(partial(resume, segments, None)), 0
        while isinstance(found, Exchange):
            found, n = around(partial(resume, segments, buffers.exchange(n, found, halo))), n + 1
        return found

    def _warm_up(self, buffers: Buffers, halo: Halo | None) -> Fused:
        """The first step in these buffers; settles whether others are recorded."""
        recorder, watch = cast(Recorder, self.recorder), Watch()

        def around(call: Segment) -> Exchange | Fused:
            with watch:
                return recorder.warm_up(call)

        found = self._run(buffers, halo, around)
        self._warm = True
        n_recv = cast(Pairs, buffers.pairs).n_recv
        launches = watch.launches + KERNELS * sum(len(part.layers) for part in self.parts)
        most = min(WORK_PER_LAUNCH * launches / self._work, n_recv * MOST_LAUNCHES / launches)
        if watch.waits:
            self._refuse(f"the host waits: {', '.join(sorted(set(watch.waits)))}")
        elif n_recv >= most and not self.forced:
            self._too_many, self._buffers = most, None
        return found

    def _record(self, buffers: Buffers, halo: Halo | None) -> Fused | None:
        """The second step in these buffers; None where it failed, and steps run as they are."""
        recorder = cast(Recorder, self.recorder)

        def around(call: Segment) -> Exchange | Fused:
            try:
                play, found = recorder.capture(call)
            except RuntimeError as error:
                raise CaptureError(
                    f"recording a step in CUDA graphs failed: {error}; graphs='never' "
                    "(MD_PLUGIN_GRAPHS=never) runs each step as it is"
                ) from error
            play()
            self._pieces.append((play, found))
            return found

        try:
            return self._run(buffers, halo, around)
        except CaptureError as error:
            if buffers.exchanges:  # other ranks wait: there is no way back before an exchange
                raise
            self._refuse(str(error.__cause__))
            return None

    def _replay(self, buffers: Buffers, halo: Halo | None) -> Fused:
        for n, (play, found) in enumerate(self._pieces):
            play()
            if isinstance(found, Exchange):
                buffers.exchange(n, found, cast(Halo, halo))
        return cast(Fused, self._pieces[-1][1])

    def _refuse(self, reason: str) -> None:
        """From now on steps run as they are; an error where graphs were asked for."""
        self.recorder, self._buffers, self._pieces = None, None, []
        if self.forced:
            raise RuntimeError(
                f"graphs='always', but a step cannot be recorded in CUDA graphs: {reason}; "
                "graphs='auto' runs it as it is"
            )
        logger.warning("steps are not recorded in CUDA graphs: %s", reason)
