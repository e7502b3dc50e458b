"""The files that take jobs to a cluster: Kubernetes, KubeRay and Ray's launcher take them, and they fit this project."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs import commands, explain

ROOT = Path(__file__).parent.parent.parent
FILES = ROOT / "cluster"


def fields(required: str = "", **kinds: Any) -> dict[str, Any]:
    """The JSON schema of an object that has these fields and no others."""
    properties = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in kinds.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
POD = fields("spec", metadata="object", spec="object")

# Names and types of ray.io/v1 in KubeRay 1.7, by its reference of the API. What pods hold is Kubernetes' own.
GROUP = {"rayStartParams": TEXTS, "template": POD, "resources": TEXTS, "labels": TEXTS}
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion="string",
    enableInTreeAutoscaling="boolean",
    autoscalerOptions="object",
    gcsFaultToleranceOptions="object",
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName="string", enableK8sTokenAuth="boolean"),
    headServiceAnnotations=TEXTS,
    suspend="boolean",
    headGroupSpec=fields("template", **GROUP, serviceType="string", headService="object", enableIngress="boolean"),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName minReplicas maxReplicas template",
            **GROUP,
            groupName="string",
            replicas="integer",
            minReplicas="integer",
            maxReplicas="integer",
            numOfHosts="integer",
            idleTimeoutSeconds="integer",
            suspend="boolean",
            scaleStrategy="object",
        ),
    },
)
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name="string", namespace="string", labels=TEXTS, annotations=TEXTS),
    spec=fields(
        entrypoint="string",
        runtimeEnvYAML="string",
        jobId="string",
        metadata=TEXTS,
        backoffLimit="integer",
        activeDeadlineSeconds="integer",
        shutdownAfterJobFinishes="boolean",
        ttlSecondsAfterFinished="integer",
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate="object",
        submitterConfig=fields(backoffLimit="integer"),
        entrypointNumCpus="number",
        entrypointNumGpus="number",
        entrypointResources="string",
        clusterSelector=TEXTS,
        suspend="boolean",
        rayClusterSpec=RAY_CLUSTER,
    ),
)


def document(name: str) -> Any:
    """A file of cluster/, read."""
    return yaml.safe_load((FILES / name).read_text())


def pods() -> dict[str, Any]:
    """What the pods of the manifest are made of, by group."""
    cluster = document("rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": cluster["headGroupSpec"], **groups}.items()}


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    pin = re.search(rf"(?m)^{package}==([\w.]+)", (ROOT / "constraints.txt").read_text())
    assert pin is not None
    return pin[1]


def test_the_manifest_has_the_fields_that_kuberay_knows() -> None:
    jsonschema.validate(document("rayjob.yaml"), RAY_JOB)


def test_the_launcher_takes_its_file() -> None:
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    launcher = document("aws.yaml")
    jsonschema.validate(launcher, schema)
    assert launcher["head_node_type"] in launcher["available_node_types"]


def test_a_retry_resumes_and_the_cluster_ends_with_the_job() -> None:
    job = document("rayjob.yaml")["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert job["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_the_job_is_a_command_that_relmap_takes() -> None:
    program, job, *words = shlex.split(document("rayjob.yaml")["spec"]["entrypoint"])
    assert (program, job) == ("relmap", "explain")
    arguments = commands.parse(explain.Arguments, words, "explain")
    assert arguments.out.startswith("s3://")
    # A job that starts before the GPU nodes would else take the CPUs that are there.
    groups = document("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert arguments.replicas == next(group["replicas"] for group in groups if group["groupName"] == "replicas")
    assert arguments.min_replicas == 1


def test_every_file_names_the_versions_of_this_project() -> None:
    version = re.search(r'(?m)^version = "([\w.]+)"', (ROOT / "pyproject.toml").read_text())
    assert version is not None
    assert document("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")
    for path in FILES.iterdir():
        for tag in re.findall(r"relmap:([\w.]+)-(?:cuda|cpu)", path.read_text()):
            assert tag == version[1], path.name


@pytest.mark.parametrize("group", ["head", "decoders", "replicas"])
def test_a_pod_has_probes_limits_and_no_root(group: str) -> None:
    pod = pods()[group]
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]  # what Ray counts is what it gets
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"].endswith("healthz")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_only_replicas_hold_gpus_and_the_head_takes_no_work() -> None:
    gpus = {group: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group, pod in pods().items()}
    assert gpus == {"head": None, "decoders": None, "replicas": "1"}
    assert document("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_probes_ask_what_ray_answers_without_a_token() -> None:
    """The paths are those that Ray's servers let pass, by their own source."""
    import ray.dashboard

    folder = Path(ray.dashboard.__file__).parent
    head, agent = (folder / f"http_server_{name}.py" for name in ("head", "agent"))
    for group, pod in pods().items():
        path = pod["containers"][0]["readinessProbe"]["httpGet"]["path"]
        assert f'"{path}"' in (head if group == "head" else agent).read_text()


def test_what_the_image_copies_goes_to_the_builder() -> None:
    """And nothing else does: the list begins with everything, and takes back what is needed."""
    ignored, *lines = [
        line for line in (FILES / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set[str]()
    for line in (FILES / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cpu", "tpu"])
def test_the_image_installs_pytorch_for_its_device(device: str, tmp_path: Path) -> None:
    """The step is run as Docker would run it, with a pip that says what it was asked for."""
    (step,) = re.findall(r"(?ms)^RUN (case .*?esac)$", (FILES / "Dockerfile").read_text())
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
    said = subprocess.run(["sh", "-c", step], env=environment, capture_output=True, text=True)
    if device == "tpu":
        assert (said.returncode, said.stderr) == (1, "DEVICE is cuda or cpu, not tpu\n")
        return
    assert said.returncode == 0
    assert said.stdout.split()[-1] == "torch"
    assert ("/whl/cpu" in said.stdout) == (device == "cpu")


# ---- With the linters that `make check-cluster` installs: 160 MB, which the other tests do not need.


@pytest.mark.parametrize("group", ["head", "decoders", "replicas"])
def test_kubernetes_takes_the_pods(group: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="make check-cluster brings kubernetes-validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, "spec": pods()[group]}
    validator.validate(pod, validator.latest_version(), strict=True)


def test_the_dockerfile_has_no_known_flaw() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("make check-cluster brings hadolint")
    said = subprocess.run([linter, FILES / "Dockerfile"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")
