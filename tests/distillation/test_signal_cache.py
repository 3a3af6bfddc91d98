"""Cached teacher signals equal online ones; incomplete caches and caches of another run are rejected."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from distillation_helpers import (
    TextTask,
    batches,
    bert,
    classifier,
    detection_task,
    detr,
    distillation,
    image_rows,
    image_task,
    language_task,
    losses,
    scenes,
    sentence_pairs,
    sentences,
    trained,
    training_samples,
    translation_task,
    translator,
    vit,
)
from processes import start

from hf_tfm.data.augment import Augmentation, Mixing
from hf_tfm.data.batching import SampleRef, StepLoader, key_of, sample_ref
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.distillation import cache as caches
from hf_tfm.distillation.cache import CachedTeacher, CacheFormat, write_cache
from hf_tfm.distillation.resolve import signals_of
from hf_tfm.distillation.shards import CacheIndex, shard_path
from hf_tfm.distillation.teacher import Teacher
from hf_tfm.tasks.distillation import OWN, DistillationTask

MLM = [
    {"kind": "label"},
    {"kind": "soft_target", "temperature": 2.0},
    {"kind": "cosine", "projection": "linear"},
    {"kind": "hidden_state"},
    {"kind": "attention_score"},
    {"kind": "attention_probability", "layers": "final"},
]
CLASSES = [{"kind": "soft_target", "temperature": 2.0}, {"kind": "hard_target"}, {"kind": "logit"}]
SEQ2SEQ = [
    {"kind": "label"},
    {"kind": "soft_target", "temperature": 2.0},
    {"kind": "hidden_state", "stack": "encoder"},
    {"kind": "cosine", "stack": "decoder", "projection": "linear", "tokens": "targets"},
    {"kind": "attention_score", "stack": "decoder"},
    {"kind": "attention_probability", "stack": "cross", "layers": "final"},
]
CASES = {
    "language": (language_task, lambda: bert(4), lambda: bert(2, 16, seed=1), MLM, sentences),
    "language, all tokens": (
        language_task,
        lambda: bert(4),
        lambda: bert(2, 16, seed=1),
        [{"kind": "label"}, {"kind": "soft_target", "tokens": "all"}],
        sentences,
    ),
    "texts": (TextTask, lambda: classifier(4), lambda: classifier(2, 16, seed=1), CLASSES, sentences),
    "translation": (
        translation_task,
        lambda: translator(4),
        lambda: translator(2, 16, seed=1),
        SEQ2SEQ,
        sentence_pairs,
    ),
    "images": (
        lambda: image_task(augmentation=Augmentation()),
        lambda: vit(4),
        lambda: vit(2, 16, seed=1),
        [*CLASSES, {"kind": "hidden_state"}, {"kind": "attention_score"}],
        image_rows,
    ),
    "detection": (
        lambda: detection_task(detr(2)),
        lambda: detr(4),
        lambda: detr(2, seed=1),
        [
            {"kind": "query"},
            {"kind": "label"},
            {"kind": "feature_map", "layers": {"model.input_projection": "model.input_projection"}},
        ],
        scenes,
    ),
}


def make(name, folder, epochs=2, **options):
    """The same distillation online and from a cache, and the rows."""
    make_task, teacher, student, terms, rows = CASES[name]
    task, rows = make_task(), rows()
    online, model = distillation(task, teacher(), student(), terms)
    names = signals_of(online.terms, "teacher")
    form = CacheFormat(names, epochs, **{"dtype": "fp32", "shard_samples": 4, **options})
    report = write_cache(online.source, training_samples(online, rows), folder, form, batch_size=3)
    cached = DistillationTask.around(task, CachedTeacher(folder), online.terms)
    return online, cached, model, rows, report


@pytest.mark.parametrize("name", CASES)
def test_online_and_cached_runs_have_the_same_losses(name, tmp_path):
    online, cached, model, rows, _ = make(name, tmp_path)
    model.eval()
    cut = [[5, 0, 2], [1, 4]]
    for epoch in (0, 1):
        pairs = zip(batches(online, rows, cut, epoch), batches(cached, rows, cut, epoch), strict=True)
        for ours, theirs in pairs:
            assert OWN in theirs and theirs[OWN]["signals"]
            assert losses(cached, model, theirs) == pytest.approx(losses(online, model, ours), rel=1e-6, abs=1e-6)
    first, third = (batches(cached, rows, cut, epoch)[0] for epoch in (0, 2))
    assert losses(cached, model, first) == losses(cached, model, third)  # two epochs are cached and reused
    if name in ("language", "images"):
        second = batches(cached, rows, cut, 1)[0]
        assert losses(cached, model, first) != losses(cached, model, second)


def test_cached_run_gives_the_same_weights(tmp_path):
    online, cached, _, rows, _ = make("language", tmp_path)
    found = []
    for task in (online, cached):
        _, fresh = distillation(online.task, bert(4), bert(2, 16, seed=1), MLM)
        steps = [batches(task, rows, [[0, 1, 2], [3, 4]], epoch) for epoch in (0, 1)]
        found.append(trained(task, fresh, steps)[0])
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < 1e-6


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 0.02), ("fp16", 0.003)])
def test_half_precision_cache_is_close(dtype, error, tmp_path):
    online, cached, model, rows, _ = make("language", tmp_path, dtype=dtype)
    ours, theirs = (batches(task, rows, [[0, 1, 2, 3]])[0] for task in (online, cached))
    assert theirs[OWN]["signals"]["hidden/4"].dtype in (torch.bfloat16, torch.float16)
    exact, found = (losses(task, model.eval(), batch) for task, batch in ((online, ours), (cached, theirs)))
    assert found == pytest.approx(exact, rel=error)
    assert found != exact


def soft(temperature):
    return [{"kind": "soft_target", "temperature": temperature}, {"kind": "hard_target"}]


def small_cache(folder, temperature=2.0, teacher_dtype="fp32", data="abc", **options):
    """A cache of a language model's logits only."""
    task, rows = language_task(), sentences()
    online, model = distillation(task, bert(4), bert(2, 16, seed=1), soft(temperature))
    form = CacheFormat(**{"dtype": "fp32", "temperature": temperature, "shard_samples": 4, **options})
    report = write_cache(Teacher(bert(4), teacher_dtype), training_samples(task, rows, data), folder, form)
    return task, rows, online, model, report


