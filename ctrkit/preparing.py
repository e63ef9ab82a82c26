"""What a batch needs from elsewhere, found while an earlier one is trained on: which rows the ranks ask of each other,
the vectors of its pictures, and its place on the device.

One thread does it, batch by batch: it has the ranks tell each other what they ask for, starts to read from the disk the
features that this rank is asked for, reads those of the batch before, and takes that one to the device.

Why no rank waits forever. The ranks have a process group for this thread alone, the worker. It does what its main
thread asks for, in that order, and all main threads ask for the same in the same order whatever the timing: which batch
is asked for when is decided by numbers (`ctrkit.ahead.in_step`), of training and of validation. Suppose that all wait.
The main thread that has come least far cannot wait for another one, which has been there; so it waits for its worker,
for some batch. All main threads have come as far, so all workers have been asked for that batch. The worker that has
come least far cannot wait for another one, which has been there, nor for its main thread, which has asked. So it goes
on. A main thread that leaves an epoch early (patience, an error) first waits for what it has asked for; the others have
asked for the same, or end and thereby close the connection.
"""

import contextlib
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from ctrkit.ahead import in_step, one_behind
from ctrkit.feature_service import rows_read
from ctrkit.modelfile import TrainedModel
from ctrkit.models.batch import Batch

READY = 2
"""Batches that are prepared while one is trained on."""
READY_ON_CPUS = 0
"""Where several ranks train on CPUs. What their threads take the training lacks, and then the other ranks wait too. The
disk is asked a batch ahead all the same."""


def prepared(model: TrainedModel, made: Iterable[Batch], *, training: bool) -> Generator[Batch]:
    """Yield collated batches, on the CPU and without vectors of pictures, ready for the model on its device.

    `made` is used in another thread. Where several ranks work on the model, all of them have to want the same number of
    batches.
    """
    with contextlib.ExitStack() as stack:
        if model.service is not None:
            worker = model.service.worker
            ready = READY if torch.device(model.device).type == "cuda" else READY_ON_CPUS
        else:
            worker = stack.enter_context(ThreadPoolExecutor(1, "prepare", torch.set_num_threads, (1,)))
            ready = READY
        batches = stack.enter_context(contextlib.closing(_prepared(model, made, training)))
        coming = stack.enter_context(contextlib.closing(in_step(batches, ready, worker)))
        while True:
            begun = time.monotonic()
            batch = next(coming, None)
            if model.pictures is not None:
                model.pictures.cache.waited(begun, time.monotonic())
            if batch is None:
                return
            yield batch


def _prepared(model: TrainedModel, made: Iterable[Batch], training: bool) -> Generator[Batch]:
    for batch in one_behind(_routed(model, batch, training) for batch in made):
        if model.pictures is not None:
            for name in batch.picture_row:
                batch.picture_NW[name] = model.pictures.vectors(rows_read(batch, name))
        yield batch.to(model.device)


def _routed(model: TrainedModel, batch: Batch, training: bool) -> Batch:
    """Have the ranks ask for what they need, and the disk."""
    if model.service is not None:
        model.service.route(batch, training=training)
    if model.pictures is not None:
        for name in batch.picture_row:
            model.pictures.cache.prefetch(rows_read(batch, name))
    return batch
