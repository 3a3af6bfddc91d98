"""The commands hf-tfm show: pictures of what a model sees and does.

Libraries are imported where they are used, for matplotlib takes a while and other commands do without.
"""

from pathlib import Path

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
    """Draw where a model looks, per layer and head: an image model on an image, any other on a text.

    Args:
        model: folder or Hub id.
        image: for an image model: a file, or dataset:split:index; drawn with attention rollout.
        text: for a model of texts; of a translation model, the source sentence.
        target: its translation; default, the model's own.
        pair: a second text, for a model that reads two.
        beside: folder or Hub id of another model of texts, a teacher say, drawn at its left.
        query: who looks at the image, class (the [class] token) or mean (of patches); default, what the model pools.
        output_dir: folder for the pictures.
        layers: numbers of the layers to draw; default, all.
        heads: numbers of the heads to draw; default, all.
        trust_remote_code: run the code that the model brings; our own models need none where hf_tfm is installed.
    """
    from .hub.loading import load_image_processor
    from .viz import attention, image_maps, images, text_attention

    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"output_dir {output_dir} is a file: give the name of a folder")
    if (image is None) == (text is None):
        raise ValueError("an image model needs an IMAGE, a model of texts a --text: give one of them")
    for name, value in {"target": target, "pair": pair, "beside": beside}.items():
        if image is not None and value is not None:
            raise ValueError(f'{name} is for a text, and here is an image; got "{value}"')
    if text is not None and query is not None:
        raise ValueError(f'query is for an image, and here is a text; got "{query}"')
    if text is not None and not text_attention.reads_pairs(model, trust_remote_code):
        if target is not None:
            raise ValueError(f'target is for a translation model, and "{model}" is none; got "{target}"')
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
            raise ValueError(f'pair and beside are for an encoder or a decoder, and "{model}" is both')
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
    """Draw images as a masked autoencoder reconstructs them: original, masked, reconstructed, a row for each.

    Args:
        model: folder or Hub id of a masked autoencoder.
        images: files, or dataset:split:index.
        mask_ratio: share of patches hidden; default, the model's.
        seed: of which patches are hidden.
        output: PNG file.
        trust_remote_code: run the code that the model brings; our own models need none where hf_tfm is installed.
    """
    from .evaluation.results import check_png
    from .hub.loading import load_image_processor
    from .viz.images import load_autoencoder, read_image
    from .viz.reconstruction import plot_reconstructions, reconstruct_images

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
    """Draw what a detector finds in images: boxes with class and score, or segments where it has masks.

    Args:
        model: folder or Hub id of a detector, ours or transformers'.
        images: files, or dataset:split:index.
        threshold: the least score; default, 0.7 for boxes and 0.85 for segments.
        output: PNG file.
        trust_remote_code: run the code that the model brings; our own models need none where hf_tfm is installed.
    """
    from .evaluation.detectors import load_detector
    from .evaluation.results import check_png
    from .viz.detections import detect, plot_detections
    from .viz.images import read_image

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
    """Draw what a DETR's object queries do: where they look in an image, or where they put boxes in a data set.

    Args:
        model: folder or Hub id of a DETR, ours or transformers'.
        image: a file, or dataset:split:index: cross-attention of each confident query over it.
        dataset_name: what `evaluate` takes: centres of each query's boxes in all images, coloured by shape.
        split: of the data set.
        dataset_config: configuration of the data set.
        image_column: images, their bytes or paths; default, the only column of images.
        max_samples: read only the first images of the data set.
        threshold: the least score of a query that is drawn over an image.
        queries: numbers of those drawn of a data set; default, the first 20.
        output: PNG file.
        trust_remote_code: run the code that the model brings; our own models need none where hf_tfm is installed.
    """
    from .evaluation.detectors import load_detector
    from .evaluation.reading import first, read_split
    from .evaluation.results import check_png
    from .viz import queries as pictures
    from .viz.images import read_image

    check_png("output", output)
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    if (image is None) == (dataset_name is None):
        raise ValueError("queries are drawn over an IMAGE, or of a --dataset_name: give one of them")
    if image is not None:
        read = read_image(image)
        print(
            pictures.plot_queries(
                pictures.query_maps(*load_detector(model, trust_remote_code=trust_remote_code), read, threshold),
                output,
            )
        )
        return
    rows = first(
        read_split(dataset_name, split, dataset_config, None, None, image_column, labelled=False), max_samples
    )
    boxes = pictures.query_boxes(
        *load_detector(model, trust_remote_code=trust_remote_code), pictures.read_images(rows)
    )
    title = f"{Path(model).name}: {Path(dataset_name).name}, {split}"
    print(pictures.plot_query_slots(boxes, output, title, queries))


@checked(**LIMITS)
def show_positions(model: str, output: str = "positions.png", trust_remote_code: bool = False) -> None:
    """Draw how alike the position embeddings of an image model are, each patch's against all.

    Args:
        model: folder or Hub id.
        output: PNG file.
        trust_remote_code: run the code that the model brings; our own models need none where hf_tfm is installed.
    """
    from .evaluation.results import check_png
    from .viz.images import load_encoder
    from .viz.positions import plot_positions

    check_png("output", output)
    print(plot_positions(load_encoder(model, trust_remote_code), output))
