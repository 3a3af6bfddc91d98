"""Names of the columns and fields of objects, and categories of panoptic data sets."""

from dataclasses import dataclass

OBJECTS = "objects"
BOX_FIELDS = ("bbox", "bboxes", "boxes")
CATEGORY_FIELDS = ("category", "categories", "category_id", "label", "labels")


@dataclass(frozen=True)
class Category:
    """A category as COCO's JSON has it; a thing can be counted, stuff cannot."""

    id: int
    name: str
    isthing: bool