def test_top_k_cache_gives_the_loss_of_its_classes_and_the_rest(tmp_path):
    task, rows, online, model, _ = small_cache(tmp_path / "most", top_k=59)
    cached = DistillationTask.around(task, CachedTeacher(tmp_path / "most"), online.terms)
    ours, theirs = (batches(t, rows, [[0, 1, 2, 3]])[0] for t in (online, cached))
    exact = losses(online, model.eval(), ours)
    assert losses(cached, model, theirs) == pytest.approx(exact, rel=1e-5)  # all classes but one, and the rest
    small_cache(tmp_path / "few", top_k=8)
    few = DistillationTask.around(task, CachedTeacher(tmp_path / "few"), online.terms)
    found = losses(few, model, batches(few, rows, [[0, 1, 2, 3]])[0])
    assert 0 < found["soft_target"] < exact["soft_target"]
    assert found["hard_target"] == pytest.approx(exact["hard_target"], rel=1e-5)


def test_terms_unsupported_by_a_top_k_cache_are_refused(tmp_path):
    task, _, online, _, _ = small_cache(tmp_path, top_k=8)
    teacher = CachedTeacher(tmp_path)
    for terms, words in (
        (soft(3.0), "temperature 3, and the rest of the logits in .* is of 2"),
        ([{"kind": "logit"}], "needs all logits, .* has top_k=8"),
        ([{"kind": "hidden_state"}], 'needs the signal "hidden/2", which .* lacks'),
    ):
        with pytest.raises(ValueError, match=words):
            distillation(task, teacher, bert(2, 16, seed=1), terms)
    DistillationTask.around(task, teacher, online.terms)
    with pytest.raises(ValueError, match="top_k must be below the 60 classes, got 60"):
        small_cache(tmp_path / "all", top_k=60)


def test_bytes_per_sample(tmp_path):
    """Close to the size of the data: per masked token 8 x (2 bytes, and 2 for its class) and 4 for the rest."""
    task, rows, _, _, report = small_cache(tmp_path, top_k=8, dtype="bf16", shard_samples=100)
    masked = sum(task.count(task.collator()([row], [i], 0))["token"] for i, row in enumerate(rows))
    assert report.samples == len(rows)
    headers = report.bytes - masked * (8 * 4 + 4)
    assert 0 < headers < 1500
    assert report.bytes == shard_path(tmp_path, 0).stat().st_size
    assert report.bytes_per_sample == report.bytes / len(rows)


