"""Weights under the names of transformers' own classes, so that either class loads the other's files."""

from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping


def register_native_names(class_name: str, names: tuple[tuple[str, str], ...]) -> None:
    """Let the model called ``class_name`` load and save weights under transformers' names.

    Args:
        names: (name in a file, name in the model), regular expressions, in this order when loading.
    """
    mapping = [WeightRenaming(source, target) for source, target in names]
    register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)
