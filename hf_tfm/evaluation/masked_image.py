"""Score a masked autoencoder on any split of any data set."""

from typing import Any

import torch
from transformers import AutoModelForPreTraining

from ..limits import LIMITS
from ..tasks.base import mean_losses as evaluate
from ..tasks.masked_image import MaskedImageTask
from ..values import checked
from .reading import EvaluationLoader, Stopwatch, first, load_image_model, one_process, read_split
from .results import check_options, describe, metric, write


@checked(**LIMITS)
def evaluate_masked_autoencoder(
    model: str,
    dataset_name: str,
    split: str = "test",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    image_column: str | None = None,
    seed: int = 0,
    max_samples: int | None = None,
    max_bad_images: int = 10,
    batch_size: int = 64,
    dataloader_num_workers: int = 0,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Reconstruct the images of a split and score the hidden patches.

    Args:
        model: folder or Hub id of a masked autoencoder, ours or transformers', with its image processor.
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, "number-words" or "digits".
        split: of the data set.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch of the data set on the Hub.
        data_files: files by split, where dataset_name is a format such as "parquet".
        image_column: images, their bytes or paths; default, the only column of images.
        seed: of which patches are hidden; the same for a sample in every evaluation.
        max_samples: score only the first rows.
        max_bad_images: images that cannot be read are reported and left out, up to so many.
        batch_size: images in a batch.
        dataloader_num_workers: processes that read images.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code a Hub repository brings; our own models need none where hf_tfm is installed.
        output: also write the result to this JSON file.
        progress: show a progress bar.

    Returns:
        ``metrics`` with reconstruction_loss, the mean squared error of hidden patches in the model's own scale; the
        rest as of `evaluate_classification`.

    Raises:
        ValueError: split, column or option is not known, or a number is too small.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    counts = {"max_samples": max_samples, "batch_size": batch_size, "dataloader_num_workers": dataloader_num_workers}
    check_options(mixed_precision, output, max_bad_images=max_bad_images, **counts, seed=seed)
    where = (dataset_name, split, dataset_config, dataset_revision, data_files)
    rows = first(read_split(*where, image_column, labelled=False), max_samples)
    accelerator = one_process()
    loaded, processor = load_image_model(AutoModelForPreTraining, model, revision, trust_remote_code)
    loaded = loaded.to(accelerator.device)
    task = MaskedImageTask(loaded.config, processor, seed=seed)
    on_gpu = accelerator.device.type == "cuda"
    loader = EvaluationLoader(rows, task, batch_size, dataloader_num_workers, max_bad_images, on_gpu, progress)
    bf16 = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")
    with Stopwatch(loaded) as watch, bf16:
        loss = evaluate(accelerator, task, loaded, loader)["loss"]
    images = len(rows) - len(loader.bad)
    if not images:
        raise ValueError("the data set has no image that can be read")
    result = {
        **describe(model, dataset_name, split, rows, [metric("reconstruction_loss", loss, split)]),
        "images": images,
        "left_out": {"unreadable": len(loader.bad)},
        "seed": seed,
        "mixed_precision": mixed_precision,
        "throughput": watch.throughput(images),
    }
    if output:
        write({**result, "unreadable": loader.bad}, output)
    return result
