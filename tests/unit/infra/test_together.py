"""What must fit together: manifests with each other, with Ray, with our own config, and with the READMEs."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray._common.utils import get_default_ray_temp_dir
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from manifests.dockerfiles import copied, stages
from manifests.files import INFRA, ROOT, manifests, pinned
from manifests.monitoring import GAUGES, metrics
from maskray.config.load import load

CLUSTER = yaml.safe_load((INFRA / "kuberay/raycluster.yaml").read_text())
JOB = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())
AWS = yaml.safe_load((INFRA / "cluster/aws.yaml").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
EMITTER = ROOT / "platform/maskray/on_ray/gauges.py"


def documents(folder: str) -> Iterator[dict[str, Any]]:
    for path in sorted((INFRA / folder).glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def below(node: Any, key: str) -> Iterator[Any]:
    """All values of a key, at any depth."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key)
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from below(value, key)


# ----------------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("folder", ["kuberay", "mlflow/kubernetes"])
def test_a_policy_stands_before_each_pod(folder: str):
    everything = list(documents(folder))
    policies = [d["spec"] for d in everything if d["kind"] == "NetworkPolicy"]
    doors = [p["podSelector"]["matchLabels"].items() for p in policies if "Ingress" in p["policyTypes"]]
    pods = [t["metadata"]["labels"] for key in ("template", "submitterPodTemplate") for t in below(everything, key)]
    assert len(pods) == {"kuberay": 8, "mlflow/kubernetes": 2}[folder]
    assert [labels for labels in pods if not any(door <= labels.items() for door in doors)] == []


@pytest.mark.parametrize("folder", ["kuberay", "mlflow/kubernetes"])
def test_the_readme_makes_each_secret_that_is_referred_to(folder: str):
    readme = (INFRA / folder.split("/")[0] / "README.md").read_text()
    asked = {(ref["name"], ref["key"]) for ref in below(list(documents(folder)), "secretKeyRef")}
    asked |= {(options["secretName"], "auth_token") for options in below(list(documents(folder)), "authOptions")}
    assert asked
    for name, key in sorted(asked):
        made = re.search(
            rf"create secret generic {name} (?:[^\n]*\\\n)*[^\n]*--from-(?:file|literal)={key}[=\s]", readme
        )
        assert made, f"{name}, key {key}"


def test_a_job_brings_the_cluster_that_stays():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_rays_autoscaler_reads_our_cluster():
    config = _derive_autoscaling_config_from_ray_cr(CLUSTER)
    kinds = {
        name: (kind["min_workers"], kind["max_workers"], kind["resources"]["CPU"], kind["resources"].get("GPU", 0))
        for name, kind in config["available_node_types"].items()
    }
    assert kinds == {"headgroup": (0, 0, 0, 0), "data": (1, 8, 16, 0), "gpu": (0, 2, 88, 8)}
    assert config["idle_timeout_minutes"] == 5


