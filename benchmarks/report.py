"""Write benchmarks/README.md from the results files: python -m benchmarks report. A test holds the two together."""

import json
from collections.abc import Callable
from pathlib import Path

from .common import RESULTS

README = Path(__file__).parent / "README.md"
HEAD = """# Benchmarks

Made by `python -m benchmarks report` from the files in `results/`. `make bench` measures everything anew;
`python -m benchmarks NAME --help` lists the options of one. Contestants take turns in one process; figures are
medians, ratios are medians of ratios of neighbouring runs.
"""


def load(name: str) -> dict | None:
    """A results file, if it was measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(results: dict) -> str:
    """One line on where and how a result was measured."""
    hardware, versions = results["hardware"], results["versions"]
    device = hardware.get("gpu") or hardware.get("device") or hardware.get("cpu")
    return (
        f"{device}, {results['threads']} threads, torch {versions['torch']}, transformers {versions['transformers']}: "
        f"`{results['command']}`"
    )


def training(results: dict) -> str:
    """Training speed of translation."""
    rates = [
        (size, name, rate)
        for size, of_size in results["sizes"].items()
        for name, rate in of_size["target_tokens_per_second"].items()
    ]
    ratios = [(size, name, r) for size, of_size in results["sizes"].items() for name, r in of_size["ratios"].items()]
    floors = [
        (size, precision, floor["matmul_gflops"], floor["mflop_per_target_token"], f"{floor['share']:.0%}")
        for size, of_size in results["sizes"].items()
        for precision, floor in of_size["share_of_floor"].items()
    ]
    return "\n\n".join(
        [
            "## Training: real target tokens per second",
            "`marian_random` is transformers' Marian with Trainer's LabelSmoother and AdamW on random batches of "
            f"{results['batch_size']}; `marian_sorted` the same on our batches sorted by both sides.",
            machine(results),
            table(("size", "contestant", "tokens/s"), rates),
            table(("size", "ratio", "times"), ratios),
            "Share of the floor: linear-layer FLOPs of real tokens, at the machine's measured matrix-product rate.",
            table(("size", "precision", "GFLOP/s", "MFLOP a target token", "reached"), floors),
        ]
    )


def generation(results: dict) -> str:
    """Generation speed against the stock class."""
    rows = [
        (name, r["ours_sentences_per_second"], r["peer_sentences_per_second"], r["ratio"], r["identical_sentences"])
        for name, r in results["results"].items()
    ]
    return "\n\n".join(
        [
            "## Generation: sentences per second",
            "Same weights in both; the peer is transformers' Marian, or Pegasus for a pre-norm model. Equal lengths: "
            f"random weights, {results['new_tokens']} new tokens a sentence.",
            machine(results),
            table(("setting", "ours", "peer", "times", "share of identical sentences"), rows),
        ]
    )


def label_smoothing(results: dict) -> str:
    """The large-vocabulary loss."""
    rows = [
        (f"time, {precision} (ms)", *r["milliseconds"].values(), r["ratio"], r["share_of_floor"])
        for precision, r in results["speed"].items()
    ]
    rows.append(("extra memory, fp32 (MB)", *results["extra_megabytes"].values(), "", results["memory_ratio"], ""))
    return "\n\n".join(
        [
            "## Label-smoothed loss over a large vocabulary",
            f"{results['tokens']:,} positions, {results['vocab_size']:,} words, {results['hidden_size']} features, "
            "forward and backward with the output layer. Largest difference of gradients: "
            f"{results['max_abs_gradient_difference']:.1e} (largest gradient {results['max_abs_gradient']:.1e}).",
            machine(results),
            table(("", "ours", "LabelSmoother", "matrix products alone", "times", "share of the floor"), rows),
        ]
    )


def padding(results: dict) -> str:
    """Padding by way of batching."""
    rows = [(name, f"{share:.1%}") for name, share in results["waste"].items()]
    return "\n\n".join(
        [
            "## Padding: share of tokens that are padding, both sides",
            machine(results),
            table(("batches", "padding"), rows),
        ]
    )


def image_loading(results: dict) -> str:
    """Reading and augmenting images."""
    rows = [
        (name, *r["images_per_second"].values(), *r["ratios"].values(), r.get("kilobytes", ""))
        for name, r in results["results"].items()
    ]
    workers = f"{results['num_workers']} worker processes" if results["num_workers"] else "one thread, no workers"
    return "\n\n".join(
        [
            "## Image loading: images per second",
            "JPEG files in memory to normalised float32 batches on the host; uint8 leaves scaling to the device. The "
            f"peer is PIL with torchvision's v1 transforms in torch's DataLoader; {workers}, torchvision "
            f"{results['torchvision']}.",
            machine(results),
            table(("images", "ours", "ours, uint8", "PIL pipeline", "times", "times, uint8", "kB a file"), rows),
        ]
    )


def vision(results: dict) -> str:
    """Training and inference speed, and training memory, of image models."""
    models = results["models"].items()

    def rows(field: str, show: Callable[[float], str] = str) -> list[tuple]:
        return [(model, name, show(value)) for model, r in models for name, value in r.get(field, {}).items()]

    floors = [
        (model, precision, floor["matmul_gflops"], floor["gflop_per_image"], f"{floor['share']:.0%}")
        for model, r in models
        for precision, floor in r["share_of_floor"].items()
    ]
    parts = [
        "## Vision: images per second",
        f"Batches of {results['batch_size']} random images of {results['image_size']} pixels, three quarters masked "
        f"in pretraining{', compiled' if results['compile'] else ''}.",
        machine(results),
        table(("model", "contestant", "images/s"), rows("images_per_second")),
        table(("model", "ratio", "times"), rows("ratios")),
        "Share of the floor: FLOPs of layers and attention, at the machine's measured matrix-product rate.",
        table(("model", "precision", "GFLOP/s", "GFLOP an image", "reached"), floors),
    ]
    if used := rows("mfu", "{:.0%}".format):
        parts += [
            "MFU: the same FLOPs as a share of the GPU's bf16 rate by its data sheet.",
            table(("model", "contestant", "MFU"), used),
        ]
    if memory := rows("peak_megabytes", "{:,}".format):
        parts += [
            "Peak memory of training, on a CPU the growth of the process: weights, gradients, moments, activations.",
            table(("model", "contestant", "MB"), memory),
        ]
    return "\n\n".join(parts)


def detection_evaluation(results: dict) -> str:
    """Time and memory of average precision."""
    ours = results["seconds"]["ours"], results["megabytes"]["ours"]
    rows = [
        (
            name,
            seconds,
            results["megabytes"][name],
            f"{seconds / ours[0]:.1f}",
            f"{results['megabytes'][name] / ours[1]:.1f}",
        )
        for name, seconds in results["seconds"].items()
    ]
    return "\n\n".join(
        [
            "## Average precision of detections",
            f"{results['images']:,} images with {results['detections']} detections and {results['objects']} objects "
            "each: processor time of one thread from the first batch to the scores, each contestant in a process of "
            f"its own. Largest difference of AP: {results['max_abs_ap_difference']:.1e}.",
            machine(results),
            table(("contestant", "seconds", "MB", "times ours, seconds", "times ours, MB"), rows),
        ]
    )


def detection_padding(results: dict) -> str:
    """Padding of scenes by way of batching."""
    ways = next(iter(results["padding"].values())).keys()
    rows = [(way, *(f"{shares[way]:.1%}" for shares in results["padding"].values())) for way in ways]
    return "\n\n".join(
        [
            "## Padding: share of pixels that are padding in batches for detection",
            f"{results['images']:,} images with the sizes of {results['real_sizes']} real ones, changed by DETR's "
            "augmentation: flip, crop, one of 11 scales. Orientation: upright and wide images apart.",
            machine(results),
            table(("batches", *(f"batch {size}" for size in results["padding"])), rows),
        ]
    )


def detection_training(results: dict) -> str:
    """Training speed of DETR."""
    rates = results["images_per_second"].items()
    floors = [(precision, f"{share:.0%}") for precision, share in results["share_of_floor"].items()]
    return "\n\n".join(
        [
            "## DETR training: images per second",
            f"ResNet-50, {results['batch_size']} images of {results['height']} x {results['width']} with "
            f"{results['objects']} objects each, auxiliary losses on, a whole step. transformers' model starts from "
            "our weights and trains the whole backbone; ours and the authors' freeze its stem and first stage.",
            machine(results),
            table(("contestant", "images/s"), list(rates)),
            table(("ratio", "times"), list(results["ratios"].items())),
            table(("contestant", "GFLOP a step"), list(results["gflop_a_step"].items())),
            "Share of the floor: those FLOPs at the machine's measured matrix-product rate.",
            table(("precision", "reached"), floors),
        ]
    )


def set_criterion(results: dict) -> str:
    """Matching and losses of DETR."""
    rows = [
        (size, name, r["milliseconds"][name], r["operations"][name], r["reads_by_the_host"][name])
        for size, r in results["batches"].items()
        for name in r["milliseconds"]
    ]
    ratios = [
        (size, ratio, times, f"{r['gradient_difference'][ratio.split(' / ')[1]]:.1e}", f"{r['largest_gradient']:.1e}")
        for size, r in results["batches"].items()
        for ratio, times in r["ratios"].items()
    ]
    return "\n\n".join(
        [
            "## DETR's criterion: matching and losses",
            f"Predictions of {results['layers']} decoder layers with {results['queries']} queries, "
            f"{results['objects']} objects an image, forward and backward.",
            machine(results),
            table(("", "contestant", "ms", "operations", "reads by the host"), rows),
            table(("", "ratio", "times", "largest difference of gradients", "largest gradient"), ratios),
        ]
    )


def language_training(results: dict) -> str:
    """Training speed of BERT and GPT."""
    models = results["models"].items()
    rates = [(model, name, rate) for model, r in models for name, rate in r["tokens_per_second"].items()]
    ratios = [(model, name, times) for model, r in models for name, times in r["ratios"].items()]
    floors = [
        (model, precision, floor["matmul_gflops"], floor["mflop_per_token"], f"{floor['share']:.0%}")
        for model, r in models
        for precision, floor in r["share_of_floor"].items()
    ]
    return "\n\n".join(
        [
            "## Language models: training, real tokens per second",
            f"Masked tokens: {results['batch_size']} sentences a batch, transformers' BERT with its collator on "
            "random batches, ours sorted by length. Next tokens, against transformers' GPT-2 and nanoGPT: "
            f"{results['blocks']} packed blocks of {results['block']} tokens.",
            machine(results),
            table(("model", "contestant", "tokens/s"), rates),
            table(("model", "ratio", "times"), ratios),
            "Share of the floor: FLOPs of real tokens at the machine's measured matrix-product rate.",
            table(("model", "precision", "GFLOP/s", "MFLOP a token", "reached"), floors),
        ]
    )


def language_generation(results: dict) -> str:
    """Generation speed of GPT against GPT-2."""
    rows = [
        (name, r["new_tokens"], *r["tokens_per_second"].values(), r["ratio"], r["identical_sentences"])
        for name, r in results["results"].items()
    ]
    return "\n\n".join(
        [
            "## GPT generation: tokens per second",
            "Same weights as transformers' GPT-2: random ones, prompts padded at the left and texts of one length, or "
            "those of a small model that was trained on sentences, which end by themselves.",
            machine(results),
            table(("setting", "tokens a text", "ours", "GPT-2", "times", "share of identical texts"), rows),
        ]
    )


def distillation(results: dict) -> str:
    """Steps of distillation and sizes of caches."""
    found = results["precisions"].items()

    def rows(field: str) -> list[tuple]:
        return [(precision, *item) for precision, r in found for item in r[field].items()]

    return "\n\n".join(
        [
            "## Distillation: seconds per step",
            f"BERT-base teaches, {results['batch_size']} sequences of {results['length']} tokens; making the batch "
            "and reading the cache included. Plain: logits of all tokens by both models, the teacher in memory. "
            "Masked: logits of masked tokens alone. Cached: the teacher's signals are read from a cache.",
            machine(results),
            table(("", "step", "seconds"), rows("seconds_per_step")),
            table(("", "ratio", "times"), rows("times_faster")),
            "Caches, as those steps need them, and of logits alone for sequences of 64 tokens.",
            table(("", "cache", "kB a sequence"), rows("kilobytes_per_sequence")),
            table(("signal", "kB a sequence of 64"), list(results["kilobytes_per_sequence_of_64"].items())),
        ]
    )


SECTIONS = {
    "translation_training": training,
    "translation_generation": generation,
    "label_smoothing": label_smoothing,
    "padding_waste": padding,
    "image_loading": image_loading,
    "vision_training": vision,
    "detection_training": detection_training,
    "set_criterion": set_criterion,
    "detection_padding": detection_padding,
    "detection_evaluation": detection_evaluation,
    "language_training": language_training,
    "language_generation": language_generation,
    "distillation": distillation,
}


def text() -> str:
    """The whole page."""
    parts = [render(results) for name, render in SECTIONS.items() if (results := load(name))]
    return "\n\n".join([HEAD.strip(), *parts]) + "\n"


def main() -> None:
    """Write benchmarks/README.md."""
    README.write_text(text())
    print(README)
