"""Builders of `datasets` with a reader of our own: the same files with the same options as another builder's."""

from dataclasses import fields
from typing import Any

import datasets

COMMON = {"name", "version", "data_dir", "data_files", "description", "features"}  # options of every builder


def stated_options(builder: datasets.DatasetBuilder) -> dict[str, Any]:
    """The options of a builder that differ from the default and are not `COMMON`."""
    usual = type(builder).BUILDER_CONFIG_CLASS()
    stated = {f.name: getattr(builder.config, f.name) for f in fields(usual) if f.name not in COMMON}
    return {name: value for name, value in stated.items() if value != getattr(usual, name)}


class Rebuilt:
    """Beside a builder of `datasets`, as the other base of a builder with another reader."""

    @classmethod
    def like(cls, builder: datasets.DatasetBuilder, **options: Any) -> Any:
        """The same files with the same options as another builder's.

        Args:
            builder: of the class that this one reads instead of.
            options: others of the builder, such as ``hash`` and ``cache_dir``.
        """
        return cls(
            dataset_name=builder.dataset_name,
            config_name=builder.config.name,
            base_path=builder.base_path,
            data_files=builder.config.data_files,
            features=builder.info.features,
            token=builder.token,
            repo_id=builder.repo_id,
            **stated_options(builder),
            **options,
        )
