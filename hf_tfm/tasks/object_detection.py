"""Object detection with DETR (Carion et al. 2020, arXiv:2005.12872) and its successors, and the evaluation of any
detector.

rows -> images of one shape, padded, and their objects -> predictions of all decoder layers -> Hungarian matching
-> sums of class, box and mask losses -> COCO average precision, and panoptic quality of models with masks
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.utils import ModelOutput

from ..arguments import Arguments, ImageModelEvaluationArguments
from ..data.batching import Sample, StepLoader, sample_ref
from ..data.box_checks import BoxFormat
from ..data.categories import Category
from ..data.detection import category_ids, check_order, class_names, fingerprint
from ..data.files import data_roots
from ..data.images import IMAGE, BadImage, WatchedLoader, decode, require_readable
from ..data.panoptic import PANOPTIC, SEGMENTS, panoptic_categories
from ..data.pixels import Channels, PaddedPixels, Scale, as_fractions, pixel_scale, scene_processor
from ..data.scene_streams import ScenePieces, SceneReader
from ..data.scenes import read_scene, require_scenes
from ..data.shape_batches import ShapeSampler
from ..distillation.model_spec import check_processors
from ..families import DETECTOR, PANOPTIC_DETECTOR, Head
from ..hub.detectors import classes, detections, has_masks, is_detector, load_detector, panoptic_maps, takes_mask
from ..hub.external import external_model, model_config
from ..metrics import CocoAP, PanopticQuality
from ..metrics.streaming import StreamingMetric
from ..models.encoder_attention import make_method, set_encoder_attention
from .base import Batch, Collator, Scores, Task, mean, widest_float
from .detectors import build_detector, model_class, scale_of_backbone, warn_of_batch_norm
from .distillation import Dtype, EncoderDecoderArguments, check_stream_cache
from .labels import ClassNameArguments, match_categories
from .loaders import placement
from .model_fields import label_fields
from .scenes import ProcessorCollator, SceneArguments, SceneCollator
from .splits import load_rows
from .streams import image_stream_loader

# Names of the loss terms, and those that a model gives them unless its class has ``loss_terms``.
TERMS = {"class": "loss_ce", "box": "loss_bbox", "giou": "loss_giou"}
MASK_TERMS = {"mask": "loss_mask", "dice": "loss_dice"}
AP_SCORES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
PQ_SCORES = ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st")
# Scores of a run; one without objects of its kind is NaN, and is left out.
RUN_SCORES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"),
    *("PQ", "SQ", "RQ", "PQ_th", "PQ_st"),
)
LOWEST_SCORE = 0.05  # of a detection in the file of predictions


@dataclass(kw_only=True)
class BoxArguments(ClassNameArguments):
    """Boxes of a data set.

    Args:
        objects_column: list of objects with a box and a category; default, the only column with boxes.
        box_format: meaning of the four numbers of a box: xywh (left, top, width, height), xyxy (left, top, right,
            bottom) or cxcywh (centre, width, height).
        relative_boxes: they are fractions of the image size instead of pixels.
    """

    objects_column: str | None = None
    box_format: Literal["xywh", "xyxy", "cxcywh"] = "xywh"
    relative_boxes: bool = False


@dataclass(kw_only=True)
class SegmentArguments(Arguments):
    """Panoptic maps of a data set.

    Args:
        panoptic_column: PNGs whose colours are segment ids, R + 256 G + 65536 B.
        segments_column: list of the segments of each.
    """

    panoptic_column: str = PANOPTIC
    segments_column: str = SEGMENTS


@dataclass(kw_only=True)
class DetectionArguments(BoxArguments, SceneArguments):
    """Arguments of detection training."""

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model not in ("loss", "AP", "AP50"):
            raise ValueError(
                f'metric_for_best_model must be "loss", "AP" or "AP50", got "{self.metric_for_best_model}"'
            )


@dataclass(kw_only=True)
class DetectionDistillationArguments(EncoderDecoderArguments, DetectionArguments):
    """Distillation of a detector.

    A cache needs images that all have one size after augmentation, and the batch_size of the run.

    Args:
        teacher_dtype: of the teacher's weights and computation; half precision rounds its boxes to 1/256.
        mean: channel means, of pixels in [0, 1]; default, those of the teacher.
        std: channel standard deviations; same default.
    """

    teacher_dtype: Dtype = "fp32"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_stream_cache(self)


@dataclass(kw_only=True)
class DetectionEvaluationArguments(BoxArguments, SegmentArguments, ImageModelEvaluationArguments):
    """Scoring a detector, of this package or of another library.

    Args:
        match_labels: match categories to the model's classes by name or by number. A model without class names
            (LABEL_0 and so on) is matched by number.
        segments: score panoptic maps too. The data set then needs the columns panoptic and segments_info, and has to
            say which categories are things; boxes are those of all segments, as in training. Default: if the model has
            masks.
        encoder_attention: self-attention of the encoder: full (exact) or clustered; default, that of the model.
        encoder_attention_kwargs: options of encoder_attention, for instance {rounds: 32, width: 8.0}.
    """

    match_labels: Literal["name", "number"] = "name"
    segments: bool | None = None
    batch_size: int = 8
    encoder_attention: str | None = None
    encoder_attention_kwargs: dict[str, int | float] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.encoder_attention is not None:
            make_method(self.encoder_attention, self.encoder_attention_kwargs)
        elif self.encoder_attention_kwargs:
            raise ValueError("encoder_attention_kwargs needs encoder_attention, the method whose options they are")


class DetectionTask(Task):
    """The loss over matched pairs of queries and objects.

    In an evaluation, a model of any library reads the images as its own processor prepares them, and the panoptic
    quality of a model with masks is computed, too.

    Attributes:
        categories: of panoptic maps; None if the objects are boxes.
        heads: first rows of splits that are streams, read like those of a data set.
        pieces: readers of these splits, see `StreamLoader`.
        pictures: draws predictions during training; None before it does.
    """

    Arguments = DetectionArguments
    EvaluationArguments = DetectionEvaluationArguments
    DistillationArguments = DetectionDistillationArguments
    kind, sample = "detectors", "images"
    item, term, reports_cost = "images", "image", True
    processor_class = AutoImageProcessor
    described_columns = ("image_column", "objects_column")
    cache_options = ("shortest_side", "longest_side", "mean", "std", "augmentation")

    def __init__(self, args: Any, accelerator: Accelerator | None):
        super().__init__(args, accelerator)
        self.categories: Sequence[Category] | None = None
        self.heads: dict[str, datasets.Dataset] = {}
        self.pieces: dict[str, ScenePieces] = {}
        self.pictures: Callable[[nn.Module, int], Path | None] | None = None

    @property
    def masks(self) -> bool:
        """True if masks are trained or scored."""
        return self.evaluating and self.categories is not None

    @property
    def hub_task(self) -> str:
        """See `Task`."""
        return "image-segmentation" if self.masks else "object-detection"

    @property
    def auto_class(self) -> Head:
        """See `Task`; transformers' DETR loads as one of ours, and computes the same."""
        return PANOPTIC_DETECTOR if self.masks else DETECTOR

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`."""
        return is_detector(config)

    # --- data, processor and model

    def load_splits(self) -> dict[str, Any]:
        """Rows of `scene_rows`, or of `panoptic_rows`, by split; a stream as stored.

        Raises:
            ValueError: the splits have other categories; or see `require_scenes`.
        """
        args = self.args
        if self.reads_segments():
            self.categories = panoptic_categories(args.dataset_name, args.dataset_revision)
        reader = self.reader()

        def read(rows: Any) -> Any:
            return reader.select(rows) if isinstance(rows, datasets.IterableDataset) else reader(rows)

        rows = load_rows(args, read)
        for name, part in rows.items() if not self.evaluating and args.streaming else ():
            if name == args.train_split:
                self.heads[name], self.pieces[name] = reader.head(part)
            else:
                rows[name] = reader(part)
        known = {**rows, **self.heads}
        if not self.evaluating:
            check_order(known, args.train_split)
            for part in known.values():
                category_ids(part, class_names(known[args.train_split]))
        for name, part in self.heads.items():
            require_readable(part, args.max_bad_images, name, read_scene)
        require_scenes({name: part for name, part in rows.items() if name not in self.heads}, args.max_bad_images)
        return rows

    def reads_segments(self) -> bool:
        """True if the objects are the segments of panoptic maps.

        Raises:
            ValueError: an evaluation asks for them, and the model has no masks.
        """
        if not self.evaluating:
            return False
        asked, config = self.args.segments, model_config(self.args.model, **self.args.pretrained)
        if asked and is_detector(config) and not has_masks(config):
            saved = ", ".join(config.architectures or ())
            raise ValueError(f'segments needs a model with masks, and "{self.args.model}" is a {saved}')
        return has_masks(config) if asked is None else asked

    def reader(self) -> SceneReader:
        """Reader of the rows of a data set."""
        args = self.args
        roots = data_roots(args.dataset_name, args.data_files)
        if self.categories is not None:
            maps = {"panoptic_column": args.panoptic_column, "segments_column": args.segments_column}
            return SceneReader(args.image_column, categories=self.categories, **maps, roots=roots)
        boxes = BoxFormat(args.box_format, args.relative_boxes)
        return SceneReader(args.image_column, args.objects_column, boxes, roots=roots, class_names=args.class_names)

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return fingerprint(rows)

    def build_processor(self) -> BaseImageProcessor:
        """See `Task`; the default scale of pixels is that of the pretrained model or backbone."""
        args = self.args
        if args.pretrained_backbone and args.backbone_source:
            return self.processor_of_size(*scale_of_backbone(args.backbone_source, args.mean, args.std))
        scale = pixel_scale(args.model_name_or_path, args.mean, args.std, args.trust_remote_code)
        return self.processor_of_size(*scale)

    def processor_of_size(self, mean: Channels, std: Channels) -> BaseImageProcessor:
        """An image processor for the model to train, with the sizes of the arguments."""
        args = self.args
        return scene_processor(
            args.shortest_side, args.longest_side, mean, std, model_class(args).image_processor_name
        )

    def build_model(self) -> PreTrainedModel:
        """See `Task`."""
        args = self.args
        set_seed(args.seed)
        model = build_detector(args, self.data_fields())
        warn_of_batch_norm(model, args.divides_steps or self.accelerator.num_processes > 1)
        return model

    def data_fields(self) -> dict[str, Any]:
        """Fields of the model's configuration that the data decides."""
        split = self.args.train_split
        return label_fields(class_names(self.heads.get(split, self.splits[split])))

    def load_pretrained(self) -> None:
        """See `Task`."""
        args = self.args
        external = external_model(args.model)
        if external is None:
            self.model, self.processor = load_detector(args.model, **args.pretrained)
        else:
            self.model, self.processor = external.load(args.weights, args.random_weights)
        if args.encoder_attention is not None:
            set_encoder_attention(self.model, args.encoder_attention, **args.encoder_attention_kwargs)

    @cached_property
    def pixels(self) -> PaddedPixels:
        """Resizing and scaling of the processor."""
        return PaddedPixels(self.processor)

    def match_split(self, split: str) -> tuple[str, list[int]]:
        """Match the categories of a split to the model's classes, see `match_categories`; all are the same without
        data."""
        names = classes(self.model.config)
        if split not in self.splits:
            return "name", list(range(len(names)))
        rows = self.heads.get(split, self.splits[split])
        return match_categories(rows, names, self.args.match_labels if self.evaluating else "name")

    def collator(self, split: str = "", training: bool = False) -> SceneCollator | ProcessorCollator:
        """See `Task`."""
        args, (_, ids) = self.args, self.match_split(split)
        if self.evaluating:
            return ProcessorCollator(self.processor, ids, takes_mask(self.model))
        return SceneCollator(PaddedPixels(self.processor), ids, self.masks, training, args.augmentation, args.seed)

    def dataloader(self, split: str, training: bool = False, collate: Collator | None = None) -> WatchedLoader:
        """See `Task`."""
        args, rows, collate = self.args, self.splits[split], collate or self.collator(split, training)
        if split in self.pieces:

            def of_pool(sizes: np.ndarray, first: int) -> ShapeSampler:
                return ShapeSampler(sizes, args.batch_size, args.augmentation, args.seed, first=first)

            sampled = of_pool, height_and_width, self.pieces[split]
            return WatchedLoader(
                image_stream_loader(args, self.accelerator, collate, rows, *sampled), args.max_bad_images
            )
        sizes = np.stack([rows["height"], rows["width"]], axis=1)
        options = () if not training else (args.augmentation, args.seed, len(rows) > args.batch_size)
        sampler = ShapeSampler(sizes, args.batch_size, *options)
        micro_batch_size = None if self.evaluating else args.micro_batch_size
        loader = StepLoader(rows, sampler, collate, micro_batch_size, **placement(args, self.accelerator))
        return WatchedLoader(loader, args.max_bad_images, self.evaluating and args.progress)

    # --- one step

    @property
    def terms(self) -> dict[str, str]:
        """Names of the loss terms, and those that the model gives them."""
        return getattr(self.model, "loss_terms", TERMS) | (MASK_TERMS if self.masks else {})

    def count(self, batch: Batch) -> dict[str, float]:
        """Images, and the divisor of each term: the number of objects or, for classes, the items of their scoring."""
        model: Any = self.model  # of a family, see `detectors`
        items = model.count_items(batch["labels"] if batch["images"] else [])
        return {"image": batch["images"], **{term: items[name] for term, name in self.terms.items()}}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """See `Task`; ``pixel_mask`` is given if there is padding."""
        pixels = batch["pixel_values"]
        if not self.evaluating:
            pixels = self.pixels.scale_padded(pixels, batch["pixel_mask"])
        return {"pixel_values": pixels} | ({"pixel_mask": batch.get("pixel_mask")} if batch["padded"] else {})

    def targets(self, batch: Batch) -> dict[str, Any]:
        """See `Task`; a dummy batch has none."""
        return {"labels": batch["labels"]} if batch["images"] else {}

    def output_losses(self, output: ModelOutput, logits: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """Sums over all decoder layers; those of a dummy batch are 0."""
        if "loss_sums" not in output:
            zeros = [0.0 * value.float().sum() for value in output.values() if isinstance(value, Tensor)]
            return dict.fromkeys(self.terms, sum(zeros[1:], start=zeros[0]))
        return {term: output["loss_sums"][name] for term, name in self.terms.items()}

    # --- scores

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", *self.terms, "AP", "AP50", *(("PQ",) if self.masks else ()))

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return (*AP_SCORES, *PQ_SCORES) if self.evaluating else RUN_SCORES

    @torch.inference_mode()
    def evaluate(self, model: Any, split: str, metrics: Collection[str] | None = None) -> Scores:
        """COCO's average precision, panoptic quality of a model with masks, and if asked for the mean losses.

        Each rank predicts its share; memory does not grow with the number of pixels.
        """
        names, (matched, ids) = classes(model.config), self.match_split(split)
        scored: list[StreamingMetric] = [CocoAP(class_names=names)]
        if self.masks:
            scored.append(PanopticQuality(class_names=names, thing_ids=self.thing_ids(ids)))
        with_losses, wide = metrics is not None and "loss" in metrics, widest_float(self.accelerator.device)
        totals: dict[str, Tensor] = {}
        predictions: list[dict[str, Any]] = []
        loader, training = self.evaluation_loader(split), model.training
        model.eval()
        for step in loader.epoch(0):
            for batch in step:
                if self.evaluating and not batch["images"]:
                    continue
                references = batch.pop("references")
                batch = send_to_device(batch, self.accelerator.device)
                # Sharded models exchange weights in every forward pass: a rank with a dummy batch takes part.
                output = model(**self.inputs(batch), **(self.targets(batch) if with_losses else {}))
                if with_losses:
                    counts = self.count(batch)
                    for term, total in self.output_losses(output, None, batch).items():
                        pair = torch.stack([total.to(wide), total.new_tensor(counts[term], dtype=wide)])
                        totals[term] = totals.get(term, 0) + pair
                if not batch["images"]:
                    continue
                found = detections(model.config, self.processor, output, batch)
                scored[0].add_batch(predictions=found, references=references)
                if self.masks:
                    maps = panoptic_maps(self.processor, output, batch)
                    scored[1].add_batch(predictions=maps, references=references)
                if self.evaluating:
                    predictions += [
                        {"image_id": reference["image_id"], "objects": listed(objects, names)}
                        for reference, objects in zip(references, found, strict=True)
                    ]
        model.train(training)
        results = []
        for metric in scored:
            if self.accelerator.num_processes > 1:
                metric.merge(gather_object([metric.state()]))
            results.append(metric.compute())
        means = {term: mean(*pair).item() for term, pair in self.accelerator.reduce(totals).items()}
        values = {"loss": sum(means.values()), **means} if with_losses else {}
        for result in results:
            values |= {name: result[name] for name in (*AP_SCORES, *PQ_SCORES) if name in result}
        kept = metrics or ()  # a score that is asked for is given even if it is NaN
        return Scores(
            {name: value for name, value in values.items() if name in kept or not np.isnan(value)},
            samples=results[0]["images"],
            details={
                "per_class": scores_by_class(results, names),
                "left_out": {"unreadable": len(loader.bad)},
                "match_labels": matched,
            },
            listing={"unreadable": loader.bad, "predictions": predictions},
        )

    def thing_ids(self, class_ids: Sequence[int]) -> list[int]:
        """Classes of the model that are things.

        Args:
            class_ids: class of each category.
        """
        if self.categories is None:
            return self.model.config.thing_ids
        return [i for i, category in zip(class_ids, self.categories, strict=True) if category.isthing]

    def show(self, module: nn.Module, step: int) -> None:
        """Draw predictions of a few validation images, see `PredictionPictures`."""
        if self.pictures is None:
            self.pictures = self.prediction_pictures(
                self.validation_split, self.args.output_dir, self.args.num_pictures
            )
        self.pictures(module, step)

    def prediction_pictures(
        self, split: str, output_dir: str | Path, count: int
    ) -> Callable[[nn.Module, int], Path | None]:
        """Pictures of the same images of a split, evenly spread; images that cannot be read are left out.

        Args:
            output_dir: of the run.
            count: number of images.
        """
        from ..viz.predictions import PredictionPictures

        rows, collate, images = self.splits[split], self.collator(split), []
        for index in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)).tolist():
            row = rows[index]
            try:
                image = decode(row[IMAGE]).permute(1, 2, 0).numpy().astype(np.float32) / 255
            except BadImage:
                continue
            batch = collate([row], [index], epoch=0)
            if batch["images"]:
                images.append((image, batch))

        def predict(model: nn.Module, batch: Batch) -> ModelOutput:
            return model(**self.inputs(batch))

        return PredictionPictures(self.accelerator, self.processor, predict, images, self.masks, output_dir)

    # --- hooks of distillation

    @property
    def main_metric(self) -> str:
        """See `Task`."""
        return "AP"

    def build_student_processor(self) -> BaseImageProcessor:
        """The student's image processor, with the teacher's scale of pixels and the sizes of the arguments.

        Raises:
            ValueError: an argument, or ``model_name_or_path``, has another scale; or a model has no image processor.
        """
        args = self.args
        teacher: Any = self.processor_of(args.teacher)
        processor = self.processor_of_size(
            args.mean or tuple(teacher.image_mean), args.std or tuple(teacher.image_std)
        )
        for other in (processor, *([self.processor_of(args.model_name_or_path)] if args.model_name_or_path else [])):
            check_processors(other, teacher)
        return processor

    def processor_of(self, source: str) -> BaseImageProcessor:
        """A processor with the scale of pixels of a model, and the sizes of the arguments.

        Raises:
            ValueError: the model has no image processor.
        """
        args = self.args
        try:
            scale = Scale(AutoImageProcessor.from_pretrained(source, trust_remote_code=args.trust_remote_code))
        except OSError as error:
            raise ValueError(f'"{source}" has no image processor: save the one it was trained with') from error
        return self.processor_of_size(as_fractions(scale.mean), as_fractions(scale.std))

    def sample_refs(self, loader: WatchedLoader) -> Callable[[int], list[Sample]]:
        """See `Task`."""
        return partial(cached_samples, loader.loader.sampler)

    def sample_inputs(self) -> dict[str, Tensor]:
        """See `Task`."""
        return {"pixel_values": torch.zeros(1, 3, self.args.shortest_side, self.args.shortest_side)}


def height_and_width(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size of the image of a row of `scene_rows`, in pixels."""
    return row["height"], row["width"]


def cached_samples(sampler: ShapeSampler, epoch: int) -> list[Sample]:
    """Return the samples of an epoch, for a cache.

    Raises:
        ValueError: they are on several canvases, but a cache is written in batches that mix the samples of all steps.
    """
    found = [sample for step in sampler.steps(epoch) for sample in step]
    if len({sample_ref(sample).canvas for sample in found}) > 1:
        raise ValueError("a cache needs images of one size: give augmentation one scale and crop 0, or no cache")
    return found


def listed(found: Mapping[str, Tensor], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the detections of an image in COCO's form, the best first, without those below `LOWEST_SCORE`."""
    scores, order = found["scores"].sort(descending=True)
    order = order[scores >= LOWEST_SCORE]
    corners = found["boxes"][order]
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    columns = (found["labels"][order].tolist(), boxes.tolist(), scores[: len(order)].tolist())
    return [
        {"category": names[label], "bbox": [round(side, 2) for side in box], "score": round(score, 5)}
        for label, box, score in zip(*columns, strict=True)
    ]


def scores_by_class(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the scores of each class that has any, {class: {score: value}}, without NaN."""
    found = {name: {k: v for result in results for k, v in result["per_class"][name].items()} for name in names}
    known = {name: {k: v for k, v in scores.items() if not np.isnan(v)} for name, scores in found.items()}
    return {name: scores for name, scores in known.items() if scores}
