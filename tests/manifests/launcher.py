"""A file of Ray's cluster launcher for AWS: by Ray's own schema, by Amazon's own API, and by our rules."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import botocore.session
from botocore.model import Shape
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from manifests.finding import Finding, check_image, check_plain_secret
from manifests.pods import WORLD

_OF_RAY = {"SubnetIds", "SecurityGroupIds"}  # names that Ray's own code reads, beside those of RunInstances


def check_launcher(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What `ray up` would do with it."""
    try:
        whole = prepare_config(copy.deepcopy(dict(config)))
        validate_config(whole)
    except ValidationError as error:
        rule = "unknown-field" if error.validator == "additionalProperties" else "wrong-value"
        yield Finding(rule, ".".join(map(str, error.absolute_path)) or "the file", error.message)
        return
    except (ValueError, AssertionError, KeyError) as error:
        yield Finding("wrong-value", "the file", f"{type(error).__name__}: {error}")
        return
    yield from _check_nodes(config)
    yield from _check_docker(config.get("docker", {}), "docker")
    yield from _check_commands(config, whole)
    yield from _check_world("", config)
    if not config["provider"].get("use_internal_ips"):
        yield Finding("open-port", "provider.use_internal_ips", "each node would have a public address")


def _check_nodes(config: Mapping[str, Any]) -> Iterator[Finding]:
    for name, kind in config["available_node_types"].items():
        where, node = f"available_node_types.{name}", kind["node_config"]
        yield from _check_ec2(where, node)
        if not node.get("SecurityGroupIds"):
            yield Finding("open-world", where, "without SecurityGroupIds Ray opens port 22 to 0.0.0.0/0")
        if not node.get("IamInstanceProfile"):
            yield Finding("privilege", where, "without IamInstanceProfile Ray gives the head all of EC2 and S3")
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield Finding(
                "privilege",
                where,
                "MetadataOptions: HttpTokens: required; without it a request forged by a page gets the role",
            )
        if not all(d.get("Ebs", {}).get("Encrypted") for d in node.get("BlockDeviceMappings", [{}])):
            yield Finding("privilege", where, "BlockDeviceMappings: Ebs: Encrypted: true")
        yield from _check_docker(kind.get("docker", {}), f"{where}.docker")
        if name != config["head_node_type"] and "max_workers" not in kind:
            yield Finding("no-limit", where, "max_workers: it could grow to the whole file's")
    head = config["available_node_types"][config["head_node_type"]]
    where = f"available_node_types.{config['head_node_type']}"
    if head.get("resources", {}).get("CPU") != 0:
        yield Finding("head-works", where, "resources: {CPU: 0}: tasks would land on the head")
    if "InstanceMarketOptions" in head["node_config"]:
        yield Finding("head-lost", where, "a head on spot takes the whole cluster with it")
    profiles = [kind["node_config"].get("IamInstanceProfile") for kind in config["available_node_types"].values()]
    if profiles.count(head["node_config"].get("IamInstanceProfile")) > 1:
        yield Finding("privilege", where, "workers have the head's profile, which may start machines")


@cache
def _run_instances() -> Shape:
    """The parameters of RunInstances; EC2's model takes seconds to read."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _check_ec2(where: str, node: Mapping[str, Any]) -> Iterator[Finding]:
    """By the model of RunInstances that botocore carries: no request is made."""
    given = {name: value for name, value in node.items() if name not in _OF_RAY} | {"MinCount": 1, "MaxCount": 1}
    for kind, path, details in ParamValidator().validate(given, _run_instances())._errors:
        rule = "unknown-field" if kind == "unknown field" else "wrong-value"
        yield Finding(
            rule, f"{where}.node_config{path}", f"{kind}: {details.get('unknown_param') or details.get('param')}"
        )
    for name in sorted(_OF_RAY & node.keys()):
        if not isinstance(node[name], list):
            yield Finding("wrong-value", f"{where}.node_config.{name}", "a list")


def _check_docker(docker: Mapping[str, Any], where: str) -> Iterator[Finding]:
    options = [option for key in docker if key.endswith("run_options") for option in docker[key]]
    for key in ("image", "head_image", "worker_image"):
        if key in docker:
            yield from check_image(f"{where}.{key}", docker[key])
    for option in options:
        yield from _check_option(f"{where}.run_options", option)
    if where != "docker":
        return
    if "--env=RAY_AUTH_MODE=token" not in options:
        yield Finding(
            "open-auth", f"{where}.run_options", "without --env=RAY_AUTH_MODE=token whoever reaches Ray runs code"
        )
    if docker.get("disable_shm_size_detection") and not any("--shm-size" in option for option in options):
        yield Finding("no-shm", where, "/dev/shm is 64 MiB without the launcher's detection or --shm-size")
    if not {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(options):
        yield Finding("privilege", f"{where}.run_options", "--cap-drop=ALL and --security-opt=no-new-privileges")


def _check_option(where: str, option: str) -> Iterator[Finding]:
    """One of `docker run`."""
    if option.startswith(("--env", "-e ")):
        name, _, value = option.removeprefix("--env=").removeprefix("-e ").partition("=")
        yield from check_plain_secret(where, name, value)
    if "--privileged" in option or option.startswith(("--user=0", "--user=root", "--cap-add")):
        yield Finding("privilege", where, f"{option}: more rights than a node needs")
    if "docker.sock" in option:
        yield Finding("host", where, f"{option}: the container would be its machine's root")


def _check_commands(config: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for command in whole[key]:
            if re.search(r"\b(pip|apt(-get)?|conda) install\b|\bcurl\b|\bwget\b", command):
                yield Finding(
                    "unpinned", key, f"{command}: installs what the network gives it today; build it into the image"
                )
    start = " ".join(config.get("head_start_ray_commands", []))
    if "--dashboard-host=127.0.0.1" not in start:
        yield Finding("open-port", "head_start_ray_commands", "--dashboard-host=127.0.0.1: jobs are submitted there")
    if "--num-cpus=0" not in start:
        yield Finding("head-works", "head_start_ray_commands", "--num-cpus=0: tasks would land on the head")


def _check_world(where: str, node: Any) -> Iterator[Finding]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _check_world(f"{where}.{key}".removeprefix("."), value)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _check_world(f"{where}.{index}", value)
    elif node in WORLD:
        yield Finding("open-world", where, f"{node}: the whole world may come in")
