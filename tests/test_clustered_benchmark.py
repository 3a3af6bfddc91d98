"""The benchmark of clustered attention measures a small detector, and its page shows the results."""

import pytest
import torch
from transformers import DetrImageProcessor

from benchmarks import clustered_attention, common, report
from benchmarks.clustered_attention import KMeansAttention
from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection
from hf_tfm.data.digit_scenes import digit_scenes
from hf_tfm.models.clustered_attention import ClusteredAttention
from hf_tfm.tasks.model_fields import label_fields


@pytest.fixture
def detector(tmp_path) -> str:
    fields = {"backbone_output_stride": 8, "dilation": False, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1}
    fields |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4}
    config = TfmDetrConfig.of_size("tiny", **fields, **label_fields([str(digit) for digit in range(10)]))
    torch.manual_seed(0)
    TfmDetrForObjectDetection(config).save_pretrained(tmp_path / "model")
    DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_benchmark_runs(detector, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for split, rows in digit_scenes(train=4, validation=1, test=4, size=64).items():
        rows.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    options = {"dataset": str(tmp_path / "data"), "sizes": (64,), "rounds_of_hashes": (2, 8), "widths": (0.5,)}
    options |= {"control": (8,), "rounds": 1}
    clustered_attention.main(detector, **options, precisions=("no",), grids=((1, 1), (1, 2)))
    results = report.load("clustered_attention")
    assert list(results["speed"]) == ["16 cells, fp32", "32 cells, fp32"]
    rows = results["accuracy"]["64 px"]
    assert list(rows) == ["exact", "L 2, r 0.5", "L 8, r 0.5", "k-means as L 8, r 8"]
    assert rows["L 2, r 0.5"]["clusters"][0] <= rows["L 8, r 0.5"]["clusters"][0] <= 64
    page = report.clustered_attention(results)
    assert "| 32 cells, fp32 | L 8 |" in page and "| 64 px | k-means as L 8, r 8 |" in page


def test_control_has_the_number_of_clusters_of_the_hashes():
    query = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    hashed, count = ClusteredAttention(4, 1.0).clusters(query, 0.5)
    found, most = KMeansAttention(4, 1.0).clusters(query, 0.5)
    assert most == count and (found.amax(dim=-1) <= hashed.amax(dim=-1)).all()

    def spread(clusters: torch.Tensor) -> float:
        return sum(
            (query[b, h][clusters[b, h] == c] - query[b, h][clusters[b, h] == c].mean(dim=0)).square().sum().item()
            for b in range(2)
            for h in range(3)
            for c in clusters[b, h].unique()
        )

    assert spread(found) < spread(hashed)


def test_measurements_say_what_the_documentation_does():
    """docs/tasks/object_detection.md, "Clustered attention in the encoder"."""
    results = report.load("clustered_attention")
    rows = results["accuracy"]["384 px"]
    exact = rows["exact"]
    assert "2304 cells, fp32" in results["speed"]
    settings = [row for name, row in rows.items() if name.startswith("L ")]
    fast = [row["AP"] for row in settings if 2 * row["milliseconds"] < exact["milliseconds"]]
    assert max(fast) < exact["AP"] - 0.5
    assert rows["L 32, r 8"]["AP"] < exact["AP"] - 5 < rows["L 32, r 4"]["AP"]
    few = rows["k-means as L 16, r 8"]
    assert few["AP"] > rows["L 16, r 8"]["AP"] + 10
    assert few["milliseconds"] > exact["milliseconds"]
