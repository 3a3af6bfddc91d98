"""Push to a Hub over HTTP, then load model, tokenizer, code and card in processes without the package."""

import hashlib
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from hub_helpers import outputs, randomize, run_python, tiny_tokenizer
from safetensors.torch import save_file
from server import TOKEN, HubServer
from test_card import RECORD, write_history

import hf_tfm
from hf_tfm.hub.card import write_card
from hf_tfm.hub.push import files_to_push, push, write_model_id
from hf_tfm.hub.results import RunRecord

# In a separate process, because huggingface_hub reads HF_ENDPOINT when it is imported.
PUSH = """
import json
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from huggingface_hub.errors import HfHubHTTPError

import hf_tfm
from hf_tfm.conversion import convert
from hf_tfm.hub.push import files_to_push, push, write_model_id

commit = push("run", "user/run", private=True, commit_message="A run")
again = push("run", "user/run")
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
model.push_to_hub("user/plain")
tokenizer.push_to_hub("user/plain")
certificate = convert("user/run", "marian", "stock")
push("stock", "user/stock")
hf_tfm.carry_code(False)
model.push_to_hub("user/no-code")
hf_tfm.carry_code(True)

try:
    push("run", "user/denied", token="hf_wrong")
    denied = None
except HfHubHTTPError as error:
    denied = error.response.status_code

rows = [{"en": f"number {i}", "de": f"Nummer {i}"} for i in range(20)]
Dataset.from_list(rows).to_parquet("data/train-00000-of-00001.parquet")
Dataset.from_list(rows[:5]).to_parquet("data/test-00000-of-00001.parquet")
api = HfApi()
api.create_repo("user/pairs", repo_type="dataset")
api.upload_folder(repo_id="user/pairs", repo_type="dataset", folder_path="data", path_in_repo="data")
pairs = load_dataset("user/pairs")
streamed = list(load_dataset("user/pairs", split="train", streaming=True))

print(json.dumps({
    "commit": commit.oid,
    "again": again.oid,
    "denied": denied,
    "certificate": certificate["source"],
    "splits": {name: len(split) for name, split in pairs.items()},
    "rows_equal": list(pairs["train"]) == rows and streamed == rows,
}))
"""

