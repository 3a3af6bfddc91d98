"""Panoptic segmentation with DETR (Carion et al. 2020, arXiv:2005.12872, section 4.4).

panoptic maps -> boxes and masks of things and stuff -> the task of `object_detection`, with mask losses and PQ
"""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from ..families import DETECTOR
from ..hub.pretrained import OBJECTS, SEGMENTS, Suitable
from .object_detection import DetectionTask, SegmentArguments
from .scenes import SceneArguments


@dataclass(kw_only=True)
class PanopticArguments(SegmentArguments, SceneArguments):
    """Arguments of panoptic training.

    Args:
        stage: "boxes" trains a detector of things and stuff, "masks" only the mask head, on the detector of
            model_name_or_path, "joint" both at once.
    """

    stage: Literal["boxes", "masks", "joint"] = "joint"

    @property
    def accepted_models(self) -> dict[str, Suitable]:
        """See `SceneArguments`."""
        return OBJECTS if self.stage == "boxes" else SEGMENTS

    @classmethod
    def choices(cls) -> dict[str, list[str]]:
        """See `ModelArguments`."""
        return {"architecture": list(DETECTOR.families())}

    def __post_init__(self):
        super().__post_init__()
        scores = ("loss", "AP", "AP50") if self.stage == "boxes" else ("loss", "AP", "AP50", "PQ")
        if self.metric_for_best_model not in scores:
            raise ValueError(
                f'metric_for_best_model must be one of {", ".join(scores)}, got "{self.metric_for_best_model}"'
            )
        if self.stage == "masks" and not self.model_name_or_path:
            raise ValueError(
                'stage "masks" needs model_name_or_path, a detector trained with stage "boxes" or "joint"'
            )

    def check_backbone(self, config: PreTrainedConfig) -> None:
        """See `SceneArguments`."""
        super().check_backbone(config)
        if getattr(config, "backbone_config", None) is not None:
            raise ValueError(
                "backbone must be a timm model, whose four feature maps the mask head reads, got "
                f'"{self.model["backbone"]}"'
            )


class PanopticTask(DetectionTask):
    """The loss over matched pairs of queries and segments, and of their masks if the stage has them."""

    Arguments = PanopticArguments
    described_columns = ("image_column", "panoptic_column")

    @property
    def masks(self) -> bool:
        """See `DetectionTask`."""
        return super().masks if self.evaluating else self.args.stage != "boxes"

    def reads_segments(self) -> bool:
        """See `DetectionTask`."""
        return super().reads_segments() if self.evaluating else True

    def build_model(self) -> PreTrainedModel:
        """See `Task`; the stage "masks" freezes all but the mask head."""
        model = super().build_model()
        if self.args.stage == "masks":
            model.freeze_detector()
        return model

    def data_fields(self) -> dict[str, Any]:
        """See `DetectionTask`."""
        things = [i for i, category in enumerate(self.categories) if category.isthing]
        return {**super().data_fields(), "thing_ids": things}
