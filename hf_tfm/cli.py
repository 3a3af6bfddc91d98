"""The command line: hf-tfm run | evaluate | convert | push | show | doctor | quickstart.

hf-tfm COMMAND --help tells each one's options.
"""

import inspect
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import docstring_parser
from jsonargparse import ArgumentParser


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, or beside it in the repository."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def run(recipe: str, argv: list[str]) -> None:
    """Run a recipe by name, with its own options: hf-tfm run RECIPE --help.

    Args:
        recipe: name of a file in recipes/.
        argv: its command line.
    """
    known = sorted(path.stem for path in recipes_folder().glob("*.py"))
    if recipe not in known:
        sys.exit(f'hf-tfm run: there is no recipe "{recipe}"; there are {", ".join(known)}')
    file = str(recipes_folder() / f"{recipe}.py")
    sys.argv = [file, *argv]
    runpy.run_path(file, run_name="__main__")


def show_attention(
    model: str,
    image: str | None = None,
    text: str | None = None,
    target: str | None = None,
    query: str | None = None,
    output_dir: str = "attention",
    layers: list[int] | None = None,
    heads: list[int] | None = None,
) -> None:
    """Draw where a model looks, per layer and head: an image model on an image, a translation model on a text.

    Args:
        model: folder or Hub id.
        image: for an image model: a file, or dataset:split:index; drawn with attention rollout.
        text: for a translation model: the source sentence.
        target: its translation; default, the model's own.
        query: who looks at the image, class (the [class] token) or mean (of patches); default, what the model pools.
        output_dir: folder for the pictures.
        layers: numbers of the layers to draw; default, all.
        heads: numbers of the heads to draw; default, all.
    """
    from .viz import attention, image_maps, images

    if (image is None) == (text is None):
        raise ValueError("an image model needs an IMAGE, a translation model a --text: give one of them")
    if text is not None:
        from .evaluation import load_seq2seq

        if query is not None:
            raise ValueError(f'query is for an image, and here is a text; got "{query}"')
        images.require_text_model(model)
        maps = attention.attention_maps(*load_seq2seq(model), text, target)
        paths = attention.plot_attention(maps, output_dir, layers=layers, heads=heads)
    else:
        if target is not None:
            raise ValueError(f'target is for a text, and here is an image; got "{target}"')
        read, loaded, processor = images.read_image(image), images.load_encoder(model), images.load_processor(model)
        maps = image_maps.image_attention_maps(loaded, processor, read, query)
        paths = image_maps.plot_image_attention(maps, output_dir, layers=layers, heads=heads)
    for path in paths:
        print(path)


def show_reconstruction(
    model: str, images: list[str], mask_ratio: float | None = None, seed: int = 0, output: str = "reconstruction.png"
) -> None:
    """Draw images as a masked autoencoder reconstructs them: original, masked, reconstructed, a row for each.

    Args:
        model: folder or Hub id of a masked autoencoder.
        images: files, or dataset:split:index.
        mask_ratio: share of patches hidden; default, the model's.
        seed: of which patches are hidden.
        output: PNG file.
    """
    from .viz.images import load_autoencoder, load_processor, read_image
    from .viz.reconstruction import plot_reconstructions, reconstruct_images

    read, loaded = [read_image(image) for image in images], load_autoencoder(model)
    found = reconstruct_images(loaded, load_processor(model), read, mask_ratio, seed)
    print(plot_reconstructions(loaded, found, output))


def show_detections(
    model: str, images: list[str], threshold: float | None = None, output: str = "detections.png"
) -> None:
    """Draw what a detector finds in images: boxes with class and score, or segments where it has masks.

    Args:
        model: folder or Hub id of a detector, ours or transformers'.
        images: files, or dataset:split:index.
        threshold: the least score; default, 0.7 for boxes and 0.85 for segments.
        output: PNG file.
    """
    from .evaluation.detectors import load_detector
    from .viz.detections import detect, plot_detections
    from .viz.images import read_image

    read = [read_image(image) for image in images]
    loaded, processor = load_detector(model)
    print(plot_detections([detect(loaded, processor, image, threshold) for image in read], output))


