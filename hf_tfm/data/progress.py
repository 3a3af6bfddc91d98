"""Progress bars of `datasets`."""

import datasets


def show_progress_of(rows) -> None:
    """Show `datasets`' progress bars only for large data sets."""
    if isinstance(rows, datasets.Dataset) and len(rows) >= 100_000:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
