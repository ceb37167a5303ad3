"""Checks clusters/*.yaml against the schemas of Ray's launcher and KubeRay, and our documentation.

KubeRay's own definition of a RayJob is a megabyte and in no Python package, so a schema of the
fields we use stands in for it. Set KUBERAY_CRD to a copy of KubeRay's ray.io_rayjobs.yaml to check
against the whole.
"""

import copy
import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from s2l_ray.config import Config

ROOT = Path(__file__).parents[2]
LAUNCHER = ("on_prem", "aws")
ALL = (*LAUNCHER, "kuberay")


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / "clusters" / f"{name}.yaml").read_text())


def check_launcher(config: dict[str, Any]) -> None:
    """Does what `ray up` does with a file before it talks to anybody."""
    validate_config(prepare_config(copy.deepcopy(config)))


def check_rayjob(config: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "rayjob.json").read_text())
    jsonschema.validate(config, schema)


def closed(schema: Any) -> Any:
    """Returns a CRD's schema that refuses unknown fields, as strict `kubectl create` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not is_open
    ):
        inner["additionalProperties"] = False
    return inner


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Returns a change that sets the dotted path, or removes it where `value` is the Ellipsis."""

    def change(config: Any) -> None:
        *outer, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in outer:
            config = config[key]
        if value is ...:
            del config[last]
        else:
            config[last] = value

    return change


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_accepts_the_file(name: str) -> None:
    check_launcher(load(name))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("on_prem", "cluster_nam", "x"),
        ("on_prem", "initialization_commands", "pip install"),
        ("on_prem", "provider.worker_ips", "192.0.2.2"),
        ("aws", "available_node_types.proxy.min_worker", 0),
        ("aws", "available_node_types.proxy.resources.GPU", "one"),
        ("aws", "available_node_types.target.node_config", ...),
        ("aws", "head_node_type", "nobody"),
        ("aws", "idle_timeout_minutes", "5"),
    ],
)
def test_rays_launcher_refuses_a_broken_file(name: str, path: str, value: Any) -> None:
    config = load(name)
    set_at(path, value)(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_launcher(config)


BROKEN_RAYJOBS = [
    ("spec.shutdownAfterJobFinish", True),
    ("spec.ttlSecondsAfterFinished", "60"),
    ("spec.rayClusterSpec.authOptions.mode", "on"),
    ("spec.rayClusterSpec.authOption", {"mode": "token"}),
    ("spec.rayClusterSpec.headGroupSpec", ...),
    ("spec.rayClusterSpec.autoscalerOptions.version", 2),
    ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
    ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "0"),
    ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", ...),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.container", []),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.name", ...),
    (
        "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory",
        "26 GB",
    ),
]


def test_our_schema_of_kuberay_accepts_the_file() -> None:
    check_rayjob(load("kuberay"))


@pytest.mark.parametrize(("path", "value"), BROKEN_RAYJOBS)
def test_our_schema_of_kuberay_refuses_a_broken_file(path: str, value: Any) -> None:
    config = load("kuberay")
    set_at(path, value)(config)
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(config)


@pytest.fixture(scope="module")
def crd() -> jsonschema.Draft202012Validator:
    path = os.environ.get("KUBERAY_CRD")
    if path is None:
        pytest.skip(
            "set KUBERAY_CRD to KubeRay's ray.io_rayjobs.yaml to check against its own definition"
        )
    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    schema = next(
        version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"
    )
    schema["properties"]["spec"] = closed(schema["properties"]["spec"])
    return jsonschema.Draft202012Validator(schema)


def test_kuberays_own_definition_accepts_the_file(crd: jsonschema.Draft202012Validator) -> None:
    crd.validate(load("kuberay"))


@pytest.mark.parametrize(("path", "value"), BROKEN_RAYJOBS)
def test_kuberays_own_definition_refuses_a_broken_file(
    crd: jsonschema.Draft202012Validator, path: str, value: Any
) -> None:
    config = load("kuberay")
    set_at(path, value)(config)
    with pytest.raises(jsonschema.ValidationError):
        crd.validate(config)


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_starts_with_a_token_on_every_node(name: str) -> None:
    config = load(name)
    starts = [config[f"{place}_start_ray_commands"][-1] for place in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token" in start and "ray start" in start for start in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_aws_workers_start_from_zero_and_go_when_idle() -> None:
    config = load("aws")
    groups = {
        name: group for name, group in config["available_node_types"].items() if name != "head"
    }
    assert all(group["min_workers"] == 0 for group in groups.values())
    assert sum(group["max_workers"] for group in groups.values()) <= config["max_workers"]
    assert config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False
    assert config["available_node_types"]["head"]["resources"].get("GPU", 0) == 0
    spot = {
        name for name, group in groups.items() if "InstanceMarketOptions" in group["node_config"]
    }
    assert spot == {"proxy"}
    assert groups["target"]["resources"]["GPU"] == 8


def test_the_cpus_that_the_aws_file_tells_to_ask_for_select_the_node_types_it_says() -> None:
    text = (ROOT / "clusters" / "aws.yaml").read_text()
    small, large = (
        int(re.findall(rf"--scaling\.{stage}='{{gpus: 1, cpus: (\d+)}}'", text)[0])
        for stage in ("proxy", "target")
    )
    types = load("aws")["available_node_types"]
    fits = {
        cpus: {
            name
            for name, group in types.items()
            if group["resources"].get("GPU") and per_gpu(group) >= cpus
        }
        for cpus in (small, large)
    }
    assert fits == {small: {"proxy", "target"}, large: {"target"}}


def per_gpu(group: dict[str, Any]) -> float:
    return float(group["resources"]["CPU"] / group["resources"]["GPU"])


def test_kuberay_workers_start_from_zero_and_the_cluster_ends_with_the_job() -> None:
    spec = load("kuberay")["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert all(
        group["minReplicas"] == group["replicas"] == 0 for group in cluster["workerGroupSpecs"]
    )
    assert ray.__version__.split(".")[:2] == cluster["rayVersion"].split(".")[:2]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert shlex.split(spec["entrypoint"])[:3] == ["python", "-m", "s2l_ray.run"]


@pytest.mark.parametrize("name", ALL)
def test_the_python_and_the_ray_of_the_file_are_those_of_the_package(name: str) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    text = (ROOT / "clusters" / f"{name}.yaml").read_text()
    pythons = re.findall(r"python ?(3\.\d+)", text)
    pythons += [f"3.{minor}" for minor in re.findall(r"-py3(\d+)-", text)]
    assert pythons
    assert all(SpecifierSet(project["requires-python"]).contains(each) for each in pythons)
    (ray_of_project,) = (
        requirement.specifier
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "ray"
    )
    rays = re.findall(r"rayproject/ray:([\d.]+\d)|rayVersion: \"([\d.]+)\"", text)
    assert all(ray_of_project.contains(each) for pair in rays for each in pair if each)


@pytest.mark.parametrize("name", ALL)
def test_every_config_field_named_in_the_file_exists(name: str) -> None:
    text = (ROOT / "clusters" / f"{name}.yaml").read_text()
    named = re.findall(r"--([a-z_]+)\.([a-z_]+)=", text)
    assert ("run", "storage") in named
    for section, field in named:
        assert field in getattr(Config.model_fields[section].annotation, "model_fields", {}), (
            section,
            field,
        )
