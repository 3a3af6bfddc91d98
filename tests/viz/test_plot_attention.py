"""Plots of attention maps."""

import matplotlib._pylab_helpers
import matplotlib.image
import numpy as np
import pytest

from hf_tfm.viz import AttentionMaps, plot_alignment, plot_attention
from hf_tfm.viz.grid import DPI, MAX_PIXELS, Grid


def softmax(shape: tuple[int, ...]) -> np.ndarray:
    scores = np.random.RandomState(sum(shape)).standard_normal(shape).astype(np.float32)
    return np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)


@pytest.fixture
def maps() -> AttentionMaps:
    """4 source and 5 target tokens; 3 encoder layers, 2 decoder layers, 2 heads."""
    return AttentionMaps(
        model="tiny",
        text="costs $5 and $6",
        translation="kostet $5",
        source=["·costs", "·$", "5", "</s>"],
        read=["<s>", "a", "b", "c", "d"],
        predicted=["a", "b", "c", "d", "</s>"],
        encoder=softmax((3, 2, 4, 4)),
        decoder=softmax((2, 2, 5, 5)),
        cross=softmax((2, 2, 5, 4)),
    )


@pytest.fixture
def drawn(monkeypatch) -> list[Grid]:
    """The grids that are drawn, in order."""
    grids = []
    save = Grid.save
    monkeypatch.setattr(Grid, "save", lambda grid, path: grids.append(grid) or save(grid, path))
    return grids


def pixels(path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(path)


def test_folder_gets_a_plot_for_each_kind(maps, drawn, tmp_path):
    files = plot_attention(maps, tmp_path / "new" / "folder")
    assert files == [tmp_path / "new" / "folder" / f"{kind}.png" for kind in ("encoder", "decoder", "cross")]
    for file, grid in zip(files, drawn, strict=True):
        width, height = grid.draw().get_size_inches() * DPI
        assert pixels(file).shape == (int(height), int(width), 4)
    assert not matplotlib._pylab_helpers.Gcf.figs  # global state is unchanged


def test_panels_are_in_order_and_labelled(maps, drawn, tmp_path):
    (file,) = plot_attention(maps, tmp_path / "cross.png", which=["cross"])
    assert file == tmp_path / "cross.png"
    *panels, bar = drawn[0].draw().axes
    assert len(panels) == 4
    for i, ax in enumerate(panels):
        layer, head = divmod(i, 2)
        (image,) = ax.images
        np.testing.assert_array_equal(image.get_array(), maps.cross[layer, head])
        assert image.get_clim() == (0, 1)
        assert [label.get_text() for label in ax.get_yticklabels()] == (maps.predicted if head == 0 else [])
        assert [label.get_text() for label in ax.get_xticklabels()] == (maps.source if layer == 1 else [])
    lefts, tops = ([round(getattr(ax.get_position(), side), 3) for ax in panels] for side in ("x0", "y1"))
    assert lefts[0] == lefts[2] < lefts[1] == lefts[3]
    assert tops[0] == tops[1] > tops[2] == tops[3]
    assert [ax.get_title() for ax in panels] == ["head 0", "head 1", "", ""]
    assert [ax.get_ylabel() for ax in panels] == ["layer 0", "", "layer 1", ""]
    assert bar.get_ylim() == (0, 1)


def test_title_has_model_and_sentences(maps, drawn, tmp_path):
    plot_attention(maps, tmp_path)
    titles = ["\n".join(grid.title) for grid in drawn]
    assert titles[0] == "tiny: encoder self-attention\ncosts $5 and $6"
    assert titles[2] == "tiny: cross-attention\ncosts $5 and $6 → kostet $5"
    texts = [text for text in drawn[2].draw().texts if "$" in text.get_text()]
    assert texts and not any(text.get_parse_math() for text in texts)


def test_large_weights_are_dark_and_small_ones_light(tmp_path):
    full = np.ones((1, 1, 2, 2)), ["a", "b"], ["a", "b"], ["layer 0"], ["head 0"], "q", "k", ["t"]
    plots = [pixels(Grid(full[0] * value, *full[1:]).save(tmp_path / f"{value}.png")) for value in (0, 0.5, 1)]
    figure = Grid(*full).draw()
    box = figure.axes[0].get_position()
    height, width, _ = plots[0].shape
    rows = slice(int((1 - box.y1) * height) + 4, int((1 - box.y0) * height) - 4)
    columns = slice(int(box.x0 * width) + 4, int(box.x1 * width) - 4)
    shades = [plot[rows, columns, :3].mean() for plot in plots]
    assert shades[0] > 0.95
    assert 0.3 < shades[1] < 0.8
    assert shades[2] < 0.3
    assert all(plot[rows, columns, :3].std(axis=(0, 1)).max() < 0.01 for plot in plots)


def test_layers_and_heads_are_selected(maps, drawn, tmp_path):
    plot_attention(maps, tmp_path, which=["encoder"], layers=[-1, 0], heads=[1])
    assert drawn[0].rows == ["layer 2", "layer 0"]
    assert drawn[0].columns == ["head 1"]
    np.testing.assert_array_equal(drawn[0].panels, maps.encoder[[2, 0]][:, [1]])


def test_alignment_is_the_mean_of_the_last_layer(maps, drawn, tmp_path):
    assert plot_alignment(maps, tmp_path / "a" / "alignment.png") == tmp_path / "a" / "alignment.png"
    plot_alignment(maps, tmp_path / "first.png", layer=0)
    for grid, layer in zip(drawn, (1, 0), strict=True):
        np.testing.assert_allclose(grid.panels[0, 0], maps.cross[layer].mean(axis=0))
        assert grid.rows == [f"layer {layer}"]
    assert pixels(tmp_path / "first.png").ndim == 3


def words(count: int, layers: int, heads: int) -> Grid:
    names = ["·hundred"] * count
    rows, columns = [f"layer {i}" for i in range(layers)], [f"head {i}" for i in range(heads)]
    return Grid(np.zeros((layers, heads, count, count)), names, names, rows, columns, "q", "k", ["t"])


def test_plot_grows_with_the_sentence():
    for count in (2, 60):
        figure = words(count, 1, 1).draw()
        ax = figure.axes[0]
        room = ax.get_position().height * figure.get_figheight() / count  # inches per label
        size = ax.get_yticklabels()[0].get_fontsize() / 72
        assert room > 1.2 * size


def test_documented_limit_works():
    grid = words(60, 6, 16)
    assert 0.8 * MAX_PIXELS < grid.width * grid.height * DPI**2 <= MAX_PIXELS
    with pytest.raises(
        ValueError, match=r"6 layers and 16 heads with 80 x 80 tokens has .* choose fewer layers or heads"
    ):
        words(80, 6, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"which": ["self"]}, r"which must be one or more of encoder, decoder, cross, got \['self'\]"),
        ({"which": []}, r"which must be one or more of encoder, decoder, cross, got \[\]"),
        ({"layers": [3]}, r"layers must be one or more of 0 to 2, got \[3\]"),
        ({"heads": []}, r"heads must be one or more of 0 to 1, got \[\]"),
        ({"output": "maps.png"}, 'output must be a folder for 3 kinds of maps, got the file "maps.png"'),
    ],
)
def test_invalid_arguments_are_refused(maps, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_attention(maps, **{"output": tmp_path, **arguments})
    assert not list(tmp_path.iterdir())


def test_unknown_layer_is_refused(maps, tmp_path):
    with pytest.raises(ValueError, match=r"layer must be one or more of 0 to 1, got \[2\]"):
        plot_alignment(maps, tmp_path / "alignment.png", layer=2)
