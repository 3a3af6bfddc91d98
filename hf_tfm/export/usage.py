"""README.md of an exported model: its certificate, and code that runs it without this package or torch models.

config.json, certificate -> Markdown
"""

from typing import Any

from ..hub.portable import code, plain
from ..hub.usage import loading_class

# Code that defines `load(name)`, which returns a function of a graph's inputs; arrays are numpy's.
LOADERS = {
    "onnx": """
import onnxruntime


def load(name):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    inputs = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]
    return lambda **arrays: dict(zip(outputs, session.run(None, {name: arrays[name] for name in inputs})))
""",
    "openvino": """
import openvino


def load(name):
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # without it, some CPUs compute in bfloat16
    model = openvino.Core().compile_model(f"{folder}/openvino_{name}.xml", "CPU", exact)
    inputs = [port.any_name for port in model.inputs]
    return lambda **arrays: {
        port.any_name: value for port, value in model({name: arrays[name] for name in inputs}).items()
    }
""",
    "executorch": """
import torch
from executorch.runtime import Runtime


def load(name):
    method = Runtime.get().load_program(f"{folder}/{name}.pte").load_method("forward")
    inputs, outputs = graphs[name]["inputs"], graphs[name]["outputs"]

    def run(**arrays):
        tensors = method.execute([torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in inputs])
        return {name: tensor.numpy().copy() for name, tensor in zip(outputs, tensors)}

    return run
""",
}
PADDED = """
inputs = tokenizer(["...", "... ..."], padding=True, return_tensors="np")
"""
OPEN_IMAGE = """
image = Image.open("...").convert("RGB")
inputs = {name: tensor.numpy() for name, tensor in processor(images=image, return_tensors="pt").items()}
"""
LABEL = """
outputs = load("model")(**inputs)
names = json.load(open(f"{folder}/config.json"))["id2label"]
print([names[str(number)] for number in outputs["logits"].argmax(-1)])
"""
GENERATE = {
    "decoder": """
tokenizer.padding_side = "left"
inputs = tokenizer(["...", "... ..."], padding=True, add_special_tokens=False, return_tensors="np")
decoder, graph = load("model"), graphs["model"]
ids, mask = inputs["input_ids"], inputs["attention_mask"]
past = {  # empty keys and values
    name: np.zeros([{"batch": len(ids), "past_length": 0}.get(size, size) for size in shape], "float32")
    for name, shape in graph["inputs"].items()
    if name.startswith("past_")
}
tokens = []
for _ in range(20):
    outputs = decoder(input_ids=ids, attention_mask=mask, **past)
    past = {name.replace("present", "past"): value for name, value in outputs.items() if name.startswith("present")}
    ids = outputs["logits"][:, -1:].argmax(-1)
    mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    tokens.append(ids)
print(tokenizer.batch_decode(np.concatenate(tokens, axis=1)))
""",
    "encoder_decoder": """
config = json.load(open(f"{folder}/config.json"))
inputs = tokenizer(["...", "... ..."], padding=True, return_tensors="np")
encoder, decoder, graph = load("encoder"), load("decoder"), graphs["decoder"]
ids, mask = inputs["input_ids"], inputs["attention_mask"]
memory = encoder(input_ids=ids, attention_mask=mask)  # the first state too, for a recurrent decoder
past = {
    name: np.zeros([{"batch": len(ids), "past_length": 0}.get(size, size) for size in shape], "float32")
    for name, shape in graph["inputs"].items()
    if name.startswith("past_")
}
outputs, ids = memory, np.full((len(ids), 1), config["decoder_start_token_id"])
tokens = [ids]
for _ in range(20):
    past |= {name.replace("present", "past"): value for name, value in outputs.items() if name.startswith("present")}
    outputs = decoder(**{"decoder_input_ids": ids, "attention_mask": mask, **memory, **past})
    ids = outputs["logits"][:, -1:].argmax(-1)
    tokens.append(ids)
ends = config["eos_token_id"]
for row in np.concatenate(tokens, axis=1):
    row = row[: np.append(row == ends, True).argmax()]
    print(tokenizer.decode(row, skip_special_tokens=True))
""",
    "mask_predict": """
config = json.load(open(f"{folder}/config.json"))
inputs = tokenizer(["...", "... ..."], padding=True, return_tensors="np")
mask = inputs["attention_mask"]
memory = load("encoder")(**inputs)
lengths = mask.sum(1) + memory["length_logits"].argmax(-1) - config["max_length_offset"]
target_mask = (np.arange(max(1, lengths.max())) < lengths[:, None]).astype("int64")
ids = np.where(target_mask == 1, config["mask_token_id"], config["pad_token_id"])
outputs = load("decoder")(  # one pass; more of them refine the least sure tokens
    decoder_input_ids=ids, decoder_attention_mask=target_mask, attention_mask=mask, memory=memory["memory"]
)
print(tokenizer.batch_decode(np.where(target_mask == 1, outputs["logits"].argmax(-1), config["pad_token_id"])))
""",
}
BOXES = """
outputs = load("model")(**inputs)
found = SimpleNamespace(**{name: torch.from_numpy(outputs[name]) for name in ("logits", "pred_boxes")})
sizes = [(image.height, image.width)]
names = json.load(open(f"{folder}/config.json"))["id2label"]
for result in processor.post_process_object_detection(found, threshold=0.7, target_sizes=sizes):
    for score, label, box in zip(result["scores"], result["labels"], result["boxes"]):
        print(names[str(label.item())], score.item(), box.tolist())  # left, top, right, bottom in pixels
"""
SHAPES = """
outputs = load("model")(**inputs)
print({name: array.shape for name, array in outputs.items()})
"""
MASKED = """
inputs = tokenizer([f"... {tokenizer.mask_token} ..."], return_tensors="np")
outputs = load("model")(**inputs)
scores = outputs.get("logits", outputs.get("prediction_logits"))
print(tokenizer.batch_decode(scores[inputs["input_ids"] == tokenizer.mask_token_id].argmax(-1)[:, None]))
"""
NOISE = """
graph = graphs["model"]
inputs["noise"] = np.random.rand(1, graph["inputs"]["noise"][1]).astype("float32")  # which patches are masked
"""
VIDEO = """
frames = ...  # uint8, (frames, channels, height, width)
inputs = {name: tensor.numpy() for name, tensor in processor(videos=[frames], return_tensors="pt").items()}
"""
GRAPHS = 'graphs = json.load(open(f"{folder}/parity_certificate.json"))["graphs"]\n'