LOAD = """
import contextlib
import io
import json
from safetensors.torch import save_file
from hub_helpers import TEXT, outputs
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
found = {repo: outputs(repo) for repo in ("user/run", "user/plain")}
AutoModelForSeq2SeqLM.from_pretrained("user/run", trust_remote_code=True).push_to_hub("user/again")
AutoTokenizer.from_pretrained("user/run", trust_remote_code=True).push_to_hub("user/again")
found["user/again"] = outputs("user/again")
stock, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("user/stock"), AutoTokenizer.from_pretrained("user/stock")
inputs = tokenizer(TEXT[:2], padding=True, return_tensors="pt", return_token_type_ids=False)
converted = [type(stock).__name__, stock.generate(**inputs, max_new_tokens=8).tolist()]
try:
    AutoModel.from_pretrained("user/no-code", trust_remote_code=True)
    no_code = "loaded"
except ValueError as error:
    no_code = str(error)
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    exec(open("usage.py").read(), {})
print(json.dumps({**found, "converted": converted, "no_code": no_code, "usage": printed.getvalue()}))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process pushes, another one without the package loads; their results, and the server."""
    folder = tmp_path_factory.mktemp("hub")
    run = folder / "run"
    config = hf_tfm.TfmTransformerConfig.of_size(
        "tiny", vocab_size=300, hidden_size=16, intermediate_size=32, num_encoder_layers=2, num_decoder_layers=2
    )
    model, tokenizer = randomize(hf_tfm.TfmTransformerForConditionalGeneration(config)), tiny_tokenizer()
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    write_history(run)
    record = RunRecord.from_dict(RECORD)
    record.save(run)
    (run / "run.json").write_text("{}")  # part of a run's folder that contains local paths
    write_card(run, record)
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"not to be pushed")
    for name in ("history.jsonl.part", "id_rsa", "credentials.json", ".env", "notes.md", "optimizer.bin"):
        (run / name).write_text("not to be pushed")
    (folder / "secret").write_text("not to be pushed")
    (run / "tokenizer.model").symlink_to(folder / "secret")
    with HubServer() as hub:
        pushed = run_python(PUSH, folder, hub.environment(folder / "home-1"))
        card = hub.repositories["models/user/run"].files["README.md"].content.decode()
        clean = folder / "clean"
        clean.mkdir()
        (clean / "usage.py").write_text(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
        before = len(hub.requests)
        loaded = run_python(LOAD, clean, hub.environment(folder / "home-2"), without_package=True)
        yield {"hub": hub, "run": run, "pushed": pushed, "loaded": loaded, "requests": hub.requests[before:]}


@pytest.fixture(scope="module")
def expected(results):
    """Outputs of the pushed model, computed in this process."""
    return outputs(str(results["run"]))


@pytest.mark.parametrize("repo", ["user/run", "user/plain", "user/again"])
def test_loads_bit_equal_without_the_package(results, expected, repo):
    assert results["loaded"][repo] == expected


def test_code_is_included_when_pushed_again(results):
    files = results["hub"].repositories["models/user/again"].files
    assert json.loads(files["config.json"].content)["auto_map"] == hf_tfm.TfmTransformerConfig.auto_classes
    for path in results["run"].glob("*.py"):
        assert files[path.name].content == path.read_bytes()


def test_auto_classes_give_our_classes(expected):
    assert expected["classes"] == [
        "TfmTransformerConfig",
        "TfmTransformerModel",
        "TfmTransformerForConditionalGeneration",
    ]
    assert expected["fast"]


def test_weights_are_uploaded_by_lfs_and_text_as_regular_files(results):
    files = results["hub"].repositories["models/user/run"].files
    by_lfs = {path for path, file in files.items() if file.lfs}
    assert by_lfs == {"model.safetensors", "training_curve.png"}
    assert files["model.safetensors"].content == (results["run"] / "model.safetensors").read_bytes()
    sha256 = files["model.safetensors"].sha256
    requests = results["hub"].requests
    assert ("PUT", f"/lfs/{sha256}") in requests
    assert ("POST", "/lfs/verify") in requests
    assert ("GET", f"/lfs/{sha256}") in results["requests"], "the weights were downloaded from the LFS store"


def test_push_uploads_only_the_model_and_its_metadata(results):
    repository = results["hub"].repositories["models/user/run"]
    assert repository.files.keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "results.json",
        "history.jsonl",
        "training_curve.png",
        ".eval_results/user--sentences.yaml",
        *(path.name for path in results["run"].glob("*.py")),
    }
    assert "modeling_transformer.py" in repository.files
    assert repository.private
    assert results["pushed"]["commit"] == results["pushed"]["again"] == repository.head, "no commit if unchanged"


def test_card_example_names_the_repository_and_runs(results):
    card = results["hub"].repositories["models/user/run"].files["README.md"].content.decode()
    assert 'model_id = "user/run"' in card
    assert results["loaded"]["usage"].startswith("[")


def test_model_converted_from_the_hub_loads_as_a_native_class(results, expected):
    assert results["pushed"]["certificate"]["model"] == "user/run"
    assert results["pushed"]["certificate"]["revision"] == results["pushed"]["commit"]
    assert not [path for path in results["hub"].repositories["models/user/stock"].files if path.endswith(".py")]
    assert results["loaded"]["converted"] == ["MarianMTModel", expected["generated"]]


def test_code_is_not_pushed_if_disabled(results):
    files = results["hub"].repositories["models/user/no-code"].files
    assert not [path for path in files if path.endswith(".py")]
    assert "auto_map" not in json.loads(files["config.json"].content)
    assert "tfm_transformer" in results["loaded"]["no_code"], "the error must name the model type"
    assert "auto_map" in json.loads(results["hub"].repositories["models/user/plain"].files["config.json"].content)


def test_invalid_token_is_refused(results):
    assert results["pushed"]["denied"] == 401
    assert "models/user/denied" not in results["hub"].repositories


def test_data_sets_load_over_http(results):
    assert results["pushed"]["splits"] == {"train": 20, "test": 5}
    assert results["pushed"]["rows_equal"]


