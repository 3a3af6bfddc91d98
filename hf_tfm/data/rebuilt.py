"""Base of `datasets` builders with a custom reader, which take over the files and options of the original builder."""

from dataclasses import fields
from typing import Any

import datasets

COMMON = {"name", "version", "data_dir", "data_files", "description", "features"}  # options of every builder


def stated_options(builder: datasets.DatasetBuilder) -> dict[str, Any]:
    """Return the options of a builder that differ from the default and are not in `COMMON`."""
    usual = type(builder).BUILDER_CONFIG_CLASS()
    stated = {f.name: getattr(builder.config, f.name) for f in fields(usual) if f.name not in COMMON}
    return {name: value for name, value in stated.items() if value != getattr(usual, name)}


class Rebuilt:
    """Mixin for a `datasets` builder with a custom reader."""

    @classmethod
    def like(cls, builder: datasets.DatasetBuilder, **options: Any) -> Any:
        """Create a builder with the same files and options as another one.

        Args:
            builder: instance of the builder class that this one replaces.
            options: further builder options, such as ``hash`` and ``cache_dir``.
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
