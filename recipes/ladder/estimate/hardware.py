"""The devices that a run is planned for: by name (`8xh100`, `1x4090`, `cpu`, `mps`), or those of this machine."""

import re
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from evals.speed.device_peaks import device_peaks
from modeling_nanochat.errors import UserError

GIB = 2**30
# FLOP/s of training in float32. A core: pocket's pretraining takes two minutes on two. Apple: what the original's d6
# reached on an M3 Max (5,000 steps of 16,384 tokens in half an hour); smaller chips have half or less.
CORE_FLOPS, APPLE_FLOPS = 35e9, 7e12
APPLE_GIB = 16  # assumed where this machine is another


@dataclass(frozen=True)
class Card:
    """A GPU: its name for `device_peaks`, the GiB that torch reports, dollars per hour, bytes/s of an all-reduce.

    Dollars are assumed on-demand prices, except the H100's: $24 per hour for eight, as the published runs paid.
    The speed between cards is assumed too: NVLink for data-centre cards, PCIe for the others.
    """

    device: str
    gib: float
    dollars: float
    link: float
    float8: bool = True


CARDS = {
    "b200": Card("NVIDIA B200", 178.4, 5.0, 700e9),
    "h200": Card("NVIDIA H200", 139.8, 3.5, 400e9),
    "h100": Card("NVIDIA H100", 79.2, 3.0, 400e9),
    "a100": Card("NVIDIA A100", 79.2, 1.8, 230e9, float8=False),
    "l40s": Card("NVIDIA L40S", 44.4, 1.0, 15e9),
    "l4": Card("NVIDIA L4", 22.0, 0.7, 10e9),
    "5090": Card("NVIDIA GeForce RTX 5090", 31.4, 0.7, 15e9),
    "4090": Card("NVIDIA GeForce RTX 4090", 23.6, 0.4, 15e9),
    "3090": Card("NVIDIA GeForce RTX 3090", 23.6, 0.25, 15e9, float8=False),
}


@dataclass(frozen=True)
class Hardware:
    """The devices of one machine.

    Attributes:
        name: As `--hardware` takes it, for people.
        flops: Of one device: the bfloat16 peak of a GPU, else what training reaches.
        bandwidth: Bytes/s of one device's memory; infinite where it is not known.
        dollars: Of all devices per hour; None: owned, not rented.
        cores: Of the processor, for each device; assumed for GPUs.
    """

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    count: int
    device: str
    gib: float
    flops: float
    bandwidth: float = float("inf")
    link: float = float("inf")
    dollars: float | None = None
    float8: bool = False
    cores: int = 8


def choose_hardware(name: str | None) -> Hardware:
    """The devices called `name`; None: those of this machine.

    Raises:
        UserError: No such name, or this machine's GPUs are not in the table.
    """
    if name is None:
        return this_machine()
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", name.lower())
    count, card = found.groups() if found else (None, "")
    if card in CARDS:
        return cards(card, int(count or 1))
    if card in ("cpu", "mps") and count in (None, "1"):
        return processor() if card == "cpu" else apple()
    raise UserError(
        f"hardware {name!r} is unknown; give cpu, mps, or a number and a GPU as 8xh100: {', '.join(CARDS)}"
    )


def cards(name: str, count: int) -> Hardware:
    card = CARDS[name]
    flops, bandwidth = device_peaks(card.device)
    assert flops and bandwidth, "every card of the table has known peaks"
    own = vars(card) | {"dollars": card.dollars * count}
    return Hardware(name=f"{count}x{name}", kind="cuda", count=count, flops=flops, bandwidth=bandwidth, **own)


def this_machine() -> Hardware:
    if not torch.cuda.is_available():
        return apple() if torch.backends.mps.is_available() else processor()
    device, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    flops, _ = device_peaks(device)
    name = next((name for name, card in CARDS.items() if words(card.device) <= words(device)), None)
    if name is None or flops is None:
        raise UserError(f"hardware: nothing is known of {device}; give the GPU most like it, e.g. --hardware 1xa100")
    gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return replace(cards(name, count), device=device, gib=gib, flops=flops)


def words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))


def processor() -> Hardware:
    """This machine's processor."""
    cores = psutil.cpu_count(logical=False) or 1
    memory = psutil.virtual_memory().total / GIB
    return Hardware("cpu", "cpu", 1, f"CPU, {cores} cores", memory, cores * CORE_FLOPS, cores=cores)


def apple() -> Hardware:
    here = torch.backends.mps.is_available()
    return Hardware(
        "mps", "mps", 1, "Apple GPU", psutil.virtual_memory().total / GIB if here else APPLE_GIB, APPLE_FLOPS
    )
