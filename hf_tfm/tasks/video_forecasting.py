"""Video forecasting: predict the next frames of a video from the ones before.

uint8 videos (B, T + F, C, H, W), read or generated -> T frames -> model -> F frames -> errors by frame, and those of
two baselines
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import (
    AutoModelForTimeSeriesPrediction,
    AutoVideoProcessor,
    BaseVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import ModelOutput

from ..arguments import (
    DatasetArguments,
    ImageBatchArguments,
    ImageDataArguments,
    ImageEvaluationArguments,
    ModelArguments,
    SplitArguments,
)
from ..data import images, moving_images, videos
from ..data.batching import Sample, rng, sample_ref
from ..data.files import data_roots
from ..data.images import IMAGE, BadImage, describe
from ..data.moving_images import MOVING, MovingImages, fitted
from ..families import VIDEO_FORECASTER
from ..hub.loading import load_config, load_model, load_video_processor
from ..hub.pretrained import VIDEOS, load_to_train
from ..limits import LARGEST_SIDE, MOST_FRAMES, SEEDS
from ..memory import check_batch_memory
from ..metrics.video import FrameErrors
from ..models.patches import Size, sides
from ..values import check_bounds
from .base import Batch, Scores
from .images import ImageTask
from .model_fields import build_new, check_fields, head_of, new_config
from .splits import load_rows

FIELDS = ("image_size", "num_channels", "context_length", "prediction_length")  # decided by arguments
DEFAULTS: dict[str, Any] = {"image_size": 64, "num_channels": 1, "context_length": 10, "prediction_length": 10}
BASELINES = ("copy_last_frame", "linear_motion")
ERRORS = ("mse", "mae", "ssim", "pixel_mse")
# Of pixels in [0, 1]; also a mean over videos.
SIGNATURES = {
    "mse": "pixels:sum|frames:mean",
    "mae": "pixels:sum|frames:mean",
    "pixel_mse": "pixels:mean|frames:mean",
    "ssim": "window:7|range:1|frames:mean",
}


@dataclass(kw_only=True)
class VideoDataArguments(ImageDataArguments, DatasetArguments):
    """Reading videos, or generating them.

    Args:
        dataset_name: a data set of videos: what `datasets.load_dataset` takes, or a NumPy file of uint8 frames
            (frames, videos, height, width) such as the public test file of Moving MNIST. Or a data set of images, from
            which videos are generated (moving_images); "moving-digits" are those of scikit-learn, and "moving-mnist"
            those of MNIST.
        image_column: videos: lists of images, animated images, or `datasets.Video`; or the images that move. Default,
            the only such column.
        max_bad_images: number of unreadable videos that are reported and left out; more end the run.
        frame_step: read every frame_step-th frame of a video.
        moving_images: generate videos, each of this many images that move over an empty canvas and bounce off its
            walls; default, 2 for "moving-digits" and "moving-mnist", otherwise the data set has videos.
        moving_size: pixels of these images, one number or (height, width); default, 7/16 of the shorter side of the
            canvas, 28 of 64.
        moving_speed: distance they move in a frame, as a fraction of the free range.
    """

    frame_step: int = 1
    moving_images: int | None = None
    moving_size: int | tuple[int, int] | None = None
    moving_speed: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="frame_step moving_images",
            at_least_0="moving_speed",
            at_most={"frame_step": MOST_FRAMES, "moving_images": 100, "moving_speed": 1},
        )
        check_bounds("moving_size", self.moving_size, 1, LARGEST_SIDE)
        if self.dataset_name in MOVING and self.moving_images is None:
            self.moving_images = 2
        if self.moving_images is not None and videos.is_array(self.dataset_name):
            raise ValueError(f'moving_images needs a data set of images, got dataset_name "{self.dataset_name}"')
        if self.moving_images is not None and self.frame_step != 1:
            raise ValueError(f"frame_step is for videos that are read, not generated ones, got {self.frame_step}")

    @property
    def source(self) -> tuple[str, str | None, str | None, dict[str, str | list[str]] | None]:
        """See `DatasetArguments`; of the images that move."""
        return MOVING.get(self.dataset_name, self.dataset_name), *super().source[1:]


@dataclass(kw_only=True)
class VideoForecastingArguments(VideoDataArguments, SplitArguments, ModelArguments, ImageBatchArguments):
    """Training of a video forecaster.

    Args:
        model: configuration fields that differ from those of the size, for example patch_size, hidden_size, peephole
            and loss.
        image_size: pixels of a frame, one number or (height, width), to which videos are resized, or of the canvas of
            generated ones; default, that of model_name_or_path, or 64.
        num_channels: 1 for grey frames, 3 for colours; default, that of model_name_or_path, or 1.
        context_length: frames that the model reads; default, that of model_name_or_path, or 10.
        prediction_length: frames that it predicts; default, that of model_name_or_path, or 10.
        batch_size: videos of one optimizer step over all processes, so that a run does not depend on the hardware.
        micro_batch_size: videos that one process computes at once; saves memory, does not change the result.
    """

    accepted_models: ClassVar = VIDEOS
    streaming: ClassVar[bool] = False
    repeats: ClassVar[int] = 1

    architecture: str = "convlstm"
    image_size: int | tuple[int, int] | None = None
    num_channels: int | None = None
    context_length: int | None = None
    prediction_length: int | None = None
    batch_size: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model not in ("loss", "ssim"):
            raise ValueError(f'metric_for_best_model must be "loss" or "ssim", got "{self.metric_for_best_model}"')
        check_bounds("image_size", self.image_size, 1, LARGEST_SIDE)
        self.check_range(
            at_least_1="context_length prediction_length",
            at_most=dict.fromkeys(("context_length", "prediction_length"), MOST_FRAMES),
        )
        if self.num_channels not in (None, 1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {self.num_channels}")
        if not self.model_name_or_path:
            check_fields(self.config_class, self.model, FIELDS)
            fields = self.data_fields_of(None)
            new_config(self.config_class, self, **fields)
            self.check_video_fields(fields)

    def check_saved(self, config: PreTrainedConfig) -> None:
        """See `ModelArguments`."""
        check_fields(self.head.model_class(config.model_type).config_class, self.model, FIELDS)
        self.check_video_fields(self.data_fields_of(config))

    def data_fields_of(self, config: PreTrainedConfig | None) -> dict[str, Any]:
        """Return `FIELDS` of the model: as given, of the configuration of model_name_or_path, or `DEFAULTS`."""
        known = DEFAULTS if config is None else {name: getattr(config, name) for name in FIELDS}
        return {name: known[name] if getattr(self, name) is None else getattr(self, name) for name in FIELDS}

    def check_video_fields(self, fields: dict[str, Any]) -> None:
        """Refuse images that do not fit in the canvas, and batches that do not fit in memory.

        Args:
            fields: see `data_fields_of`.

        Raises:
            ValueError: with the argument and the limit.
        """
        size = sides(fields["image_size"])
        check_moving_size(self, size)
        length = fields["context_length"] + fields["prediction_length"]
        check_batch_memory(self, size, length)


@dataclass(kw_only=True)
class VideoEvaluationArguments(VideoDataArguments, ImageEvaluationArguments):
    """Scoring a video forecaster.

    Args:
        prediction_length: frames to predict; default, those of the model.
        batch_size: videos in a batch.
        dataloader_num_workers: worker processes that read videos.
        seed: of generated videos; the same for a video in every evaluation.
    """

    prediction_length: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="seed",
            at_least_1="prediction_length",
            at_most={"seed": SEEDS - 1, "prediction_length": MOST_FRAMES},
        )


def moving_size(args: VideoDataArguments, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of moving images, for a canvas of this size."""
    return sides(args.moving_size or max(1, round(7 / 16 * min(size))))