def show_queries(
    model: str,
    image: str | None = None,
    dataset: str | None = None,
    split: str = "validation",
    dataset_name: str | None = None,
    image_column: str | None = None,
    max_samples: int = 500,
    threshold: float = 0.7,
    queries: list[int] | None = None,
    output: str = "queries.png",
) -> None:
    """Draw what a DETR's object queries do: where they look in an image, or where they put boxes in a data set.

    Args:
        model: folder or Hub id of a DETR, ours or transformers'.
        image: a file, or dataset:split:index: cross-attention of each confident query over it.
        dataset: what `evaluate` takes: centres of each query's boxes in all images, coloured by shape.
        split: of the data set.
        dataset_name: configuration of the data set.
        image_column: images, their bytes or paths; default, the only column of images.
        max_samples: read only the first images of the data set.
        threshold: the least score of a query that is drawn over an image.
        queries: numbers of those drawn of a data set; default, the first 20.
        output: PNG file.
    """
    from .evaluation.detectors import load_detector
    from .evaluation.reading import first, read_split
    from .viz import queries as pictures
    from .viz.images import read_image

    if (image is None) == (dataset is None):
        raise ValueError("queries are drawn over an IMAGE, or of a --dataset: give one of them")
    if image is not None:
        read = read_image(image)
        print(pictures.plot_queries(pictures.query_maps(*load_detector(model), read, threshold), output))
        return
    rows = first(read_split(dataset, split, dataset_name, None, None, image_column, labelled=False), max_samples)
    boxes = pictures.query_boxes(*load_detector(model), pictures.read_images(rows))
    title = f"{Path(model).name}: {Path(dataset).name}, {split}"
    print(pictures.plot_query_slots(boxes, output, title, queries))


def show_positions(model: str, output: str = "positions.png") -> None:
    """Draw how alike the position embeddings of an image model are, each patch's against all.

    Args:
        model: folder or Hub id.
        output: PNG file.
    """
    from .viz.images import load_encoder
    from .viz.positions import plot_positions

    print(plot_positions(load_encoder(model), output))


def convert(model: str, to: str, output_dir: str, revision: str | None = None) -> None:
    """Write a model as another library's class, or back, with a parity certificate beside it.

    Args:
        model: folder or Hub id, or a .pth file of the authors of the masked autoencoder or of DETR.
        to: a class that needs no remote code: transformers' marian (post-norm) or pegasus (pre-norm) for a translation
            model, transformers' vit or timm for a classifier, transformers' vit_mae or the names of mae_authors for a
            masked autoencoder, transformers' detr or the names of detr_authors for a detector; or back: tfm.
        output_dir: folder to make.
        revision: branch, tag or commit on the Hub.
    """
    from .hub.convert import convert as convert_model

    certificate = convert_model(model, to, output_dir, revision)
    differences = ", ".join(f"{name} {value:.2g}" for name, value in certificate["differences"].items())
    print(f"{output_dir}: largest difference of {differences} (tolerance {certificate['tolerance']:.2g})")


def push(folder: str, repo_id: str, private: bool = False) -> None:
    """Upload a run's folder to the Hub: model, code, tokenizer, card and results.

    Args:
        folder: of a run.
        repo_id: user/name.
        private: make a new repository private.
    """
    from .hub.push import push as push_folder

    print(push_folder(folder, repo_id, private).commit_url)


def doctor_detection(argv: list[str]) -> int:
    """Find out why AP would be 0 before a run starts: hf-tfm doctor detection --help.

    Args:
        argv: its command line.
    """
    from .doctor.detection import main as examine

    try:
        return examine(argv)
    except (ValueError, OSError) as error:  # what a user got wrong, as below
        sys.exit(f"hf-tfm doctor detection: {error}")


def quickstart(output_dir: str = "runs/quickstart") -> None:
    """Train a translator of number words and classifiers of digits, load and compare them, and look at them.

    Args:
        output_dir: folder of the translation run; those of the image runs have its name with an ending.
    """
    from .quickstart import quickstart as start

    start(output_dir)


