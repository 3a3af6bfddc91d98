"""`hf-tfm launch`: what it prints is read by each launcher's own parser, and a Slurm script runs under a stub."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from huggingface_hub import HfApi
from huggingface_hub.cli._cli_utils import parse_volumes
from huggingface_hub.cli.hf import app
from recipe_helpers import ROOT, command_line, environment, history, record, run_recipe, write_data
from safetensors.torch import load_file

from hf_tfm.launch.main import main
from hf_tfm.launch.options import parse
from hf_tfm.launch.submissions import LAUNCHERS, strategy_environment

FOLDER = ROOT / "recipes" / "launch"
RECIPE = ("translation_train", "--config", "quickstart")
GENERATED = [*sorted(set(FOLDER.glob("*.*")) - set(FOLDER.glob("*.yaml"))), FOLDER / "trainjob.yaml"]
IN_VOLUME = (*RECIPE, "--output_dir", "/runs/a b")
K8S = ("--on", "k8s", "--image", "registry/image:1", "--volume", "claim:/runs")
JOBS = ("--on", "jobs", "--image", "image", "--volume", "hf://buckets/me/runs:/runs", "--flavor", "a100x4")


def submission(*argv: str):
    launch = parse([*argv])
    return LAUNCHERS[launch.options.on](launch)


# --- files and their parsers


@pytest.mark.parametrize("file", GENERATED, ids=lambda file: file.name)
def test_generated_files_are_those_of_their_command(file):
    text = file.read_text()
    command = re.search(r"^# hf-tfm launch (.*)$", text, re.MULTILINE)[1]
    assert submission(*shlex.split(command)).text + "\n" == text, f"hf-tfm launch {command} > {file}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp", "zero2", "zero3"])
def test_environment_is_that_of_accelerate_launch(strategy):
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{strategy}.yaml"), "recipe.py"])
    args.main_process_ip, args.machine_rank, args.main_process_port = "localhost", 1, 0
    args, _defaults, _ = _validate_launch_command(args)
    if strategy.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ""
        _, wanted = prepare_deepspeed_cmd_env(args)
    else:
        wanted = prepare_multi_gpu_env(args)
    found = strategy_environment(strategy, args.num_machines, args.num_processes // args.num_machines)
    assert found == {name: wanted[name] for name in found}
    assert bool(found) == (strategy != "ddp")
    switches = {name for name, value in wanted.items() if name.startswith("ACCELERATE_USE_") and value == "true"}
    assert switches <= found.keys()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reads_its_stage(stage):
    options = yaml.safe_load((FOLDER / f"zero{stage}.yaml").read_text())["deepspeed_config"]
    zero = {
        "stage": options["zero_stage"],
        "offload_optimizer": {"device": options["offload_optimizer_device"]},
        "offload_param": {"device": options["offload_param_device"]},
    }
    config = HfDeepSpeedConfig({"zero_optimization": zero})
    assert config.is_zero2() == (stage == 2) and config.is_zero3() == (stage == 3) and not config.is_offload()
    runtime = pytest.importorskip("deepspeed.runtime.zero.config")
    assert runtime.DeepSpeedZeroConfig(**zero).stage == stage


# Directives of sbatch that we write -> their form.
SBATCH = {
    "job-name": r"[a-z0-9-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"1",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+-\d\d:\d\d:\d\d",
    "partition": r"\w+",
    "account": r"\w+",
    "qos": r"\w+",
    "signal": r"B:TERM@\d+",
    "output": r"%x-%j\.log",
    "open-mode": r"append",
    "requeue": r"",
}


def directives(script: str) -> dict[str, str]:
    """Read directives as sbatch does: only those before the first command count."""
    found = {}
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert re.fullmatch(SBATCH[name], value), line
            found[name] = value
        elif line and not line.startswith("#"):
            break
    assert len(found) == script.count("#SBATCH")
    return found


def test_slurm_directives():
    own = (
        "--time",
        "1-12:00:00",
        "--partition",
        "p",
        "--account",
        "a",
        "--qos",
        "q",
        "--cpus",
        "32",
        "--grace",
        "300",
    )
    script = submission("--on", "slurm", "--gpus", "4", *own, *RECIPE).text
    found = directives(script)
    assert found.keys() == SBATCH.keys()
    assert (found["time"], found["signal"], found["gpus-per-node"]) == ("1-12:00:00", "B:TERM@300", "4")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    args = torch.distributed.run.get_args_parser().parse_args(shlex.split(line.rstrip("& "))[5:])
    assert (args.nproc_per_node, args.standalone, args.training_script) == ("4", True, "hf_tfm.cli")


# Fields of a TrainJob (Kubeflow Trainer 2.2, trainer.kubeflow.org/v1alpha1) and of the pod in it that we write.
MOUNT = {"name": str, "mountPath": str}
POD = {
    "terminationGracePeriodSeconds": int,
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    "containers": [{"name": str, "volumeMounts": [MOUNT]}],
}
RESOURCES = {"nvidia.com/gpu": int, "cpu": int}
JOB = {"name": str, "template": {"spec": {"template": {"spec": POD}}}}
TRAINJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str},
    "spec": {
        "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
        "trainer": {
            "image": str,
            "command": [str],
            "numNodes": int,
            "numProcPerNode": int,
            "env": [{"name": str, "value": str}],
            "resourcesPerNode": {"limits": RESOURCES, "requests": RESOURCES},
        },
        "runtimePatches": [{"manager": str, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [JOB]}}}}],
        "activeDeadlineSeconds": int,
    },
}


def assert_shape(value, shape):
    if isinstance(shape, dict):
        assert value.keys() <= shape.keys()
        for key, part in value.items():
            assert_shape(part, shape[key])
    elif isinstance(shape, list):
        for one in value:
            assert_shape(one, shape[0])
    else:
        assert type(value) is shape, value


def test_trainjob():
    more = ("--nodes", "2", "--gpus", "8", "--cpus", "64", "--strategy", "hsdp", "--time", "2h", "--namespace", "ml")
    content = yaml.safe_load(submission(*K8S, *more, *IN_VOLUME).text)
    assert_shape(content, TRAINJOB)
    trainer = content["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], content["spec"]["activeDeadlineSeconds"]) == (2, 8, 7200)
    assert {"name": "PARALLELISM_CONFIG_DP_SHARD_SIZE", "value": "8"} in trainer["env"]
    args = torch.distributed.run.get_args_parser().parse_args(trainer["command"][3:])
    assert args.training_script_args == ["run", *IN_VOLUME]
    assert args.nnodes == "1:1", "left to PET_NNODES of the runtime"


def test_job_is_what_run_job_takes(monkeypatch):
    words = submission(*JOBS, "--strategy", "fsdp2", "--time", "90m", *IN_VOLUME).command
    found = {}
    monkeypatch.setattr(HfApi, "run_job", lambda self, **options: found.update(options) or sys.exit(0))
    with pytest.raises(SystemExit):
        app(words[1:], standalone_mode=False)
    inspect.signature(HfApi.run_job).bind_partial(**found)
    assert (found["image"], found["flavor"], found["timeout"]) == ("image", "a100x4", "5400s")
    assert found["volumes"] == parse_volumes(["hf://buckets/me/runs:/runs"])
    assert found["env"]["FSDP_VERSION"] == "2"
    assert found["command"][:5] == ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert found["command"][-2:] == ["--output_dir", "/runs/a b"]


# --- the command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "RECIPE must be given"),
        (("translation_trian",), "did you mean translation_train?"),
        (("augment_texts",), "augment_texts trains nothing"),
        (("--node", "2", *RECIPE), "--node is not an option; did you mean --nodes?"),
        (("--on", "slrum", *RECIPE), "on must be one of local, slurm, k8s, jobs"),
        (("--nodes", "0", *RECIPE), "nodes must be at least 1, got 0"),
        (("--nodes", "two", *RECIPE), 'nodes must be an integer, got "two"'),
        (("--nodes", "2", *RECIPE), "master must be given with several nodes"),
        (("--nodes", "2", "--master", "a:b", *RECIPE), "master must be HOST or HOST:PORT"),
        (("--partition", "p", *RECIPE), "partition is for --on slurm, not local"),
        (("--on", "slurm", "--partition", "p\n#", *RECIPE), "partition must be a name without blanks"),
        (("--on", "slurm", "--setup", "a\nb", *RECIPE), "setup must be one line"),
        (("--on", "slurm", "--time", "1:00", *RECIPE), "time must be like 90m"),
        (("--on", "slurm", "--time", "2m", *RECIPE), "time must exceed grace, the 120 seconds"),
        (("--on", "slurm", "--name", "A b", *RECIPE), "name must be at most 63 lower-case letters"),
        (("--gpus", "0", "--strategy", "fsdp2", *RECIPE), "strategy fsdp2 needs GPUs"),
        (("--gpus", "4", "--strategy", "hsdp", *RECIPE), "it needs at least 2 nodes of 2 GPUs"),
        (("--gpus", "2", "--processes", "2", *RECIPE), "processes is for gpus 0"),
        (("--gpus", "64", "--yes", *RECIPE), "gpus must be at most the"),
        (("--on", "k8s", *RECIPE), "image must be given with --on k8s"),
        ((*K8S, *RECIPE), "output_dir runs/quickstart is in no volume"),
        ((*K8S, "--volume", "hf://a/b:/c", *IN_VOLUME), "volume must be CLAIM:/PATH"),
        ((*JOBS, "--nodes", "2", *IN_VOLUME), "nodes must be 1 with --on jobs"),
        ((*JOBS, "--gpus", "2", *IN_VOLUME), "gpus must be 4, those of flavor a100x4"),
        ((*JOBS[:-1], "a100x5", *IN_VOLUME), "flavor must be one of"),
        ((*RECIPE, "--max_steps", "-1"), "max_steps must be at least 1, got -1"),
    ],
)
def test_invalid_options_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*argv])
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("hf-tfm launch") and printed.count("\n") == 1


def write_program(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


# Prints its arguments and, but for `hf jobs`, its standard input.
PROGRAM = """#!{python}
import json, sys
print(json.dumps([sys.argv[1:], "" if sys.argv[1:2] == ["jobs"] else sys.stdin.read()]))
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("argv", "program"),
    [(("--on", "slurm", *RECIPE), "sbatch"), ((*K8S, *IN_VOLUME), "kubectl"), ((*JOBS, *IN_VOLUME), "hf")],
)
def test_submits_only_with_yes(argv, program, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"{program} is not installed here"):
        main(["--yes", *argv])
    write_program(tmp_path, program, PROGRAM.format(python=sys.executable))
    assert main([*argv]) == 0
    printed, remark = capfd.readouterr()
    assert remark.startswith("hf-tfm launch: nothing is started; --yes")
    assert main(["--yes", *argv]) == 3
    given, text = json.loads(capfd.readouterr().out)
    wanted = submission(*argv)
    assert printed == wanted.text + "\n"
    assert given == wanted.command[1:] and text == (printed if wanted.takes_text else "")


