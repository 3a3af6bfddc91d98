"""Categories of panoptic data sets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A category as COCO's JSON has it; a thing can be counted, stuff cannot."""

    id: int
    name: str
    isthing: bool
