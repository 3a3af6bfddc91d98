"""Commands hf-tfm show: visualise attention, reconstructions, detections, queries, positions and forecasts.

Libraries are imported inside the functions, because matplotlib is slow to import and other commands do not need it.
"""

from pathlib import Path
from typing import Literal

from .limits import LIMITS
from .values import checked


@checked(**LIMITS)
def show_attention(
    model: str,
    image: str | None = None,
    text: str | None = None,
    target: str | None = None,
    pair: str | None = None,
    beside: str | None = None,
    query: str | None = None,
    output_dir: str = "attention",
    layers: list[int] | None = None,
    heads: list[int] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Plot attention maps per layer and head: of an image model on an image, of any other model on a text.

    Args:
        model: folder or Hub id.
        image: for an image model: a file, or dataset:split:index; attention rollout is plotted, too.
        text: for a text model: input text; for a translation model, the source sentence.
        target: translation; by default the model generates one.
        pair: second text, for a model that reads pairs.
        beside: folder or Hub id of another text model, for example a teacher, plotted to the left.
        query: query of the image's maps, class (the [class] token) or mean (of patches); by default what the model
            pools.
        output_dir: folder for the plots.
        layers: layers to plot, counted from 0; by default all.
        heads: heads to plot, counted from 0; by default all.
        trust_remote_code: run the model's own code; not needed for models of this package.
    """
    from .hub.loading import load_image_processor
    from .viz import attention, image_maps, images, text_attention

    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"output_dir {output_dir} is a file: give the name of a folder")
    if (image is None) == (text is None):
        raise ValueError("an image model needs an IMAGE, a text model a --text: give one of them")
    for name, value in {"target": target, "pair": pair, "beside": beside}.items():
        if image is not None and value is not None:
            raise ValueError(f'{name} applies to a text, but an image was given; got "{value}"')
    if text is not None and query is not None:
        raise ValueError(f'query applies to an image, but a text was given; got "{query}"')
    if text is not None and not text_attention.reads_pairs(model, trust_remote_code):
        if target is not None:
            raise ValueError(f'target is for a translation model, but "{model}" is not one; got "{target}"')
        found = []
        for argument, name in {"beside": beside, "model": model}.items():
            if name is not None:
                loaded = text_attention.load_text_model(name, trust_remote_code, argument)
                found.append(text_attention.text_attention_maps(*loaded, text, pair))
        draw = text_attention.plot_beside if beside else text_attention.plot_text_attention
        paths = [draw(*found, Path(output_dir) / "text.png", layers, heads)]
    elif text is not None:
        from .tasks.translation import load_seq2seq

        if pair is not None or beside is not None:
            raise ValueError(f'pair and beside are for an encoder or a decoder, but "{model}" has both')
        maps = attention.attention_maps(*load_seq2seq(model, trust_remote_code=trust_remote_code), text, target)
        paths = attention.plot_attention(maps, output_dir, layers=layers, heads=heads)
    else:
        read, loaded = images.read_image(image), images.load_encoder(model, trust_remote_code)
        processor = load_image_processor(model, trust_remote_code=trust_remote_code)
        maps = image_maps.image_attention_maps(loaded, processor, read, query)
        paths = image_maps.plot_image_attention(maps, output_dir, layers=layers, heads=heads)
    for path in paths:
        print(path)


@checked(**LIMITS)
def show_reconstruction(
    model: str,
    images: list[str],
    mask_ratio: float | None = None,
    seed: int = 0,
    output: str = "reconstruction.png",
    trust_remote_code: bool = False,
) -> None:
    """Plot images as reconstructed by a masked autoencoder: original, masked, reconstructed, one row per image.

    Args:
        model: folder or Hub id of a masked autoencoder.
        images: files, or dataset:split:index.
        mask_ratio: fraction of patches to mask; by default the model's.
        seed: random seed of the masks.
        output: PNG file.
        trust_remote_code: run the model's own code; not needed for models of this package.
    """
    from .hub.loading import load_image_processor
    from .viz.images import load_autoencoder, read_image
    from .viz.reconstruction import plot_reconstructions, reconstruct_images
    from .writing import check_png

    check_png("output", output)
    read, loaded = [read_image(image) for image in images], load_autoencoder(model, trust_remote_code)
    processor = load_image_processor(model, trust_remote_code=trust_remote_code)
    found = reconstruct_images(loaded, processor, read, mask_ratio, seed)
    print(plot_reconstructions(loaded, found, output))


@checked(**LIMITS)
def show_detections(
    model: str,
    images: list[str],
    threshold: float | None = None,
    output: str = "detections.png",
    trust_remote_code: bool = False,
) -> None:
    """Plot the detections in images: boxes with class and score, or segments for a model with masks.

    Args:
        model: folder or Hub id of a detector, of this package or of transformers.
        images: files, or dataset:split:index.
        threshold: minimum score; by default 0.7 for boxes and 0.85 for segments.
        output: PNG file.
        trust_remote_code: run the model's own code; not needed for models of this package.
    """
    from .hub.detectors import load_detector
    from .viz.detections import detect, plot_detections
    from .viz.images import read_image
    from .writing import check_png

    check_png("output", output)
    read = [read_image(image) for image in images]
    loaded, processor = load_detector(model, trust_remote_code=trust_remote_code)
    print(plot_detections([detect(loaded, processor, image, threshold) for image in read], output))


@checked(**LIMITS)
def show_queries(
    model: str,
    image: str | None = None,
    dataset_name: str | None = None,
    split: str = "validation",
    dataset_config: str | None = None,
    image_column: str | None = None,
    max_samples: int = 500,
    threshold: float = 0.7,
    queries: list[int] | None = None,
    output: str = "queries.png",
    trust_remote_code: bool = False,
) -> None:
    """Plot the object queries of a detector: their attention over an image, or their boxes in a data set.

    Args:
        model: folder or Hub id of a detector of this package, or of a DETR of transformers.
        image: a file, or dataset:split:index: plots the cross-attention of queries over it: a map each, or the points
            that a Deformable DETR samples.
        dataset_name: data set, as for `evaluate`: plots the centres of each query's boxes in all images, coloured by
            shape.
        split: split of the data set.
        dataset_config: configuration of the data set.
        image_column: column of images, their bytes or paths; by default the only image column.
        max_samples: number of images to read, from the start of the data set.
        threshold: minimum score of the queries plotted over an image, unless ``queries`` are given.
        queries: query indices to plot; by default those above the threshold for an image, the first 20 for a data set.
        output: PNG file.
        trust_remote_code: run the model's own code; not needed for models of this package.
    """
    from .data.files import data_roots
    from .data.images import image_rows
    from .data.source import first, load_splits, take_split
    from .hub.detectors import load_detector
    from .viz import queries as pictures
    from .viz.images import read_image
    from .writing import check_png

    check_png("output", output)
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    if (image is None) == (dataset_name is None):
        raise ValueError("queries are drawn over an IMAGE, or of a --dataset_name: give one of them")
    if image is not None:
        read = read_image(image)
        print(
            pictures.plot_queries(
                pictures.query_maps(
                    *load_detector(model, trust_remote_code=trust_remote_code), read, threshold, which=queries
                ),
                output,
            )
        )
        return
    rows = take_split(load_splits(dataset_name, dataset_config), split, "split")
    roots = data_roots(dataset_name, None)
    rows = first(image_rows(rows, image_column, labelled=False, roots=roots), max_samples)
    boxes = pictures.query_boxes(
        *load_detector(model, trust_remote_code=trust_remote_code), pictures.read_images(rows)
    )
    title = f"{Path(model).name}: {Path(dataset_name).name}, {split}"
    print(pictures.plot_query_slots(boxes, output, title, queries))


@checked(**LIMITS)
def show_forecast(
    model: str,
    dataset_name: str,
    split: str = "test",
    index: int = 0,
    dataset_config: str | None = None,
    image_column: str | None = None,
    frame_step: int = 1,
    moving_images: int | None = None,
    moving_size: int | tuple[int, int] | None = None,
    moving_speed: float = 0.1,
    prediction_length: int | None = None,
    output: str = "forecast.png",
    trust_remote_code: bool = False,
) -> None:
    """Plot the frames that a video forecaster reads and predicts, the true ones, and those of baselines: as a picture,
    and as an animated GIF next to it.

    Args:
        model: folder or Hub id of a video forecaster.
        dataset_name: data set of videos, or of images from which they are generated, as for `evaluate`.
        split: split of the data set.
        index: row of the split.
        dataset_config: configuration of the data set.
        image_column: column of videos, or of the images that move; by default the only such column.
        frame_step: read every frame_step-th frame of a video.
        moving_images: number of images that move in a generated video; see `evaluate`.
        moving_size: pixels of these images.
        moving_speed: distance they move in a frame, as a fraction of the free range.
        prediction_length: frames to predict; by default those of the model.
        output: PNG file; the GIF has the same name.
        trust_remote_code: run the model's own code; not needed for models of this package.
    """
    from .tasks.evaluation import one_process
    from .tasks.video_forecasting import VideoEvaluationArguments, VideoForecastingTask
    from .viz.forecast import Forecast, animate_forecast, plot_forecast
    from .writing import check_png

    check_png("output", output)
    args = VideoEvaluationArguments(
        model=model,
        dataset_name=dataset_name,
        split=split,
        dataset_config=dataset_config,
        image_column=image_column,
        frame_step=frame_step,
        moving_images=moving_images,
        moving_size=moving_size,
        moving_speed=moving_speed,
        prediction_length=prediction_length,
        trust_remote_code=trust_remote_code,
    )
    task = VideoForecastingTask(args, one_process())
    inputs, truth, predictions = task.forecast_row(index)
    forecast = Forecast(f"{Path(model).name}: {Path(dataset_name).name} {split} {index}", inputs, truth, predictions)
    print(plot_forecast(forecast, output))
    print(animate_forecast(forecast, Path(output).with_suffix(".gif")))


@checked(**LIMITS)
def show_positions(
    models: list[str], length: int = 64, output: str = "positions.png", trust_remote_code: bool = False
) -> None:
    """Plot how close models see each pair of positions: of an image model's patches, or of several models' tokens.

    Args:
        models: folders or Hub ids: one image model, or one or more text models, which are compared in one picture.
        length: number of positions of a text model.
        output: PNG file.
        trust_remote_code: run the model's own code; not needed for models of this package.
    """
    from .hub.loading import load_config, require_model
    from .writing import check_png

    check_png("output", output)
    if not models:
        raise ValueError("models must be one or more folders or Hub ids, got none")
    for name in models:
        require_model("model", name)
    texts = [bool(getattr(load_config(name, trust_remote_code=trust_remote_code), "vocab_size", 0)) for name in models]
    if not texts[0] and len(models) == 1:
        from .viz.images import load_encoder
        from .viz.positions import plot_positions

        print(plot_positions(load_encoder(models[0], trust_remote_code), output))
        return
    if not all(texts):
        raise ValueError(f'models must be one image model or several text models, got "{models[texts.index(False)]}"')
    from .viz.sequence_positions import load_text_encoder, plot_sequence_positions

    loaded = {
        label: load_text_encoder(name, trust_remote_code) for label, name in zip(labels(models), models, strict=True)
    }
    print(plot_sequence_positions(loaded, output, length))


@checked(**LIMITS)
def show_scores(
    runs: list[str], score: str = "loss", over: Literal["steps", "minutes"] = "steps", output: str = "scores.png"
) -> None:
    """Plot a score of several runs during training in one picture.

    Args:
        runs: folders of runs, which may still be running, or their results files.
        score: score to plot, for instance AP or accuracy.
        over: what the horizontal axis shows: steps, or minutes of training time.
        output: PNG file.
    """
    from .hub.curve import plot_scores
    from .hub.results import read_evaluations
    from .writing import check_png

    check_png("output", output)
    if not runs:
        raise ValueError("runs must be one or more folders of runs, got none")
    found = {label: read_evaluations(name) for label, name in zip(labels(runs), runs, strict=True)}
    plot_scores(found, score, over).savefig(output, dpi=120)
    print(output)


def labels(paths: list[str]) -> list[str]:
    """Return short names of runs: the last part of each path, or the whole paths if these are not unique."""
    names = [path.stem if path.suffix == ".json" else path.name for path in map(Path, paths)]
    return names if len(set(names)) == len(names) else paths