# --- a Slurm cluster of stubs

SRUN = """#!/bin/bash
shift  # --wait
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_NODEID=$i "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do
    wait "$task"; one=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; one=$?; done
    ((one > status)) && status=$one
done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then touch "$CLUSTER/requeued"; else echo localhost; fi
"""
# Starts the job, sends the signal of --signal=B: to the script's shell once there is a checkpoint, starts it again.
SBATCH_STUB = """#!{python}
import os, pathlib, signal, subprocess, sys, time
script = sys.stdin.read()
(nodes,) = [line.partition("=")[2] for line in script.splitlines() if line.startswith("#SBATCH --nodes=")]
os.environ |= {{"SLURM_NNODES": nodes, "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]"}}
cluster, checkpoints = pathlib.Path(os.environ["CLUSTER"]), pathlib.Path(os.environ["RUN"]) / "checkpoints"
for start in (1, 2):
    (cluster / "requeued").unlink(missing_ok=True)
    file = cluster / "script"
    file.write_text(script)
    job = subprocess.Popen(["bash", file])
    end = time.monotonic() + 240
    while start == 1 and not list(checkpoints.glob("step-*")) and job.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if start == 1:
        job.send_signal(signal.SIGTERM)
    status = job.wait()
    print("start", start, "status", status, "requeued", (cluster / "requeued").exists(), flush=True)
    if not (cluster / "requeued").exists():
        sys.exit(status)
"""


