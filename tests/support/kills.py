"""Kill a trainer at a given moment, as with `kill -9`."""

import os
import signal
import sys
from itertools import product
from pkgutil import resolve_name

CHECKPOINT_CALLS = ("save_file", "flush", "write_text", "sha256")


def mortal(events_to_live=None, calls_to_live=None, loop="recipes.training.setup.train"):
    """Make the trainer die after so many events in `loop`, or calls of the functions that write checkpoints."""
    from recipes.training.checkpoint import checkpoints, files

    if events_to_live is not None:
        owner, _, name = loop.rpartition(".")
        owner = resolve_name(owner)
        setattr(owner, name, watched(getattr(owner, name), events_to_live))
    if calls_to_live is not None:
        remaining = [calls_to_live]
        for module, name in product((checkpoints, files), CHECKPOINT_CALLS):
            if hasattr(module, name):
                setattr(module, name, deadly(getattr(module, name), remaining))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watched(function, events_to_live):
    """`function`, killed at the given call or return of any Python or C function in the training thread."""
    remaining, trainer = events_to_live, os.getpid()

    def count(frame, event, argument):
        nonlocal remaining
        remaining -= 1
        if remaining < 0 and os.getpid() == trainer:  # the loader's process inherits the profiler
            die()

    def wrapped(*args, **kwargs):
        sys.setprofile(count)
        return function(*args, **kwargs)

    return wrapped


def deadly(function, remaining):
    def wrapped(*args, **kwargs):
        remaining[0] -= 1
        if remaining[0] < 0:
            die()
        return function(*args, **kwargs)

    return wrapped