def test_rays_own_ports_and_paths_are_those_asked():
    probes = [probe["httpGet"] for name in ("readinessProbe", "livenessProbe") for probe in below(CLUSTER, name)]
    assert {probe["port"] for probe in probes} == {DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
    assert {probe["path"] for probe in probes} <= set(PUBLIC_EXACT_PATHS), "kubelet has no token"
    scraped = (INFRA / "monitoring/prometheus.yaml").read_text()
    let_in = {port["port"] for port in below(list(documents("kuberay")), "ports") for port in port if "port" in port}
    for port in (AUTOSCALER_METRIC_PORT, DASHBOARD_METRIC_PORT):
        assert f'"$1:{port}"' in scraped
        assert port in let_in
    assert CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["metrics-export-port"] == "8080"
    assert 8080 in let_in


def test_the_command_of_the_job_is_one_of_ours_and_fits_its_cluster():
    program, command, *rest = shlex.split(JOB["spec"]["entrypoint"])
    assert (program, command, rest[0]) == ("maskray", "pretrain", "--config")
    assert rest[2::2] == ["--set"] * len(rest[2::2])
    path = rest[1].removeprefix("/opt/maskray/")
    assert path in {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    config = load(ROOT / path, rest[3::2])
    kinds = _derive_autoscaling_config_from_ray_cr(CLUSTER)["available_node_types"]
    gpu, workers = kinds["gpu"], config.cluster
    on_one = min(gpu["resources"]["GPU"] // workers.gpus_per_worker, gpu["resources"]["CPU"] // workers.cpus_per_worker)
    assert workers.workers <= on_one * gpu["max_workers"]
    largest = kinds["data"]["max_workers"] * kinds["data"]["resources"]["CPU"]
    assert config.probe.cpus + workers.data_cpus + JOB["spec"]["entrypointNumCpus"] <= largest
    assert config.storage.path.startswith("s3://")
    assert str(config.tracking.uri).startswith("http")


# --------------------------------------------------------------------------------------------------------------- images


def test_manifests_ask_for_the_versions_of_this_repository():
    text = "\n".join(path.read_text() for path in manifests())
    assert set(re.findall(r"/maskray:(\S+?)-(?:cpu|cuda)\b", text)) == {VERSION}
    assert set(re.findall(r"/maskray-mlflow:(\S+)", text)) == {pinned("mlflow")}


def test_the_server_has_the_mlflow_of_the_clients():
    wanted = (INFRA / "mlflow/requirements.txt").read_text()
    assert f"mlflow[auth]=={pinned('mlflow')}" in wanted
    assert all("==" in line for line in wanted.splitlines() if line and line[0] != "#" and line != "boto3")
    assert pinned("boto3")


@pytest.mark.parametrize("image", ["docker/Dockerfile", "mlflow/Dockerfile"])
def test_the_build_is_sent_what_it_copies_and_no_more(image: str):
    sources = copied((INFRA / image).read_text())
    ignore = (INFRA / f"{image}.dockerignore").read_text().splitlines()
    assert ignore[ignore.index("*") :], "everything is left out first"
    assert {line[1:] for line in ignore if line.startswith("!")} == sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_two_images_differ_by_their_torch_alone():
    found, _ = stages((INFRA / "docker/Dockerfile").read_text())
    targets = {stage.name: [step.rest for step in stage.instructions] for stage in found if stage.image == "node"}
    assert set(targets) == {"cpu", "cuda"}
    installs = [next(rest for rest in steps if rest.startswith("pip install")) for steps in targets.values()]
    assert len({re.sub(r" --extra-index-url \S+", "", install) for install in installs}) == 1


def test_the_launcher_finds_the_home_of_the_image():
    home = re.search(r"\bHOME=(\S+)", (INFRA / "docker/Dockerfile").read_text())
    assert home
    assert all(place.startswith(f"{home[1]}/") for place in AWS["file_mounts"])
    token = next(o for o in AWS["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in o).partition("TOKEN_PATH=")[2]
    assert any(token.startswith(f"{place}/") for place in AWS["file_mounts"])


def test_prometheus_on_the_head_s_machine_reads_what_ray_writes_in_its_container(monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):  # the image sets neither
        monkeypatch.delenv(name, raising=False)
    jobs = yaml.safe_load((INFRA / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    (file,) = [name for job in jobs for found in job.get("file_sd_configs", []) for name in found["files"]]
    folder = file.removesuffix(f"/{PROMETHEUS_SERVICE_DISCOVERY_FILE}")
    assert folder == get_default_ray_temp_dir()
    assert "--temp-dir" not in " ".join(AWS["head_start_ray_commands"])
    assert f"--volume={folder}:{folder}" in AWS["docker"]["head_run_options"]
    assert f"mkdir -p {folder}" in AWS["initialization_commands"], "else Docker makes it, as root's"


def test_the_readme_sets_each_variable_of_the_compose_file():
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "mlflow/compose.yaml").read_text()))
    readme = (INFRA / "mlflow/README.md").read_text()
    assert asked == set(re.findall(r"^(\w+)=", readme, re.MULTILINE))


# ----------------------------------------------------------------------------------------------------------- monitoring


def test_the_dashboard_shows_every_gauge():
    panels = yaml.safe_load((INFRA / "monitoring/dashboard.json").read_text())["panels"]
    shown = {name for panel in panels for target in panel["targets"] for name in metrics(target["expr"])}
    assert shown == {f"ray_{gauge}" for gauge in GAUGES} | {"ray_object_store_memory", "ray_resources"}


def test_the_platform_emits_what_the_dashboard_shows():
    texts = [node.value for node in ast.walk(ast.parse(EMITTER.read_text())) if isinstance(node, ast.Constant)]
    emitted = {text for text in texts if isinstance(text, str) and re.fullmatch(r"maskray_\w+", text)}
    assert emitted == GAUGES


def test_each_alert_has_a_row_of_the_runbook():
    (group,) = yaml.safe_load((INFRA / "monitoring/alerts.yaml").read_text())["groups"]
    sent_to = {rule["alert"]: rule["annotations"]["runbook"].removeprefix("it ") for rule in group["rules"]}
    readme = (ROOT / "README.md").read_text()
    runbook = readme[readme.index("## When something is wrong") :]
    assert [alert for alert, row in sent_to.items() if f"| **{row}** |" not in runbook] == []
