"""Image tasks: a step does not depend on micro-batching, and a sample does not depend on where it is loaded."""

import io
import pickle

import numpy as np
import pytest
import torch
from image_tasks import (
    AUGMENTATION,
    CASES,
    PROCESSOR,
    classification,
    equal,
    evaluation_loader,
    examples,
    mae_config,
    masked,
    photo,
    tiny_mae,
    tiny_vit,
    training_loader,
)
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import ViTImageProcessor

from hf_tfm import TfmMAEForPreTraining
from hf_tfm.data.augment import Mixing, mix
from hf_tfm.data.batching import SampleRef
from hf_tfm.data.pixels import Pixels, image_processor
from hf_tfm.tasks.image_classification import IGNORE_LABEL, ImageClassificationArguments
from hf_tfm.tasks.masked_image import MaskedImageTask
from hf_tfm.training import evaluate


def gradients(task, model, micro_batches):
    """Gradient of a step computed as in `train_step`, from loss sums divided by global counts; and the losses."""
    model.zero_grad()
    counts, losses = {}, {}
    for batch in micro_batches:
        for term, count in task.count(batch).items():
            counts[term] = counts.get(term, 0) + count
    for batch in micro_batches:
        means = {term: value / counts[term] for term, value in task.losses(model, batch).items()}
        sum(means.values()).backward()
        losses = {term: losses.get(term, 0.0) + value.item() for term, value in means.items()}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, losses, counts


def logits_of(task, model, batch):
    return model(**task.inputs(batch)).logits


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


GIVEN = {"dataset_name": "digits", "output_dir": ".", "max_steps": 1, "learning_rate": 0.1}


# --- a step equals one batch


