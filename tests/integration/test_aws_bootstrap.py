"""Lets Ray's AWS launcher resolve clusters/aws.yaml against a local stand-in for EC2 and IAM."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

moto_server = pytest.importorskip("moto.server", reason="needs the extra packages of moto[server]")
boto3 = pytest.importorskip("boto3", reason="Ray's AWS launcher needs boto3")


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the launcher keeps the SSH key that it makes in ~/.ssh
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    yield
    server.stop()


def test_the_launcher_resolves_network_key_and_rights(aws: None, tmp_path: Path) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((Path(__file__).parents[2] / "clusters" / "aws.yaml").read_text())
    given = {name: group["resources"] for name, group in config["available_node_types"].items()}
    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    validate_config(config)
    config = bootstrap_aws(config)

    validate_config(without_internal_fields(config))
    assert list(tmp_path.glob(".ssh/*.pem")) == [Path(config["auth"]["ssh_private_key"])]
    # AWS knows how many CPUs and GPUs the instance types really have.
    truth = AWSNodeProvider.fillout_available_node_types_resources(emptied(config))[
        "available_node_types"
    ]
    for name, group in config["available_node_types"].items():
        assert group["node_config"]["SubnetIds"]
        assert group["node_config"]["SecurityGroupIds"]
        if name != config["head_node_type"]:
            assert given[name].items() <= truth[name]["resources"].items()
    iam = boto3.client("iam", region_name=config["provider"]["region"])
    # the file names its own profiles, so Ray grants itself nothing
    assert iam.list_roles()["Roles"] == []


def without_internal_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "head_node"}


def emptied(config: dict[str, Any]) -> dict[str, Any]:
    types = {
        name: {**group, "resources": {}} for name, group in config["available_node_types"].items()
    }
    return {**config, "available_node_types": types}