def check_moving_size(args: VideoDataArguments, size: tuple[int, int]) -> None:
    """Refuse moving images that are larger than the canvas.

    Raises:
        ValueError: with both sizes.
    """
    height, width = moving_size(args, size)
    if args.moving_images is not None and (height > size[0] or width > size[1]):
        raise ValueError(f"moving_size must be at most image_size = {size[0]} x {size[1]}, got {height} x {width}")


@dataclass
class VideoCollator:
    """Rows -> a batch of videos; a dummy batch, and one without a readable video, has one that counts for nothing.

    Generated videos, and the first frame of a training video that is read, are a pure function of (seed, epoch,
    sample).

    Args:
        seed: of everything drawn at random for a sample.
        size, channels: (H, W) and C.
        context, future: T and F.
        step: read every step-th frame.
        generator: of videos; None to read them.
        is_file: rows hold `datasets.Video`.
        training: begin at a random frame of a video, instead of the first one.
        baseline: add ``linear_motion`` of generated videos.
    """

    seed: int
    size: tuple[int, int]
    channels: int
    context: int
    future: int
    step: int = 1
    generator: MovingImages | None = None
    is_file: bool = False
    training: bool = False
    baseline: bool = False

    def __call__(
        self, examples: list[dict[str, Any]], samples: list[Sample], epoch: int, is_dummy: bool = False
    ) -> Batch:
        """Return ``pixel_values_videos`` uint8 (B, T, C, H, W) and ``labels`` uint8 (B, F, C, H, W); ``videos``, the
        number of them that count; ``indices`` (B,), their rows; ``bad``, for `WatchedLoader`."""
        found, linear, rows, bad = [], [], [], []
        for example, sample in zip(examples, samples, strict=True):
            row, random = sample_ref(sample).index, rng(self.seed, epoch, sample)
            if is_dummy:
                break
            if self.generator is not None:
                motion = self.generator.video(row, self.context + self.future, random)
                found.append(torch.from_numpy(motion.frames()))
                if self.baseline:
                    linear.append(torch.from_numpy(motion.linear(self.context - 1, self.future)))
            else:
                try:
                    frames = videos.read_video(example[IMAGE], partial(self.choose, random=random), self.is_file)
                    found.append(fitted(frames, self.size, self.channels))
                except BadImage as error:
                    bad.append((row, describe(example[IMAGE], error)))
                    continue
            rows.append(row)
        count = len(found)
        if not found:
            empty = torch.zeros(self.context + self.future, self.channels, *self.size, dtype=torch.uint8)
            found, rows = [empty], [0]
        stacked = torch.stack(found)
        batch = {
            "pixel_values_videos": stacked[:, : self.context],
            "labels": stacked[:, self.context :],
            "videos": count,
            "indices": torch.tensor(rows),
            "bad": bad,
        }
        return batch | ({"linear_motion": torch.stack(linear)} if linear else {})

    def choose(self, length: int, random: np.random.Generator) -> range:
        """Return the numbers of the frames to read of a video.

        Raises:
            BadImage: it is too short.
        """
        needed = frames_read(self.context + self.future, self.step)
        spare = require_frames(length, needed) - needed
        first = int(random.integers(spare + 1)) if self.training else 0
        return range(first, first + needed, self.step)