def test_server_validates_requests():
    """The other tests rely on this server rejecting invalid requests."""

    def status(method: str, url: str, content: bytes = b"", token: str | None = None) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(url, data=content, method=method, headers=headers)
        try:
            return opener.open(request).status
        except urllib.error.HTTPError as error:
            return error.code

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    good = hashlib.sha256(b"weights").hexdigest()
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": good, "size": 7}]}
    lines = [{"key": "header", "value": {"summary": "x"}}]
    lines += [{"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": good, "size": 7}}]
    commit = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with HubServer() as hub:
        create, api = f"{hub.url}/api/repos/create", f"{hub.url}/api/models/user/name"
        new = json.dumps({"name": "name", "organization": "user", "visibility": "private"}).encode()
        assert status("POST", create, new) == 401
        assert status("POST", create, new, TOKEN) == 200
        assert status("POST", create, new, TOKEN) == 409
        assert (status("GET", api), status("GET", api, token=TOKEN)) == (404, 200)
        assert status("POST", f"{api}/commit/main", commit, TOKEN) == 400, "the object was not uploaded"
        assert status("PUT", f"{hub.storage_url}/lfs/{good}", b"weights") == 403, "the upload was not announced"
        assert (
            status("POST", f"{hub.url}/user/name.git/info/lfs/objects/batch", json.dumps(batch).encode(), TOKEN) == 200
        )
        assert status("PUT", f"{hub.storage_url}/lfs/{good}", b"weighty") == 400, "another sha256"
        assert status("PUT", f"{hub.storage_url}/lfs/{good}", b"weights", TOKEN) == 400, "the token leaked"
        assert status("PUT", f"{hub.storage_url}/lfs/{good}", b"weights") == 200
        assert status("POST", f"{api}/commit/main", commit, TOKEN) == 200
        assert hub.repositories["models/user/name"].files["w.bin"].lfs


def saved_model(folder):
    """A native model's folder with dummy weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_pushed_files_are_selected_by_name(tmp_path):
    folder = saved_model(tmp_path / "run")
    taken = ["config.json", "model.safetensors", "README.md", "vocab.txt", "parity_certificate.json"]
    left = [
        "id_rsa",
        "credentials.json",
        ".env",
        "my.png",
        "pytorch_model.bin",
        "modeling_vit.py",
        "run.json",
        "a.yaml",
    ]
    taken.append("attention.png")  # shown in the card
    for name in (*taken[2:], *left):
        (folder / name).write_text("![maps](attention.png) ![](../my.png)")
    for name in ("checkpoints", ".eval_results", "predictions"):
        (folder / name).mkdir()
        (folder / name / "data.yaml").touch()
        (folder / name / "key.pem").touch()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (folder / "merges.txt").symlink_to(folder / "vocab.txt")
    names, left_out = files_to_push(folder)
    assert names == sorted([*taken, "merges.txt", ".eval_results/data.yaml"])
    folders = ["checkpoints", "predictions", ".eval_results/key.pem"]
    assert sorted(left_out) == sorted([*left, *folders, "tokenizer.json"])


def test_custom_code_is_pushed_with_its_siblings_only(tmp_path):
    folder = saved_model(tmp_path / "run")
    config = {"model_type": "tfm_vit", "auto_map": {"AutoModel": "modeling_vit.TfmViTModel", "AutoConfig": "../x.Y"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_vit.py").write_text("import os\nfrom .layers import Layer\n")
    for name in ("layers.py", "mine.py"):
        (folder / name).touch()
    names, left_out = files_to_push(folder)
    assert names == ["config.json", "layers.py", "model.safetensors", "modeling_vit.py"] and left_out == ["mine.py"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(ValueError, match=r"names code \(auto_map\) for transformers' own model type \"vit\""):
        files_to_push(folder)


def test_card_is_changed_in_one_place_and_never_truncated(tmp_path, monkeypatch):
    text = '---\r\n---\r\nmodel_id = "run"\nümlaut\n'.encode()
    card = tmp_path / "README.md"
    card.write_bytes(text)

    def broken(self, content):
        self.touch()
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_bytes", broken)
        write_model_id(card, "user/run")
    assert card.read_bytes() == text
    write_model_id(card, "user/run")
    assert card.read_bytes() == text.replace(b'"run"', b'"user/run"')


def test_invalid_repository_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match='repo_id must be the name of a repository, "user/name", got "a/b/c"'):
        push(saved_model(tmp_path / "run"), "a/b/c")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        push(tmp_path / "missing", "user/name")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        push(tmp_path, "user/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"it has no weights \(\*\.safetensors\)"):
        push(tmp_path, "user/name")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"names model-00002-of-00002\.safetensors, which does not exist"):
        push(tmp_path, "user/name")
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is damaged"):
        push(tmp_path, "user/name")