@pytest.mark.slow  # four imports of torch and two rendezvous
def test_slurm_job_is_signalled_requeued_and_resumed(tmp_path):
    """Two nodes with a process each, connected by gloo; the result is that of one undisturbed process."""
    data = write_data(tmp_path / "pairs")
    options = {"max_steps": 60, "save_steps": 2, "eval_steps": 30, "adam_epsilon": 1e-4, "learning_rate": 0.003}
    options |= {"model.dropout": 0.0}
    run_recipe(*command_line(data, tmp_path / "one", **options))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sbatch": SBATCH_STUB.format(python=sys.executable),
    }.items():
        write_program(programs, name, text)
    write_program(programs, "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    folder = tmp_path / "run"
    words = ["launch", "--yes", "--on", "slurm", "--nodes", "2", "--gpus", "0", "translation_train"]
    with (tmp_path / "log").open("w") as log:
        status = subprocess.run(
            [sys.executable, "-m", "hf_tfm.cli", *words, *command_line(data, folder, **options)],
            env=environment(PATH=f"{programs}:{os.environ['PATH']}", CLUSTER=str(tmp_path), RUN=str(folder)),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            timeout=900,
            check=False,
        ).returncode
    printed = (tmp_path / "log").read_text()
    assert status == 0, printed[-5000:]
    assert "start 1 status 0 requeued True" in printed and "start 2 status 0 requeued False" in printed
    assert "asked to stop: state saved at step" in printed and "resuming from" in printed
    assert record(folder).hardware["count"] == 2 and record(folder).training["steps"] == 60
    losses = [
        [row["evaluation"]["loss"] for row in history(one) if "evaluation" in row]
        for one in (folder, tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "one"))
    assert one.keys() == two.keys()