def example_code(config: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Return Python code that runs an exported model from the current folder."""
    to, auto_class, graphs = certificate["target"]["format"], loading_class(config), certificate["graphs"]
    inputs = next(iter(graphs.values()))["inputs"]
    imports = ["import json"]
    if "pixel_values_videos" in inputs:
        processor, after = "AutoVideoProcessor", VIDEO + SHAPES
    elif "pixel_values" in inputs:
        processor = "AutoImageProcessor"
        boxes = {"AutoModelForObjectDetection": BOXES, "AutoModelForImageClassification": LABEL}.get(
            auto_class, SHAPES
        )
        after = OPEN_IMAGE + (NOISE if "noise" in inputs else "") + boxes
        if "SimpleNamespace" in after:
            imports.append("from types import SimpleNamespace")
    else:
        processor, after = "AutoTokenizer", text_code(config, auto_class, graphs)
    libraries = ["import numpy as np"]
    if "SimpleNamespace" in after and to != "executorch":
        libraries.append("import torch")
    if "Image.open" in after:
        libraries.append("from PIL import Image")
    libraries.append(f"from transformers import {processor}")
    name = "tokenizer" if processor == "AutoTokenizer" else "processor"
    needs_graphs = GRAPHS if "graphs[" in after + LOADERS[to] else ""
    loader = LOADERS[to].strip("\n")
    imported, rest = loader.split("\n\n", 1)
    libraries += [line for line in imported.splitlines() if line not in libraries]
    head = "\n".join([*imports, "", *sorted(libraries, key=lambda line: (line.startswith("from"), line))])
    setup = f'folder = "."\n{needs_graphs}{name} = {processor}.from_pretrained(folder)'
    return f"{head}\n\n{setup}\n\n{rest.strip()}\n\n{after}".rstrip() + "\n"


def text_code(config: dict[str, Any], auto_class: str, graphs: dict[str, Any]) -> str:
    """Return code that runs a text model after its tokenizer is loaded."""
    if "encoder" in graphs:
        return GENERATE["mask_predict" if config.get("decoding") == "mask_predict" else "encoder_decoder"]
    if any(name.startswith("past_") for name in graphs["model"]["inputs"]):
        return GENERATE["decoder"]
    if auto_class in ("AutoModelForMaskedLM", "AutoModelForPreTraining"):
        return MASKED
    if auto_class == "AutoModelForMultipleChoice":
        choices = '\ninputs = tokenizer(["...", "..."], ["...", "..."], padding=True, return_tensors="np")\n'
        return choices + "inputs = {name: array[None] for name, array in inputs.items()}\n" + SHAPES
    if auto_class == "AutoModelForSequenceClassification" and config.get("problem_type") != "regression":
        return PADDED + LABEL
    if "decoder_input_ids" in graphs["model"]["inputs"]:
        return PADDED + 'inputs |= {f"decoder_{name}": array for name, array in inputs.items()}\n' + SHAPES
    return PADDED + SHAPES


def card(config: dict[str, Any], certificate: dict[str, Any], name: str) -> str:
    """Return README.md of an exported model.

    Args:
        name: of the model.
    """
    target, source = certificate["target"], certificate["source"]
    graphs = [
        f"| {code(graph['file'])} | {signature(graph['inputs'])} | {', '.join(map(code, graph['outputs']))} |"
        for graph in certificate["graphs"].values()
    ]
    checked = [f"largest difference of {code(key)}: {value:.2g}" for key, value in certificate["differences"].items()]
    if "same_predictions" in certificate:
        checked.append(f"share of equal predictions: {certificate['same_predictions']:.4g}")
    if "greedy_tokens_equal" in certificate:
        checked.append(f"greedily generated tokens equal: {'yes' if certificate['greedy_tokens_equal'] else 'no'}")
    kind = f", {target['quantize']} 8-bit quantisation" if target["quantize"] else ""
    packages = " ".join(sorted({*PACKAGES[target["format"]], "transformers"}))
    return "\n".join(
        [
            "---",
            f"library_name: {target['format']}",
            f"tags: [hf-tfm, {target['format']}]",
            "---",
            "",
            f"# {plain(name)}",
            "",
            f"{code(source['class'])} of {code(source['model'])}, exported with hf-tfm to {target['format']}{kind}.",
            "",
            "| file | inputs | outputs |",
            "| --- | --- | --- |",
            *graphs,
            "",
            "Axes with a name may have any size"
            + (", up to the limits of the export" if target["format"] == "executorch" else "")
            + ". Compared with the model in torch, in float32, on batches of "
            f"{', '.join(str(len(rows)) for rows in certificate['batches'])} rows of different lengths:",
            "",
            *(f"- {line}" for line in checked),
            "",
            f"Needs `pip install {packages}`; hf-tfm is not needed:",
            "",
            "```python",
            example_code(config, certificate).rstrip(),
            "```",
            "",
        ]
    )


PACKAGES = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
}


def signature(inputs: dict[str, list[Any]]) -> str:
    """Describe the inputs of a graph; layers of a cache as one."""
    found = {}
    for name, shape in inputs.items():
        layer = name.rpartition("_")[2]
        label = f"{name.rpartition('_')[0]}_*" if layer.isdigit() else name
        found[label] = f"{code(label)} ({', '.join(map(str, shape))})"
    return ", ".join(found.values())