class VideoForecastingTask(ImageTask):
    """Loss of the pixels of the next frames. Every evaluation scores the same frames."""

    Arguments = VideoForecastingArguments
    EvaluationArguments = VideoEvaluationArguments
    kind, hub_task = "video forecasters", "time-series-forecasting"
    sample = "videos"
    item, term = "predicted frames", "frame"
    auto_class = AutoModelForTimeSeriesPrediction
    processor_class = AutoVideoProcessor
    is_file = False  # rows hold `datasets.Video`

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`."""
        return config.model_type in VIDEO_FORECASTER.model_types() and "ForPrediction" in "".join(
            config.architectures or ()
        )

    # --- data, processor and model

    def load_splits(self) -> dict[str, Any]:
        """Rows by split: of images that move, or of videos.

        Raises:
            ValueError: a split or column does not exist, or no video of a split can be read.
        """
        args = self.args
        is_array = videos.is_array(args.dataset_name)
        roots = None if is_array else data_roots(args.source[0], args.data_files)

        def read(rows: Any) -> Any:
            if args.moving_images is not None:
                return images.image_rows(rows, args.image_column, labelled=False, roots=roots)
            if is_array:
                return rows
            found = videos.video_rows(rows, args.image_column, roots)
            self.is_file = isinstance(found.features[IMAGE], datasets.Video)
            return found

        splits = load_rows(args, read)
        read_one = None if generated(args) else self.try_video
        for name, rows in splits.items():
            images.require_readable(rows, len(rows) if self.evaluating else args.max_bad_images, name, read_one)
        return splits

    def try_video(self, row: dict[str, Any]) -> None:
        """Decode the first frame of a video, which in a run must be long enough."""
        args = self.args
        fields = {} if self.evaluating else self.data_fields
        needed = frames_read(fields["context_length"] + fields["prediction_length"], args.frame_step) if fields else 1
        videos.read_video(row[IMAGE], lambda length: range(min(1, require_frames(length, needed))), self.is_file)

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return images.fingerprint(rows) if generated(self.args) else videos.fingerprint(rows)

    @cached_property
    def data_fields(self) -> dict[str, Any]:
        """`FIELDS` of the model."""
        args = self.args
        if self.evaluating or not isinstance(args, VideoForecastingArguments):
            return {name: getattr(self.model.config, name) for name in FIELDS} | (
                {"prediction_length": args.prediction_length} if args.prediction_length else {}
            )
        source = args.model_name_or_path
        config = load_config(source, "model_name_or_path", None, args.trust_remote_code) if source else None
        return args.data_fields_of(config)

    def build_processor(self) -> BaseVideoProcessor:
        """See `Task`: resizes frames and divides pixels by 255."""
        return video_processor(self.data_fields["image_size"])

    def build_model(self) -> PreTrainedModel:
        """See `Task`."""
        args = self.args
        set_seed(args.seed)
        if not args.model_name_or_path:
            return build_new(new_config(args.config_class, args, **self.data_fields), args.head)
        return load_to_train(VIDEO_FORECASTER, args.model_name_or_path, head_of, args.model, **self.data_fields)[0]

    def load_pretrained(self) -> None:
        """See `Task`.

        Raises:
            ValueError: weights or the processor are missing, or images are larger than the model's canvas.
        """
        self.model = load_model(self.auto_class, self.args.model, **self.args.pretrained)
        self.processor = load_video_processor(self.args.model, **self.args.pretrained)
        check_moving_size(self.args, self.size)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the frames."""
        return sides(self.data_fields["image_size"])

    def generator(self, split: str) -> MovingImages | None:
        """The generator of the videos of a split; None if they are read."""
        args = self.args
        if not generated(args) or split not in self.splits:
            return None
        side = moving_size(args, self.size)
        found = moving_images.read_images(self.splits[split], side, self.data_fields["num_channels"])
        return MovingImages(found, self.size, args.moving_images, args.moving_speed)

    def collator(self, split: str = "", training: bool = False) -> VideoCollator:
        """See `Task`."""
        args, fields = self.args, self.data_fields
        return VideoCollator(
            args.seed if training or self.evaluating else 0,  # runs with other seeds are scored on the same videos
            self.size,
            fields["num_channels"],
            fields["context_length"],
            fields["prediction_length"],
            args.frame_step,
            self.generator(split),
            self.is_file,
            training,
            baseline=not training,
        )

    # --- one step

    def count(self, batch: Batch) -> dict[str, int]:
        """Predicted frames."""
        return {"frame": batch["videos"] * batch["labels"].shape[1]}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Task`: videos (B, T, C, H, W), pixels in [0, 1]."""
        return {"pixel_values_videos": batch["pixel_values_videos"].float().div_(255)}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """See `Task`: the next frames (B, F, C, H, W), pixels in [0, 1]."""
        return {"labels": batch["labels"].float().div_(255)}

    def output_losses(self, output: ModelOutput, logits: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """Mean loss of the pixels of a frame, summed over frames."""
        return {"frame": output["loss"] * self.count(batch)["frame"]}

    def sample_inputs(self) -> dict[str, Tensor]:
        """See `Task`."""
        fields = self.data_fields
        shape = (1, fields["context_length"], fields["num_channels"], *self.size)
        return {"pixel_values_videos": torch.zeros(shape)}

    # --- scores

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", "mse", "ssim")

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return (*ERRORS, *(f"{baseline}_{error}" for baseline in BASELINES for error in ERRORS[:3]))

    def forecast(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Predict the next frames of a batch on the device, by the model and by the baselines: (B, F, C, H, W)
        each."""
        labels = self.targets(batch)["labels"]
        videos = self.inputs(batch)
        found = {
            "model": model(**videos, prediction_length=labels.shape[1]).predictions.float(),
            "copy_last_frame": videos["pixel_values_videos"][:, -1:].expand_as(labels),
        }
        if "linear_motion" in batch:
            found["linear_motion"] = batch["linear_motion"].float() / 255
        return found

    @torch.inference_mode()
    def forecast_row(self, index: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Load the model and forecast the video of a row of an evaluation.

        Returns:
            The frames that the model reads, (T, H, W, C), those that follow, (F, H, W, C), and `forecast`; pixels in
            [0, 1].

        Raises:
            ValueError: the row does not exist, or its video cannot be read.
        """
        self.splits = self.load_splits()
        rows = self.splits[self.args.split]
        if not 0 <= index < len(rows):
            raise ValueError(f'index must be from 0 to {len(rows) - 1} for split "{self.args.split}", got {index}')
        self.load_pretrained()
        batch = self.collator(self.args.split)([rows[index]], [index], 0)
        if batch["bad"]:
            raise ValueError(f"video {index} cannot be read: {batch['bad'][0][1]}")
        shown = {**self.inputs(batch), **self.targets(batch), **self.forecast(self.model, batch)}
        arrays = {name: frames[0].permute(0, 2, 3, 1).clamp(0, 1).numpy() for name, frames in shown.items()}
        return arrays.pop("pixel_values_videos"), arrays.pop("labels"), arrays

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean loss, and the errors `FrameErrors` of the model and of two baselines, by frame in the details.

        The baselines are copies of the last frame, and, for generated videos, the true images moving on from their
        true places with their true velocities in the last frame, as if there were no walls.

        Raises:
            ValueError: no video can be read.
        """
        loader = self.evaluation_loader(split)
        values = self.mean_losses(model, loader) if not self.evaluating else {}
        training = model.training
        model.eval()
        errors: dict[str, FrameErrors] = {}
        for micro_batches in loader.epoch(0):
            for batch in micro_batches:
                batch = send_to_device(batch, self.accelerator.device)
                # Sharded models communicate in every forward pass, so a rank without videos takes part.
                found = self.forecast(model, batch)
                if batch["videos"]:
                    target = self.targets(batch)["labels"]
                    for name, predictions in found.items():
                        errors.setdefault(name, FrameErrors()).add(predictions, target)
        model.train(training)
        if self.accelerator.num_processes > 1:
            errors = joined(gather_object([errors]))
        if not errors:
            raise ValueError("the data set has no video that can be read")
        for name, one in errors.items():
            prefix = "" if name == "model" else f"{name}_"
            values |= {f"{prefix}{error}": value for error, value in one.means().items()}
        details: dict[str, Any] = {
            "left_out": {"unreadable": len(loader.bad)},
            "seed": self.args.seed,
            "by_frame": {name: one.by_frame(ERRORS[:3]) for name, one in errors.items()},
        }
        signatures = {name: text for ending, text in SIGNATURES.items() for name in values if name.endswith(ending)}
        listing = {"unreadable": loader.bad}
        return Scores(values, signatures, samples=errors["model"].videos, details=details, listing=listing)


def frames_read(count: int, step: int) -> int:
    """Return the number of frames of which ``count`` are read, every step-th."""
    return (count - 1) * step + 1


def require_frames(length: int, needed: int) -> int:
    """Return the number of frames of a video.

    Raises:
        BadImage: it is below ``needed``.
    """
    if length < needed:
        raise BadImage(f"it has {length} of the {needed} frames that are read")
    return length


def generated(args: Any) -> bool:
    """Return whether the videos of a data set are generated from its images."""
    return args.moving_images is not None


def joined(parts: list[dict[str, FrameErrors]]) -> dict[str, FrameErrors]:
    """Add up the errors of all ranks."""
    found: dict[str, FrameErrors] = {}
    for part in parts:
        for name, errors in part.items():
            found.setdefault(name, FrameErrors()).join(errors)
    return found


def video_processor(size: Size) -> BaseVideoProcessor:
    """Return the video processor of a new model, which resizes frames and scales pixels to [0, 1].

    Args:
        size: pixels of a frame, one number or (height, width).
    """
    height, width = sides(size)
    return BaseVideoProcessor(
        size={"height": height, "width": width},
        do_resize=True,
        resample=3,  # bicubic
        do_rescale=True,
        do_normalize=False,
        do_convert_rgb=False,
    )
