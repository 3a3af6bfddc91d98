"""A damaged teacher cache is rejected with the name of the damaged file before training starts."""

import json
import shutil

import pytest
from distillation_helpers import TextTask, classifier, sentences, training_samples
from safetensors.torch import load_file, save_file

from hf_tfm.distillation.cache import CachedTeacher, CacheFormat, write_cache
from hf_tfm.distillation.shards import load_cost, save_cost
from hf_tfm.distillation.teacher import Teacher

DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "junk": lambda file: file.write_bytes(b"\x80\xff"),
    "list": lambda file: file.write_text("[1]"),
    "other": lambda file: file.write_text('{"foo": 1}'),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "cache"
    write_cache(
        Teacher(classifier(4)), training_samples(TextTask(), sentences()), folder, CacheFormat(shard_samples=4)
    )
    save_cost(folder, {"model": "teacher", "parameters": 1, "gflops": 1.0, "score": 0.5}, "accuracy")
    return folder


@pytest.fixture
def cache(written, tmp_path):
    return shutil.copytree(written, tmp_path / "cache")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["index.json", "shards/00000.safetensors", "shards/00001.safetensors"])
def test_damaged_file_is_named(cache, name, kind):
    CachedTeacher(cache)
    DAMAGE[kind](cache / name)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        CachedTeacher(cache)


def test_nan_in_shard_is_named(cache):
    path = cache / "shards" / "00001.safetensors"
    tensors = load_file(path)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    tensors[name][-1] = float("nan")
    save_file(tensors, path)
    teacher = CachedTeacher(cache)
    teacher.sample(4, 0, [name])
    last = 4 + len(tensors["number"]) - 1
    with pytest.raises(ValueError, match=rf'00001\.safetensors holds NaN in the signal "{name}" of sample {last}:'):
        teacher.sample(last, 0, [name])


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", "many"), ("rows", 0), ("epochs", -1), ("shard_samples", 0), ("signals", 3), ("facts", {}), ("extra", 1)],
)
def test_wrong_index_value_is_named(cache, name, value):
    content = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(ValueError, match=rf"index\.json is damaged.*{'' if name == 'facts' else name}"):
        CachedTeacher(cache)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cost_file_is_named(cache, kind):
    assert load_cost(cache, "accuracy")["score"] == 0.5
    DAMAGE[kind](cache / "teacher.json")
    with pytest.raises(ValueError, match=r"teacher\.json is damaged .*delete the file"):
        load_cost(cache, "accuracy")


def test_unrelated_folder_is_not_a_cache(tmp_path):
    with pytest.raises(ValueError, match="holds no cache of a teacher's signals"):
        CachedTeacher(tmp_path)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        write_cache(Teacher(classifier(4)), training_samples(TextTask(), sentences()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