def test_cache_works_in_dataloader_workers(tmp_path):
    _, cached, _, rows, _ = make("images", tmp_path)
    sampler = BatchSampler(len(rows), 4, seed=1)
    found = [
        [
            batch
            for step in StepLoader(rows, sampler, cached.collator(training=True), 2, num_workers=workers).epoch(1)
            for batch in step
        ]
        for workers in (0, 2)
    ]
    assert len(found[0]) == len(found[1]) > 2
    for one, other in zip(*found, strict=True):
        for name, value in one[OWN]["signals"].items():
            assert torch.equal(value, other[OWN]["signals"][name])


def write_until(folder, shard):
    """Write a cache in a process that is killed while it writes a given shard."""
    real = caches.save_shard

    def killing_save(path, tensors):
        if path == shard_path(folder, shard):
            path.with_name(f".part-{path.name}").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, tensors)

    caches.save_shard = killing_save
    torch.set_num_threads(1)  # as in the comparing process
    small_cache(folder)


def test_killed_writer_resumes(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    torch.set_num_threads(1)
    assert start(write_until, killed, 2).wait(timeout=200) == -signal.SIGKILL
    assert shard_path(killed, 1).is_file() and not shard_path(killed, 2).is_file()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards: run the command that wrote it again to resume"):
        CachedTeacher(killed)
    first = shard_path(killed, 0).stat().st_mtime_ns
    small_cache(killed)
    small_cache(whole)
    assert shard_path(killed, 0).stat().st_mtime_ns == first
    for shard in range(3):
        assert shard_path(killed, shard).read_bytes() == shard_path(whole, shard).read_bytes()
    assert not list((killed / "shards").glob(".part*"))
    CachedTeacher(killed)


def test_another_cache_is_not_overwritten(tmp_path):
    small_cache(tmp_path)
    with pytest.raises(ValueError, match=r"holds another cache \(dtype: fp32 there, bf16 now\)"):
        small_cache(tmp_path, dtype="bf16")
    with pytest.raises(ValueError, match="teacher_dtype: fp32 there, bf16 now"):
        small_cache(tmp_path, dtype="fp32", teacher_dtype="bf16")
    with pytest.raises(ValueError, match="data: abc there, xyz now"):
        small_cache(tmp_path, data="xyz")
    with pytest.raises(ValueError, match="holds no cache"):
        CachedTeacher(tmp_path / "nothing")
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no cache"):
        CachedTeacher(tmp_path)


def test_cache_of_another_run_is_refused_with_the_difference(tmp_path):
    task, rows, online, _, _ = small_cache(tmp_path)
    teacher = CachedTeacher(tmp_path)
    teacher.check(training_samples(task, rows), online.source.hash)
    teacher.check(training_samples(task, rows))
    for words, arguments in (
        ("teacher .* there, .* now$", (task, rows, "abc", Teacher(bert(4, seed=3)).hash)),
        ("data abc there, xyz now$", (task, rows, "xyz", online.source.hash)),
        ("preprocessing .* now$", (language_task(seed=1), rows, "abc")),
        ("preprocessing .* now$", (task, [{"input_ids": row["input_ids"][:4]} for row in rows], "abc")),
        ("teacher .*; data .*", (task, rows, "xyz", "0")),
    ):
        with pytest.raises(ValueError, match=f"is the cache of another run: {words}"):
            teacher.check(training_samples(*arguments[:3]), *arguments[3:])


def test_changed_teacher_weights_are_reported(tmp_path, monkeypatch):
    task, rows, _, _, _ = small_cache(tmp_path)
    teacher = CachedTeacher(tmp_path)
    teacher.index = replace(teacher.index, name="out/teacher", origin="abc")
    monkeypatch.setattr("hf_tfm.distillation.cache.origin_of", lambda name: "xyz")
    with pytest.raises(ValueError, match="another run: the weights of the teacher out/teacher have changed since"):
        teacher.check(training_samples(task, rows), name="out/teacher")
    with pytest.raises(ValueError, match="another run: teacher out/teacher there, out/other now"):
        teacher.check(training_samples(task, rows), name="out/other")


def test_index_holds_the_teacher_spec(tmp_path):
    _, _, online, _, _ = small_cache(tmp_path)
    assert CachedTeacher(tmp_path).spec == online.source.spec
    assert CacheIndex.load(tmp_path).shards == 3


def test_uncached_samples_are_refused(tmp_path):
    task, rows, online, _, _ = small_cache(tmp_path)
    cached = DistillationTask.around(task, CachedTeacher(tmp_path), online.terms)
    with pytest.raises(ValueError, match=r"sample 10 is not in .*, which has 10 rows"):
        cached.collator()([rows[0]], [10], 0)
    with pytest.raises(ValueError, match="copies, and images on another canvas, are other samples"):
        cached.collator()([rows[0]], [SampleRef(0, 1)], 0)
    other = replace_row(rows, 0, {"input_ids": [2, *range(5, 20), 3]})
    with pytest.raises(ValueError, match='rows of signal "logits" where the batch has'):
        cached.collator()([other[0]], [0], 0)


def replace_row(rows, index, row):
    return [*rows[:index], row, *rows[index + 1 :]]


def test_scenes_are_cached_on_their_canvas(tmp_path):
    """A sampler chooses each sample's canvas; the cache holds the sample only on that canvas."""
    make_task, teacher, student, terms, rows = CASES["detection"]
    task, rows = make_task(), rows()
    numbers = [SampleRef(row, canvas=(64, 64 + 8 * row)) for row in range(5)]  # the sixth row is omitted
    online, model = distillation(task, teacher(), student(), terms[:1])
    names = signals_of(online.terms, "teacher")
    samples = training_samples(online, rows, refs=lambda epoch: numbers)
    write_cache(online.source, samples, tmp_path, CacheFormat(names, dtype="fp32"))
    cached = DistillationTask.around(task, CachedTeacher(tmp_path), online.terms)
    ours, theirs = (t.collator()([rows[1], rows[3]], [numbers[1], numbers[3]], 0) for t in (online, cached))
    assert losses(cached, model.eval(), theirs) == pytest.approx(losses(online, model, ours), rel=1e-5)
    for number in (SampleRef(1, canvas=(64, 128)), 5):
        with pytest.raises(ValueError, match=f"of epoch 0 has the number {key_of(number)}, and in"):
            cached.collator()([rows[sample_ref(number).index]], [number], 0)


def test_unreadable_images_are_not_cached(tmp_path):
    make_task, teacher, student, terms, _ = CASES["images"]
    task, rows = make_task(), image_rows()
    rows[2]["image"]["bytes"] = b"nothing"
    online, model = distillation(task, teacher(), student(), terms)
    names = signals_of(online.terms, "teacher")
    form = CacheFormat(names, dtype="fp32", shard_samples=4)
    write_cache(online.source, training_samples(online, rows), tmp_path, form)
    cached = DistillationTask.around(task, CachedTeacher(tmp_path), online.terms)
    ours, theirs = (batches(t, rows, [[1, 2, 3]])[0] for t in (online, cached))
    assert theirs[OWN]["samples"] == 2
    assert losses(cached, model.eval(), theirs) == pytest.approx(losses(online, model, ours), rel=1e-5)


def test_unsupported_cache_requests_are_refused(tmp_path):
    teacher, rows = Teacher(vit(2)), image_rows()
    mixed = image_task(augmentation=Augmentation(), mixing=Mixing(mixup=0.5))
    with pytest.raises(ValueError, match="mixed with their neighbours cannot be cached"):
        write_cache(teacher, training_samples(mixed, rows), tmp_path)
    for options, words in (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"signals": []}, "signals must name at least one"),
        ({"dtype": "int8"}, 'dtype must be one of fp32, bf16, fp16, got "int8"'),
        ({"refs": lambda epoch: [0, SampleRef(0, 1)]}, "several copies of a sample"),
    ):
        with pytest.raises(ValueError, match=words):
            samples = training_samples(image_task(), rows, refs=options.pop("refs", None))
            write_cache(teacher, samples, tmp_path / "x", CacheFormat(**options))


def test_index_is_plain_json(tmp_path):
    small_cache(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["rows"] == 10 and index["signals"] == ["logits"] and index["facts"]["outputs"] == 60


def test_the_index_of_an_earlier_version_is_read(tmp_path):
    small_cache(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["knobs"] = {**index.pop("options"), "max_length": 7}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert CachedTeacher(tmp_path).index.options["max_length"] == 7