@pytest.mark.parametrize("bad", [(), (1, 4, 5)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_micro_batches_and_ranks_equal_one_batch(name, ranks, bad):
    """With augmentation, mixing, label smoothing, masks and unreadable images."""
    make, build = CASES[name]
    rows, model, task = examples(bad=bad), build().train(), make()
    whole = [gradients(task, model, step) for step in training_loader(task, rows).epoch(0)]
    parts = [list(training_loader(task, rows, 6, 2, rank, ranks).epoch(0)) for rank in range(ranks)]
    assert len(whole) == 2
    for number, (expected, losses, counts) in enumerate(whole):
        step = [batch for part in parts for batch in part[number]]
        assert len(step) == (4 if ranks == 2 else 3)  # of two ranks, one has two pairs and the other one
        found, found_losses, found_counts = gradients(task, model, step)
        assert found_counts == counts
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert largest_difference(found, expected) < 1e-6
        assert max(value.abs().max() for value in expected.values()) > 1e-3


def test_averaging_micro_batch_means_gives_another_gradient():
    """The usual accumulation differs where a micro-batch has lost an image, so the test above can fail."""
    rows, model, task = examples(bad=(1, 4, 5)), tiny_vit(), classification()
    (step, *_) = training_loader(task, rows, micro=2).epoch(0)
    right = gradients(task, model, step)[0]
    model.zero_grad()
    for batch in step:
        (task.losses(model, batch)["label"] / max(1, task.count(batch)["label"]) / len(step)).backward()
    assert largest_difference(right, {n: p.grad for n, p in model.named_parameters()}) > 1e-3


@pytest.mark.parametrize("name", list(CASES))
def test_dummy_batch_has_no_effect(name):
    make, build = CASES[name]
    task, model = make(), build()
    for collate in (task.collator(training=True), task.collator()):
        batch = collate(examples(2), [0, 1], epoch=0, is_dummy=True)
        assert batch["images"] == 0 and set(task.count(batch).values()) == {0} and batch["bad"] == []
        losses = task.losses(model, batch)
        assert losses.keys() == task.count(batch).keys() and all(loss.item() == 0.0 for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


# --- a sample is a function of (seed, epoch, index)


@pytest.mark.parametrize("name", list(CASES))
def test_samples_do_not_depend_on_workers_resuming_or_neighbours(name):
    task, rows = CASES[name][0](), examples()
    first = list(training_loader(task, rows).epoch(3))
    torch.manual_seed(9), np.random.seed(9)
    assert equal(first, list(training_loader(CASES[name][0](), rows, num_workers=2).epoch(3)))
    assert equal(first[1:], list(training_loader(task, rows).epoch(3, start=1)))
    assert not equal(first, list(training_loader(task, rows).epoch(4)))
    alone = {}
    for steps in training_loader(task, rows, batch_size=2, micro=2).epoch(3):
        for batch in steps:
            alone |= {int(i): image for i, image in zip(batch["indices"], batch["pixel_values"], strict=True)}
    assert len(alone) == 12
    for (batch,) in first:
        assert all(torch.equal(alone[int(i)], x) for i, x in zip(batch["indices"], batch["pixel_values"], strict=True))


@pytest.mark.parametrize("name", list(CASES))
def test_tasks_can_be_sent_to_spawned_workers(name):
    made = [CASES[name][0]().collator(training=True) for _ in range(2)]
    collate = pickle.loads(pickle.dumps(made[0]))
    assert equal(*(one(examples(2), [0, 1], 0) for one in (collate, made[1])))


def test_seed_epoch_and_copy_change_a_sample():
    task, rows = classification(), examples(2)
    of = {
        key: seeded.collator(training=True)(rows, indices, epoch)["pixel_values"]
        for key, seeded, indices, epoch in (
            ("first", task, [0, 1], 0),
            ("epoch", task, [0, 1], 1),
            ("seed", classification(seed=1), [0, 1], 0),
            ("copy", task, [SampleRef(0, 1), SampleRef(1, 1)], 0),
        )
    }
    assert len({value.numpy().tobytes() for value in of.values()}) == 4


def test_repeated_augmentation_gives_different_views_of_an_image():
    task, rows = classification(mixing=None), examples()
    for (batch,) in training_loader(task, rows, repeats=3).epoch(0):
        photos = {image.numpy().tobytes() for image in batch["pixel_values"]}
        assert len(photos) == 6 and len(set(batch["indices"].tolist())) == 2


# --- the image processor is the only source of size, mean and standard deviation


@pytest.mark.parametrize(
    "processor",
    [
        PROCESSOR,
        image_processor((12, 20)),
        image_processor(24, resize=24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        ViTImageProcessor(size={"height": 16, "width": 16}),
        ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
        ViTImageProcessor(size={"height": 16, "width": 16}, do_rescale=False, image_mean=[9.0] * 3),
    ],
)
def test_evaluation_images_match_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    pixels = Pixels(ViTImageProcessor.from_pretrained(tmp_path))
    image = Image.open(io.BytesIO(photo(0)))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = pixels.scale(pixels.resize(tensor)[None])
    assert found.shape[2:] == pixels.size
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_training_images_have_the_processor_size():
    model = TfmMAEForPreTraining(mae_config(image_size=[12, 20]))
    task = MaskedImageTask.for_model(model, image_processor((12, 20)), augmentation=AUGMENTATION)
    assert task.collator(training=True)(examples(2), [0, 1], 0)["pixel_values"].shape == (2, 3, 12, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Pixels(ViTImageProcessor(size={"shortest_edge": 16})),
            "images of a fixed height and width, got size",
        ),
        (lambda: Pixels(object()), "one of transformers' torchvision ones, got object"),
        (lambda: Pixels(ViTImageProcessor(resample=1)), "nearest, bilinear or bicubic, got 1"),
        (lambda: image_processor(32, resize=24), "resize must be at least the size 32, got 24"),
        (lambda: masked(mask_ratio=0.0).collator(), "mask_ratio=0.0 hides none of 16 patches"),
        (
            lambda: masked(patch_size=3, image_size=15).collator(),
            "the processor's size must be a multiple of the patch",
        ),
        (
            lambda: ImageClassificationArguments(**GIVEN, label_smoothing=1.0),
            r"label_smoothing must be in \[0, 1\), got 1.0",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- unreadable images


@pytest.mark.parametrize("name", list(CASES))
def test_bad_image_is_dropped_and_the_others_are_kept(name):
    task = CASES[name][0]()
    good = task.collator(training=True)(examples(6), list(range(6)), epoch=2)
    batch = task.collator(training=True)(examples(6, bad=(3,)), list(range(6)), epoch=2)
    kept = [0, 1, 2, 4, 5]
    assert batch["bad"][0][0] == 3 and batch["bad"][0][1].startswith("3.jpg: OSError")
    assert batch["images"] == 5 and batch["indices"].tolist() == kept
    assert torch.equal(batch["pixel_values"], good["pixel_values"][kept])
    if name == "classification":
        assert batch["partner"].tolist() == [1, 0, 2, 4, 3]  # the neighbour of the bad image is unchanged
        assert torch.equal(batch["box"], good["box"][kept])
    else:
        assert torch.equal(batch["noise"], good["noise"][kept])


@pytest.mark.parametrize("name", list(CASES))
def test_batch_of_bad_images_becomes_a_dummy_batch(name):
    make, build = CASES[name]
    task = make()
    batch = task.collator(training=True)(examples(2, bad=(0, 1)), [0, 1], epoch=0)
    assert [index for index, _ in batch["bad"]] == [0, 1]
    assert batch["images"] == 0 and set(task.count(batch).values()) == {0}
    assert all(loss.item() == 0.0 for loss in task.losses(build(), batch).values())


# --- classification


def test_loss_of_mixed_targets():
    """Expected loss: soft, smoothed targets against the logits of mixed images."""
    task, model = classification(), tiny_vit().train()
    batch = task.collator(training=True)(examples(6), list(range(6)), epoch=0)
    one_hot = torch.nn.functional.one_hot(batch["labels"], 5).float()
    share = batch["share"][:, None]
    target = (1 - share) * one_hot + share * one_hot[batch["partner"]]
    target = 0.9 * target + 0.1 / 5
    pixels = task.pixels.scale(batch["pixel_values"])
    logits = model(pixel_values=mix(pixels, batch["partner"], batch["share"], batch["box"])).logits
    expected = -(target * logits.log_softmax(dim=1)).sum()
    assert task.losses(model, batch)["label"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert ((batch["share"] > 0.05) & (batch["share"] < 0.95)).any()
    assert (batch["box"][:, 1] > 0).any() and (batch["box"][:, 1] == 0).any()  # both CutMix and mixup occur


def test_evaluation_uses_no_smoothing_or_mixing():
    task, model = classification(), tiny_vit().eval()
    batch = task.collator()(examples(6), list(range(6)), epoch=0)
    assert batch.keys() == {"pixel_values", "images", "indices", "bad", "labels"}
    logits = model(pixel_values=task.pixels.scale(batch["pixel_values"])).logits
    expected = cross_entropy(logits, batch["labels"], reduction="sum")
    assert task.losses(model, batch)["label"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("mixing", [None, Mixing(mixup=0.8)])
def test_images_without_a_label_are_not_counted(mixing):
    task, model, rows = classification(mixing=mixing), tiny_vit().train(), examples(4)
    rows[1]["label"], rows[2]["label"] = None, -1
    batch = task.collator(training=True)(rows, list(range(4)), epoch=0)
    assert batch["labels"].tolist() == [0, IGNORE_LABEL, IGNORE_LABEL, 3]
    assert task.count(batch) == {"label": 2}
    logits = logits_of(task, model, batch)
    expected = cross_entropy(logits[[0, 3]], torch.tensor([0, 3]), label_smoothing=0.1, reduction="sum")
    assert task.losses(model, batch)["label"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_unknown_label_is_refused():
    rows = examples(3)
    rows[2]["label"] = "z"
    with pytest.raises(ValueError, match="label 'z' of image 7 is not a class of the model"):
        classification().collator()(rows, [5, 6, 7], epoch=0)


def test_predictions_cover_every_image_once(accelerator):
    task, model, rows = classification(), tiny_vit().train(), examples(11, bad=(4,))
    rows[2]["label"] = None
    task.accelerator = accelerator
    result = task.predict(model, evaluation_loader(task, rows))
    assert model.training  # the mode is restored
    model.eval()
    expected = [i for i in range(11) if i != 4]
    assert result.indices.tolist() == expected
    logits = torch.cat([logits_of(task, model, task.collator()([rows[i]], [i], 0)) for i in expected])
    assert result.top.tolist() == logits.topk(5).indices.tolist()
    assert result.labels.tolist() == [IGNORE_LABEL if i == 2 else i % 5 for i in expected]
    loss = cross_entropy(logits, torch.from_numpy(result.labels)).item()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert evaluate(accelerator, task, model, evaluation_loader(task, rows))["loss"] == pytest.approx(loss, rel=1e-5)


def test_nothing_to_predict(accelerator):
    task = classification()
    task.accelerator = accelerator
    with pytest.raises(ValueError, match="no image that can be read"):
        task.predict(tiny_vit(), evaluation_loader(task, examples(2, bad=(0, 1))))


# --- masked images


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_equals_the_model_loss(norm_pix_loss):
    task, model = masked(norm_pix_loss=norm_pix_loss), tiny_mae(norm_pix_loss=norm_pix_loss)
    batch = task.collator(training=True)(examples(6), list(range(6)), epoch=0)
    output = model(pixel_values=task.pixels.scale(batch["pixel_values"]), noise=batch["noise"])
    count = task.count(batch)["patch"]
    assert count == int(output.mask.sum()) == 6 * 12
    assert task.losses(model, batch)["patch"].item() / count == pytest.approx(output.loss.item(), rel=1e-6)


def test_masks_differ_by_sample_and_epoch_but_not_between_evaluations(accelerator):
    task, model, rows = masked(), tiny_mae(), examples(6)
    noise = [task.collator(training=True)(rows, list(range(6)), epoch)["noise"] for epoch in (0, 1, 0)]
    assert torch.equal(noise[0], noise[2]) and not (noise[0] == noise[1]).any()
    assert len({row.numpy().tobytes() for row in noise[0]}) == 6
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(evaluate(accelerator, task, model, evaluation_loader(task, rows)))
    assert values[0] == values[1]
