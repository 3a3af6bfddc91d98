"""Processes that have to read the same file of a stream are reported."""

from types import SimpleNamespace

import datasets
import pytest
import torch

from hf_tfm.tasks import streams


@pytest.mark.parametrize(("files", "stream_files", "told"), [(3, 64, 3), (9, 2, 2), (9, 64, None), (4, 4, None)])
def test_a_warning_says_how_many_files_are_needed(files, stream_files, told, monkeypatch, caplog):
    monkeypatch.setattr(streams, "ProcessExchange", lambda timeout: "exchange")
    rows = datasets.Dataset.from_dict({"row": list(range(9))}).to_iterable_dataset(num_shards=files)
    args = SimpleNamespace(seed=5, stream_files=stream_files, ddp_timeout=60, dataloader_num_workers=0)
    processes = SimpleNamespace(num_processes=4, process_index=0, is_main_process=True, device=torch.device("cpu"))
    found = streams.stream_placement(args, processes, rows)
    assert (found["exchange"], found["max_lanes"], found["world_size"]) == ("exchange", stream_files, 4)
    expected = (
        f"4 processes read {told} files of the stream at a time, so several read the same one: give stream_files=4, "
        "and at least as many files"
    )
    assert caplog.messages == ([expected] if told else [])
