"""Usage example of a model card: code that loads and runs the model.

config.json -> Auto class of the model and of its processor -> Markdown
"""

import json
from typing import Any

from transformers.models.auto import modeling_auto

from ..families import FAMILIES
from ..models.configuration_faster_rcnn import TfmFasterRCNNConfig

# Code that follows loading, by Auto class of the model.
OPEN_IMAGE = """

from PIL import Image

image = Image.open("...").convert("RGB")
inputs = processor(images=image, return_tensors="pt")"""
# Without label_ids_to_fuse=set(), transformers merges segments of two classes under one id (5.23).
PANOPTIC_MAP = f"""{OPEN_IMAGE}
outputs = model(**inputs)
sizes = [(image.height, image.width)]
found = processor.post_process_panoptic_segmentation(
    outputs, threshold=0.85, label_ids_to_fuse=set(), target_sizes=sizes
)[0]
print(found["segmentation"])  # segment id of each pixel
for segment in found["segments_info"]:
    print(segment["id"], model.config.id2label[segment["label_id"]], segment["score"])"""
AFTER_LOADING = {
    "AutoModelForTimeSeriesPrediction": """

frames = ...  # uint8, (frames, channels, height, width)
inputs = processor(videos=[frames], return_tensors="pt")
predictions = model(**inputs).predictions  # (1, next frames, channels, height, width), pixels in [0, 1]""",
    "AutoModelForImageClassification": f"""{OPEN_IMAGE}
logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])""",
    "AutoModelForPreTraining": f"""{OPEN_IMAGE}
outputs = model(**inputs)
print(outputs.loss, outputs.mask)""",
    "AutoModelForObjectDetection": f"""{OPEN_IMAGE}
outputs = model(**inputs)
sizes = [(image.height, image.width)]
found = processor.post_process_object_detection(outputs, threshold=0.7, target_sizes=sizes)[0]
for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):
    print(model.config.id2label[label.item()], score.item(), box.tolist())  # left, top, right, bottom in pixels""",
    "AutoModelForUniversalSegmentation": PANOPTIC_MAP,
    "AutoModelForImageSegmentation": PANOPTIC_MAP,
    "AutoModelForMaskedLM": """

inputs = tokenizer(f"... {tokenizer.mask_token} ...", return_tensors="pt")
logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
print(tokenizer.batch_decode(logits.argmax(-1, keepdim=True)))""",
    "AutoModelForCausalLM": """

inputs = tokenizer("...", add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
outputs = model.generate(**inputs, do_sample=True, max_new_tokens=50)
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))""",
    "AutoModelForSequenceClassification": """

inputs = tokenizer("...", return_tensors="pt")  # a pair: tokenizer("...", "...", return_tensors="pt")
logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])""",
    "AutoModelForSeq2SeqLM": """

inputs = tokenizer(["..."], padding=True, return_tensors="pt", return_token_type_ids=False)
outputs = model.generate(**inputs)
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))""",
}

# For detectors whose configuration has an ``nms_threshold`` that the model does not apply itself.
OPEN_IMAGE_FOR_NMS = OPEN_IMAGE.replace("Image\n", "Image\nfrom torchvision.ops import batched_nms\n", 1)
WITHOUT_DUPLICATES = f"""{OPEN_IMAGE_FOR_NMS}
outputs = model(**inputs)
sizes = [(image.height, image.width)]
found = processor.post_process_object_detection(outputs, threshold=0.7, target_sizes=sizes)[0]
kept = batched_nms(found["boxes"], found["scores"], found["labels"], model.config.nms_threshold)
for score, label, box in zip(found["scores"][kept], found["labels"][kept], found["boxes"][kept]):
    print(model.config.id2label[label.item()], score.item(), box.tolist())  # left, top, right, bottom in pixels"""

# For a text model, the pretraining class predicts masked tokens and whether the second segment follows the first.
PRETRAINED_TEXT = """

inputs = tokenizer(f"... {tokenizer.mask_token} ...", "...", return_tensors="pt")
outputs = model(**inputs)
print(tokenizer.batch_decode(outputs.prediction_logits[inputs["input_ids"] == tokenizer.mask_token_id].argmax(-1)))
print(outputs.seq_relationship_logits.softmax(-1))  # the second text follows, or does not"""

