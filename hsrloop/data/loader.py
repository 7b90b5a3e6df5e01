"""Batches of the training stream from any position."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsrloop.config import TrainConfig
from hsrloop.data.ahead import Made, arriving
from hsrloop.data.pixels.render import Renderer, without_broken
from hsrloop.data.pixels.render_torch import Layout, TorchRenderer
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.plan import AugmentPlan
from hsrloop.data.scenes.cutouts import CutoutStore
from hsrloop.data.scenes.scene import Scenes
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.data.stream import TrainStream
from hsrloop.data.workers import WorkerDied, WorkerPool
from hsrloop.ops.ranges import named
from hsrloop.records import Batch, Position

__all__ = ["TrainLoader", "WorkerDied"]

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Task:
    """One micro-batch: which images of which epoch."""

    epoch: int
    indices: tuple[int, ...]
    mosaic: bool


@dataclass(frozen=True, slots=True)
class _Targets:
    """Labels of one micro-batch."""

    boxes_cxcywh: np.ndarray  # (N, 4) float32 in [0, 1]
    labels: np.ndarray  # (N,) int64
    image_index: np.ndarray  # (N,) int64, sorted


# Of each image what `TrainStream.labels` returns: boxes, labels and the images they come from.
_Labels = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


class TrainLoader:
    """The training stream in micro-batches; holds no state of it.

    An optimizer step is `config.batch` consecutive samples of the epoch, the last one fewer; it
    comes in micro-batches of at most `micro_batch`. Any number of workers, any micro-batch and any
    cache give the same samples in the same order.

    Args:
        workers: processes that render; 0 renders in the calling thread. With a renderer one of them
            draws plans and labels, else the calling thread does.
        device: where the images go. On a GPU they are there when they are yielded: sent a
            micro-batch ahead, on a stream of their own.
        scenes: synthetic images beside the real ones; `store` then holds `scenes.backgrounds` after
            `refs`.
        cutouts: the pixels of `scenes.cutouts`.
        renderer: renders on its device instead, a micro-batch ahead; the host draws plans and
            labels only. Made from the same `store` and `cutouts`.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        store: ImageStore,
        config: TrainConfig,
        *,
        workers: int = 0,
        device: torch.device = _HOST,
        scenes: Scenes | None = None,
        cutouts: CutoutStore | None = None,
        renderer: TorchRenderer | None = None,
    ) -> None:
        self.batch = config.batch
        self.stream = TrainStream.of(refs, config, scenes)
        self.n_samples = self.stream.n_samples
        self.micro_batch = config.largest_micro_batch
        self._refs = self.stream.images
        self._store = store
        self._cutouts = cutouts
        self.workers = workers  # kept for when memory runs out and the host renders
        self._device = device
        self._renderer = renderer
        self._pool: WorkerPool[_Task, Any] | None = None
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""
        return -(-self.n_samples // self.batch)

    @property
    def sizes(self) -> set[int]:
        """Return the sizes of an epoch's micro-batches."""
        steps = {min(self.batch, self.n_samples), self.n_samples % self.batch} - {0}
        return {
            min(self.micro_batch, step - start)
            for step in steps
            for start in range(0, step, self.micro_batch)
        }

    def batches(self, position: Position, *, mosaic: bool = True) -> Iterator[Batch]:
        """Yield micro-batches from a position to the end of its epoch.

        What an earlier call left half-way ends here.

        Args:
            position: at the start of an optimizer step: a multiple of `batch`, within the epoch.
            mosaic: False closes mosaic and mixup.

        Raises:
            ValueError: the position is no start of a step.
            WorkerDied: a worker process is gone.
        """
        if position.sample % self.batch or not 0 <= position.sample < self.n_samples:
            raise ValueError(
                f"{position} is no start of a step: {self.n_samples} samples, batch {self.batch}"
            )
        self._end_running()
        made = self._run(position, mosaic)
        self._running = weakref.ref(made)
        return made

    def _run(self, position: Position, mosaic: bool) -> Generator[Batch, None, None]:
        order = self.stream.order(position.epoch)
        tasks, ends = [], []
        for start in range(position.sample, self.n_samples, self.batch):
            stop = min(start + self.batch, self.n_samples)
            for first in range(start, stop, self.micro_batch):
                last = min(first + self.micro_batch, stop)
                tasks.append(_Task(position.epoch, tuple(order[first:last].tolist()), mosaic))
                ends.append((last, last == stop))
        with closing(self._rendered(tasks)) as rendered:
            for (images, targets), (last, ends_step) in zip(rendered, ends, strict=True):
                done = last == self.n_samples
                yield Batch(
                    images=images,
                    boxes_cxcywh=torch.from_numpy(targets.boxes_cxcywh),
                    labels=torch.from_numpy(targets.labels),
                    image_index=torch.from_numpy(targets.image_index),
                    after=Position(position.epoch + done, 0 if done else last),
                    ends_step=ends_step,
                )

    def _end_running(self) -> None:
        """Leave an epoch that was left half-way, so that its thread asks the workers no more."""
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()

    def _rendered(self, tasks: Sequence[_Task]) -> Made[_Targets]:
        """Yield (B, 3, S, S) images, channels_last, and targets of each task in order."""
        rendered: Made[_Targets]
        if (drawing := self._renderer) is not None:
            planned = self._planned(drawing, tasks)
            rendered = (self._drawn(drawing, layout, labels) for layout, labels in planned)
            yield from arriving(rendered, drawing.device)
            return
        if self.workers == 0:
            renderer = Renderer(self._store.imgsz)
            rendered = (self._inline(renderer, task) for task in tasks)
        else:
            size = 3 * self._store.imgsz**2 * self.micro_batch
            work = functools.partial(self._work, Renderer(self._store.imgsz))
            rendered = self._from(self._workers(work, size), tasks)
        if self._device.type == "cuda":
            yield from arriving(rendered, self._device)
        else:
            yield from rendered

    def _workers(
        self, work: Callable[[_Task, np.ndarray], Any], slot_bytes: int
    ) -> WorkerPool[_Task, Any]:
        if self._pool is None:
            count = self.workers if self._renderer is None else 1
            self._pool = WorkerPool(work, count=count, slot_bytes=slot_bytes)
        return self._pool

    def _planned(
        self, renderer: TorchRenderer, tasks: Sequence[_Task]
    ) -> Iterator[tuple[Layout, _Labels]]:
        """Yield what to render and its labels, for each task in order."""
        if self.workers == 0:
            return (self._laid_out(renderer, task) for task in tasks)
        pool = self._workers(lambda task, slot: self._laid_out(renderer, task), slot_bytes=1)
        return (result for result, _ in pool.map(tasks))

    def _laid_out(self, renderer: TorchRenderer, task: _Task) -> tuple[Layout, _Labels]:
        plans, labels = self._plan(task)
        return renderer.lay_out(plans), labels

    def _from(self, pool: WorkerPool[_Task, _Targets], tasks: Sequence[_Task]) -> Made[_Targets]:
        for task, (targets, slot) in zip(tasks, pool.map(tasks), strict=True):
            images = self._images(len(task.indices))
            images.numpy()[:] = slot[: images.numel()].reshape(images.shape)
            yield images.permute(0, 3, 1, 2), targets

    def _images(self, count: int) -> Tensor:
        return empty_images(count, self._store.imgsz, pinned=self._device.type == "cuda")

    def _drawn(
        self, renderer: TorchRenderer, layout: Layout, labels: _Labels
    ) -> tuple[Tensor, _Targets]:
        with named("render"):
            images = renderer.draw(layout)
        return images, self._targets(labels)

    def _inline(self, renderer: Renderer, task: _Task) -> tuple[Tensor, _Targets]:
        images = self._images(len(task.indices))
        targets = self._work(renderer, task, images.numpy().reshape(-1))
        return images.permute(0, 3, 1, 2), targets

    def _work(self, renderer: Renderer, task: _Task, slot: np.ndarray) -> _Targets:
        """Render a task's images into `slot`, return their targets."""
        side = self._store.imgsz
        count = len(task.indices)
        images = slot[: 3 * count * side**2].reshape(count, side, side, 3)
        # All plans first, then all pixels: each finds its own code and tables still in cache.
        plans, labels = self._plan(task)
        with named("render"):
            for image, plan in zip(images, plans, strict=True):
                renderer.pixels(plan, self._store, self._refs, image, self._cutouts)
        return self._targets(labels)

    def _plan(self, task: _Task) -> tuple[list[AugmentPlan], _Labels]:
        plans = [self.stream.plan(task.epoch, i, mosaic=task.mosaic) for i in task.indices]
        return plans, [self.stream.labels(plan, self._store.imgsz) for plan in plans]

    def _targets(self, planned: _Labels) -> _Targets:
        """Join the labels of a task whose images are rendered: which are broken is known then."""
        found = [without_broken(labels, self._store.broken) for labels in planned]
        boxes = np.concatenate([boxes for boxes, _ in found]) / np.float32(self._store.imgsz)
        return _Targets(
            np.concatenate(
                ((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), axis=1
            ),
            np.concatenate([labels for _, labels in found]),
            np.repeat(np.arange(len(found)), [len(labels) for _, labels in found]),
        )

    def close(self) -> None:
        """End the worker processes; a later `batches` starts new ones."""
        self._end_running()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def empty_images(count: int, side: int, *, pinned: bool) -> Tensor:
    """Return (count, S, S, 3) uint8; unpinned, from numpy, which asks for huge pages."""
    if pinned:
        return torch.empty((count, side, side, 3), dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty((count, side, side, 3), np.uint8))
