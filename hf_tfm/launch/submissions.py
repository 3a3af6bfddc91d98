"""What is submitted: environment and command of one node, and the script, manifest or command around them.

The settings of a strategy stand in recipes/launch/STRATEGY.yaml, the file for ``accelerate launch``. Here they become
the environment variables that ``accelerate launch`` would set, so that torchrun, which all launchers have, can start
the processes.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from ..options import read_yaml
from ..recipe_files import recipes_folder
from .options import DAY, DEFAULT_RUNTIME, HOUR, MINUTE, PORT, Launch

RENAMED = {"FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
DEEPSPEED = {  # key of deepspeed_config -> environment variable
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds between SIGTERM and SIGKILL of torchrun; default 30
PORTS = 1000  # jobs that share a node use different ones
KILL_AFTER = 10  # seconds that torchrun has for itself after those of the run


@dataclass(frozen=True)
class Submission:
    """What ``hf-tfm launch`` prints, and runs with ``--yes``.

    Args:
        text: script, manifest or command line.
        command: words of the program that starts or submits it.
        takes_text: the program reads the text from standard input.
        environment: additional environment variables of the program.
    """

    text: str
    command: list[str]
    takes_text: bool
    environment: dict[str, str]


def word(value: Any) -> str:
    """Return a value of a YAML file as an environment variable has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def strategy_environment(strategy: str, nodes: int, per_node: int) -> dict[str, str]:
    """Return the environment variables that ``accelerate launch`` sets for recipes/launch/STRATEGY.yaml.

    Args:
        nodes, per_node: with hsdp, the number of copies, and of GPUs that share one.
    """
    content = read_yaml(recipes_folder() / "launch" / f"{strategy}.yaml")
    found: dict[str, str] = {}
    if options := content.get("fsdp_config"):
        found["ACCELERATE_USE_FSDP"] = "true"
        for key, value in options.items():
            name = key.upper()
            found[RENAMED.get(name, name)] = str(value) if isinstance(value, str) else word(value)
    if options := content.get("deepspeed_config"):
        found["ACCELERATE_USE_DEEPSPEED"] = "true"
        found |= {DEEPSPEED[key]: word(value) for key, value in options.items() if key in DEEPSPEED}
    if "parallelism_config" in content:
        found["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        found["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(nodes)
        found["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(per_node)
    return found


def environment(launch: Launch) -> dict[str, str]:
    """Return the environment variables of every process of a launch."""
    options = launch.options
    found = strategy_environment(options.strategy, options.nodes, options.per_node)
    if not options.gpus:
        found["ACCELERATE_USE_CPU"] = "true"
        if options.cpus:
            found["OMP_NUM_THREADS"] = str(max(1, options.cpus // options.per_node))
    if options.on in ("slurm", "k8s"):
        found[SHUTDOWN] = str(max(1, options.save_seconds - KILL_AFTER))
    return found


def node_command(launch: Launch, nodes: str = "", endpoint: str = "", job: str = "", single: bool = False) -> str:
    """Return the shell command of one node.

    Args:
        nodes, endpoint, job: number of nodes, HOST:PORT of one of them and a name of the job, as shell text, where
            several nodes find each other by torchrun's rendezvous.
        single: the processes of one node find each other by a free port; otherwise torchrun's own environment
            variables (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR ...) say how, unless ``endpoint`` does.
    """
    options = launch.options
    recipe = ["-m", "hf_tfm.cli", *(("doctor", "launch") if options.check else ("run",)), launch.recipe]
    if single and options.per_node == 1 and not options.max_restarts:
        return shlex.join(["python", *recipe, *launch.words])
    words = ["python -m torch.distributed.run"]
    if endpoint:
        words.append(f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id {job}")
    if single:
        words.append("--standalone")
    if single or endpoint:
        words.append(f"--nproc_per_node {options.per_node}")
    if options.max_restarts:
        words.append(f"--max_restarts {options.max_restarts}")
    return " ".join([*words, shlex.join([*recipe, *launch.words])])


def local(launch: Launch) -> Submission:
    """Processes of this machine, or this machine's part of several."""
    options, variables = launch.options, environment(launch)
    if options.master:
        endpoint = options.master if ":" in options.master else f"{options.master}:{PORT}"
        command = node_command(launch, str(options.nodes), shlex.quote(endpoint), launch.name)
    else:
        command = node_command(launch, single=True)
    text = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), command])
    return Submission(f"{launch.remark}\n{text}", [sys.executable, *shlex.split(command)[1:]], False, variables)


def slurm_time(seconds: int) -> str:
    """Format seconds as D-HH:MM:SS."""
    days, rest = divmod(seconds, DAY)
    return f"{days}-{rest // HOUR:02}:{rest % HOUR // MINUTE:02}:{rest % MINUTE:02}"


def slurm(launch: Launch) -> Submission:
    """A script for sbatch: one task for each node, which starts the node's processes."""
    options = launch.options
    directives = {
        "job-name": launch.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus or None,
        "cpus-per-task": options.cpus,
        "time": slurm_time(options.seconds) if options.seconds else None,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "signal": f"B:TERM@{options.save_seconds}",
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    several = options.nodes > 1
    if several:
        command = node_command(launch, '"$SLURM_NNODES"', '"$master:$port"', '"$SLURM_JOB_ID"')
    else:
        command = node_command(launch, single=True)
    rendezvous = [
        'master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port=$(({PORT} + SLURM_JOB_ID % {PORTS}))",
    ]
    lines = [
        "#!/bin/bash",
        launch.remark,
        *head,
        "#SBATCH --requeue",
        "",
        *([options.setup, ""] if options.setup else []),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(launch).items()),
        *(rendezvous if several else []),
        "",
        "# Before the time limit Slurm sends SIGTERM to this script alone, which passes it on. The run saves a",
        "# checkpoint and ends, and the job is queued again to resume from it. Slurm itself requeues a preempted job.",
        "stopped=",
        "trap 'stopped=yes; kill -TERM \"$run\"' TERM",
        # One node may end before another one has saved: srun waits for it, but not for ever.
        f"srun --wait={options.save_seconds} {command} &",
        "run=$!",
        'wait "$run"',
        "status=$?",
        'if [ -n "$stopped" ]; then',
        '    wait "$run"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "    exit 0",
        "fi",
        'exit "$status"',
    ]
    return Submission("\n".join(lines), ["sbatch"], True, {})


def kubernetes(launch: Launch) -> Submission:
    """A TrainJob of Kubeflow Trainer 2.2 or newer, whose runtime tells torchrun where the other nodes are."""
    options, limits = launch.options, {}
    if options.gpus:
        limits["nvidia.com/gpu"] = options.gpus
    if options.cpus:
        limits["cpu"] = options.cpus
    trainer: dict[str, Any] = {
        "image": options.image,
        "command": shlex.split(node_command(launch)),
        "numNodes": options.nodes,
        "numProcPerNode": options.per_node,
        "env": [{"name": name, "value": value} for name, value in environment(launch).items()],
    }
    if limits:
        trainer["resourcesPerNode"] = {"limits": limits, "requests": limits}
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": options.save_seconds}
    if options.mounts:
        names = {claim: f"volume-{i}" for i, claim in enumerate(dict.fromkeys(claim for claim, _ in options.mounts))}
        pod["volumes"] = [
            {"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()
        ]
        mounts = [{"name": names[claim], "mountPath": path} for claim, path in options.mounts]
        pod["containers"] = [{"name": "node", "volumeMounts": mounts}]
    template = {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]}}
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": options.runtime or DEFAULT_RUNTIME,
        },
        "trainer": trainer,
        "runtimePatches": [{"manager": "hf-tfm.launch/user", "trainingRuntimeSpec": {"template": template}}],
    }
    if options.seconds:
        spec["activeDeadlineSeconds"] = options.seconds
    metadata = {"name": launch.name, **({"namespace": options.namespace} if options.namespace else {})}
    content = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}
    text = yaml.dump(content, Dumper=Plain, sort_keys=False, width=110).rstrip()
    return Submission(f"{launch.remark}\n{text}", ["kubectl", "apply", "-f", "-"], True, {})


class Plain(yaml.SafeDumper):
    """Writer of YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def jobs(launch: Launch) -> Submission:
    """A command for Hugging Face Jobs."""
    options = launch.options
    words = ["hf", "jobs", "run", "--detach", "--flavor", str(options.flavor), "--name", launch.name]
    words += ["--timeout", f"{options.seconds}s"] if options.seconds else []
    for one in options.volume:
        words += ["--volume", one]
    for name, value in environment(launch).items():
        words += ["--env", f"{name}={value}"]
    words += [str(options.image), *shlex.split(node_command(launch, single=True))]
    return Submission(f"{launch.remark}\n{shlex.join(words)}", words, False, {})


LAUNCHERS: dict[str, Callable[[Launch], Submission]] = {
    "local": local,
    "slurm": slurm,
    "k8s": kubernetes,
    "jobs": jobs,
}
