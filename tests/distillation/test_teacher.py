"""Teachers are frozen and validated before training starts."""

import pickle

import pytest
import torch
from distillation_helpers import bert, classifier, language_task, sentences, training_samples, vit
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_tfm.distillation.cache import write_cache
from hf_tfm.distillation.teacher import Teacher, check_score, load_teacher, origin_of, to_dtype, weights_hash

IDS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def test_teacher_has_no_dropout_and_no_gradients():
    teacher = Teacher(bert(2, hidden_dropout_prob=0.5).train())
    with torch.enable_grad():
        first, second = (teacher.signals({}, {"input_ids": IDS}, ["hidden/2"], None)["hidden/2"] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    teacher.model.train()  # switched to training mode by other code
    assert torch.equal(teacher.signals({}, {"input_ids": IDS}, ["hidden/2"], None)["hidden/2"], first)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_teacher_computes_in_its_own_dtype_under_autocast():
    pixels = torch.randn(2, 3, 16, 16)
    teacher = Teacher(vit(2), "bf16")
    assert teacher.signals({}, {"pixel_values": pixels}, ["logits"], None)["logits"].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Teacher(vit(2)).signals({}, {"pixel_values": pixels}, ["logits"], None)["logits"]
    assert found.dtype == torch.float32
    with pytest.raises(ValueError, match='dtype must be one of fp32, bf16, fp16, got "half"'):
        Teacher(vit(2), "half")
    assert to_dtype("fp16") == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_teacher_may_be_on_another_device():
    teacher = Teacher(bert(2), device="cuda")
    found = teacher.signals({}, {"input_ids": IDS}, ["logits", "score/1"], torch.tensor([3]))
    assert {value.device.type for value in found.values()} == {"cpu"}
    expected = Teacher(bert(2)).signals({}, {"input_ids": IDS}, ["logits", "score/1"], torch.tensor([3]))
    assert all(torch.allclose(found[name], value, atol=1e-4) for name, value in expected.items())


def test_teacher_is_moved_to_its_device():
    assert {p.device.type for p in Teacher(bert(2), device="meta").model.parameters()} == {"meta"}


def test_model_with_a_device_map_is_not_moved():
    model = bert(2)
    model.hf_device_map = {"": "cpu"}
    teacher = Teacher(model, device="meta")
    assert next(teacher.model.parameters()).device.type == "cpu"


def test_hash_is_of_the_weights_as_loaded():
    model = classifier(2)
    first = weights_hash(model)
    assert first == weights_hash(classifier(2)) != weights_hash(classifier(2, seed=1))
    assert Teacher(model, "bf16").hash == first
    with torch.no_grad():
        model.float().classifier.bias[0] += 1e-3
    assert weights_hash(model) != first


def test_teacher_is_loaded_with_the_requested_head(tmp_path):
    model = bert(2)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), AutoModelForMaskedLM, "bf16")
    assert teacher.hash == weights_hash(model) and teacher.model.dtype == torch.bfloat16
    assert load_teacher(str(tmp_path), AutoModel).spec.outputs is None  # the random pooler is not used
    with pytest.raises(ValueError, match=r"lacks the weights classifier\.bias, classifier\.weight .* not trained"):
        load_teacher(str(tmp_path), AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match="give device or device_map, not both, got cpu and auto"):
        load_teacher(str(tmp_path), AutoModelForMaskedLM, device="cpu", device_map="auto")


def test_teacher_may_use_a_device_map(tmp_path):
    bert(2).save_pretrained(tmp_path / "model")
    teacher = load_teacher(str(tmp_path / "model"), AutoModelForMaskedLM, "bf16", device_map={"": "cpu"})
    assert teacher.model.dtype == torch.bfloat16
    assert teacher.signals({}, {"input_ids": IDS}, ["logits"], torch.tensor([3]))["logits"].shape == (1, 60)


def test_teacher_with_offloaded_weights_has_no_hash(tmp_path):
    teacher = Teacher(bert(2).to("meta"))
    assert teacher.hash is None
    with pytest.raises(ValueError, match="has no hash, which a cache needs"):
        write_cache(teacher, training_samples(language_task(), sentences()), tmp_path)


def test_workers_receive_the_teacher_without_its_model():
    teacher = Teacher(bert(2))
    copy = pickle.loads(pickle.dumps(teacher))
    assert not hasattr(copy, "model") and copy.hash == teacher.hash and copy.spec == teacher.spec
    assert copy.attach({}, [], [0], 0, None) == {} and copy.epoch(3) == 3


def test_teacher_below_its_expected_score_is_refused():
    check_score({"accuracy": 0.905, "loss": 0.3}, "accuracy", 0.91)
    check_score({"accuracy": 0.95, "loss": 0.3}, "accuracy", 0.91)
    check_score({"loss": 0.3}, "loss", 0.35)
    with pytest.raises(ValueError, match=r"accuracy is 0\.505 on the validation data and should be 0\.91"):
        check_score({"accuracy": 0.505}, "accuracy", 0.91)
    with pytest.raises(ValueError, match=r"loss is 0\.5"):
        check_score({"loss": 0.5}, "loss", 0.35)
    with pytest.raises(ValueError, match="is nan"):
        check_score({"accuracy": float("nan")}, "accuracy", 0.91)
    with pytest.raises(ValueError, match='metric "f1" is not evaluated; available: accuracy'):
        check_score({"accuracy": 0.9}, "f1", 0.91)


def test_half_precision_teacher_can_be_evaluated():
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = vit(2).eval()(pixels).logits
    found = Teacher(vit(2), "bf16").model(pixel_values=pixels).logits
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_inputs_go_to_the_teacher_device_and_outputs_come_back(monkeypatch):
    """Transfers are recorded instead of carried out."""
    sent = []

    def send(value, device):
        sent.append((type(value).__name__, str(device)))
        return value

    monkeypatch.setattr("hf_tfm.distillation.teacher.send_to_device", send)
    model = classifier(2)
    teacher = Teacher(model)
    Teacher(model)  # wrapping a model twice adds no second hook
    model.register_forward_pre_hook(lambda *_: sent.append("computes"))
    teacher.model(IDS, attention_mask=torch.ones_like(IDS))
    inputs, answer = [("Tensor", "cpu")] * 2, ("SequenceClassifierOutput", "cpu")
    assert sent == [*inputs, *inputs, "computes", answer, answer]
    sent.clear()
    teacher.model.to("meta")(IDS)
    assert [entry for entry in sent if entry[0] == "Tensor"] == [("Tensor", "meta")] * 2 and sent[-1] == answer


def test_teacher_origin_is_known_without_loading_it(tmp_path, monkeypatch):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        bert(1, seed=seed).save_pretrained(tmp_path / name)
    one, same, other = (origin_of(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != other
    (tmp_path / "one" / "model.safetensors").unlink()
    assert origin_of(str(tmp_path / "one")) is None
    configs = {"there": {"_commit_hash": "abc"}}

    def get(name):
        if name not in configs:
            raise OSError("no network")
        return configs[name], {}

    monkeypatch.setattr("hf_tfm.distillation.teacher.PreTrainedConfig.get_config_dict", get)
    assert origin_of("there") == "abc" and origin_of("elsewhere") is None