# For text regression.
TEXT_NUMBER = """

inputs = tokenizer("...", "...", return_tensors="pt")
print(model(**inputs).logits.item())"""

# For reward models, whose only class has this name.
REWARD = "reward"
REWARD_OF_COMPLETION = """

text = "..." + "..." + tokenizer.eos_token  # prompt and completion
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(model(**inputs).logits.item())"""

# Model class of each model type of transformers, by Auto class.
NATIVE_CLASSES = {
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    "AutoModelForObjectDetection": modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "AutoModelForUniversalSegmentation": modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
}


def usage(config: dict[str, Any], model_id: str) -> str:
    """Return Markdown with code that loads and runs the model described by its config.json."""
    auto_class = loading_class(config)
    carried = "auto_map" in config
    trust = ", trust_remote_code=True" if carried else ""
    of_images = "num_channels" in config
    name, processor = ("processor", "AutoImageProcessor") if of_images else ("tokenizer", "AutoTokenizer")
    if auto_class == "AutoModelForTimeSeriesPrediction":
        processor = "AutoVideoProcessor"
    first, second = sorted((auto_class, processor))
    ours = config["model_type"] in {family.config.model_type for family in FAMILIES}
    code = "\n".join(
        [
            *(["import hf_tfm  # registers the model with transformers"] if ours and not carried else []),
            f"from transformers import {first}, {second}",
            "",
            f"model_id = {json.dumps(model_id)}",
            f"{name} = {processor}.from_pretrained(model_id{trust})",
            f"model = {auto_class}.from_pretrained(model_id{trust})",
        ]
    )
    example = AFTER_LOADING.get(auto_class, "")
    if auto_class == "AutoModelForPreTraining" and not of_images:
        example = PRETRAINED_TEXT
    elif auto_class == "AutoModelForObjectDetection" and leaves_duplicates(config):
        example = WITHOUT_DUPLICATES
    elif auto_class == "AutoModelForSequenceClassification" and config.get("id2label") == {"0": REWARD}:
        example = REWARD_OF_COMPLETION
    elif auto_class == "AutoModelForSequenceClassification" and config.get("problem_type") == "regression":
        example = TEXT_NUMBER
    text = f"```python\n{code}{example}\n```"
    names = (
        "\n\nThe weights are named after this model's modules; `hf-tfm convert` writes them for a stock transformers "
        "class, which needs neither this code nor hf-tfm."
    )
    if not carried:
        return text + names if ours else text
    return (
        f"The repository includes the model's code, so only transformers is required:\n\n{text}\n\n"
        "If hf-tfm is installed, `import hf_tfm` replaces `trust_remote_code=True` and the installed code is used:"
        "\n\n"
        f"```python\nimport hf_tfm\nfrom transformers import {auto_class}\n\n"
        f"model = {auto_class}.from_pretrained(model_id)\n```{names}"
    )


def leaves_duplicates(config: dict[str, Any]) -> bool:
    """Return whether a detector has an ``nms_threshold`` that it does not apply itself."""
    return bool(config.get("nms_threshold")) and config["model_type"] != TfmFasterRCNNConfig.model_type


def loading_class(config: dict[str, Any]) -> str:
    """Return the Auto class for the saved architecture."""
    families = {family.config.model_type: family.auto_classes for family in FAMILIES}
    classes = config.get("auto_map") or families.get(config["model_type"], {})
    architecture = (config.get("architectures") or [""])[0]
    for auto_class, path in classes.items():
        if not (auto_class.isidentifier() and isinstance(path, str)):
            continue  # not valid in a config.json of other origin
        if path.split(".")[-1] == architecture:
            return auto_class
    for auto_class, names in NATIVE_CLASSES.items():
        if names.get(config["model_type"]) == architecture:
            return auto_class
    return "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModel"