def main(argv: list[str] | None = None) -> None:
    """The entry point ``hf-tfm``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        if len(argv) < 2 or argv[1] in ("-h", "--help"):
            names = "\n  ".join(sorted(path.stem for path in recipes_folder().glob("*.py")))
            sys.exit(
                f"usage: hf-tfm run RECIPE [options]\n\nrecipes:\n  {names}\n\nhf-tfm run RECIPE --help tells more"
            )
        run(argv[1], argv[2:])
        return
    if argv[:2] == ["doctor", "detection"]:
        sys.exit(doctor_detection(argv[2:]))
    from .evaluation import KINDS, evaluate, lines

    # What each command is about stands first, without a name; everything else is an option.
    commands = {
        "run": (run, "recipe"),  # listed here; what follows the recipe's name is the recipe's own to read
        "evaluate": (evaluate, "model"),
        "convert": (convert, "model"),
        "push": (push, "folder", "repo_id"),
        "show": {
            "attention": (show_attention, "model", "image"),
            "detections": (show_detections, "model", "images"),
            "positions": (show_positions, "model"),
            "queries": (show_queries, "model", "image"),
            "reconstruction": (show_reconstruction, "model", "images"),
        },
        "doctor": {"detection": (doctor_detection, "argv")},  # listed here; its words are its own to read
        "quickstart": (quickstart,),
    }
    parser = ArgumentParser(prog="hf-tfm", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    functions = add_commands(parser, commands, kinds={evaluate: KINDS})
    values = parser.parse_args(argv, defaults=False)  # what is not given, each function knows itself
    path = [values.command]
    chosen = values[values.command]
    while "command" in chosen:
        path.append(chosen.command)
        chosen = chosen[chosen.command]
    try:
        result = functions[tuple(path)](**chosen.as_dict())
    except (ValueError, OSError) as error:  # what a user got wrong; anything else is a fault of ours, with its trace
        sys.exit(f"hf-tfm {' '.join(path)}: {error}")
    for line in lines(result) if isinstance(result, dict) else ():
        print(line)


def add_commands(
    parser: ArgumentParser,
    commands: dict,
    path: tuple[str, ...] = (),
    kinds: Mapping[Callable, Mapping[str, Callable]] | None = None,
) -> dict[tuple[str, ...], Callable]:
    """Give a parser a command for each function, with options from its signature and docstring.

    Args:
        commands: name -> (function, its positional arguments ...), or another such dict.
        path: commands before these.
        kinds: for a function that calls one of several, those by name: their options are its own.

    Returns:
        The functions by path of commands.
    """
    functions: dict[tuple[str, ...], Callable] = {}
    group = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, entry in commands.items():
        if isinstance(entry, dict):
            sub = ArgumentParser(description=f"{name}: {', '.join(entry)}", allow_abbrev=False)
            group.add_subcommand(name, sub, help=sub.description)
            functions |= add_commands(sub, entry, (*path, name), kinds)
        else:
            function, *positional = entry
            document = docstring_parser.parse(function.__doc__)
            about = {argument.arg_name: argument.description for argument in document.params}
            sub = ArgumentParser(description=document.short_description, allow_abbrev=False)
            parameters = inspect.signature(function).parameters
            for argument in positional:
                many = {"nargs": "+"} if parameters[argument].annotation == list[str] else {}
                optional = {} if parameters[argument].default is inspect.Parameter.empty else {"nargs": "?"}
                sub.add_argument(argument, type=str, help=about[argument], **many, **optional)
            if function in (kinds or {}):
                add_options_of_kinds(sub, kinds[function], set(positional))
            else:
                sub.add_function_arguments(function, skip=set(positional), fail_untyped=True)
            group.add_subcommand(name, sub, help=sub.description)
            functions[(*path, name)] = function
    return functions


def add_options_of_kinds(parser: ArgumentParser, kinds: Mapping[str, Callable], skip: set[str]) -> None:
    """Give a parser the options of several functions, grouped by who takes them.

    Args:
        kinds: functions by name; what the first that takes an option says of it is its help.
        skip: arguments to leave out.
    """
    takers: dict[str, list[str]] = {}
    for kind, function in kinds.items():
        for name in inspect.signature(function).parameters:
            takers.setdefault(name, []).append(kind)
    groups: dict[str, set[str]] = {}
    for name, kind in takers.items():
        groups.setdefault("all models" if len(kind) == len(kinds) else enumerated(kind), set()).add(name)
    for title, names in groups.items():
        function = kinds[takers[next(iter(names))][0]]
        others = set(inspect.signature(function).parameters) - names
        group = parser.add_argument_group(title)
        group.add_function_arguments(function, as_group=False, skip=others | skip, fail_untyped=True)


def enumerated(words: Sequence[str]) -> str:
    """Words with commas, and "and" before the last."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


if __name__ == "__main__":
    main()
