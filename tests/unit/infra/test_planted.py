"""Mistakes, each planted into the file as it ships: the lint names it."""

from pathlib import Path

import pytest

from manifests.files import INFRA, check, manifests

CLUSTER, JOB = "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"
NETWORK, VALKEY = "kuberay/network.yaml", "kuberay/valkey.yaml"
COMPOSE, SERVER, POSTGRES = "mlflow/compose.yaml", "mlflow/kubernetes/mlflow.yaml", "mlflow/kubernetes/postgres.yaml"
ACCOUNTS = "mlflow/auth.ini"
AWS, IMAGE, MLFLOW_IMAGE = "cluster/aws.yaml", "docker/Dockerfile", "mlflow/Dockerfile"
PROMETHEUS, ALERTS, DASHBOARD = "monitoring/prometheus.yaml", "monitoring/alerts.yaml", "monitoring/dashboard.json"

BY_REFERENCE = "valueFrom:\n        secretKeyRef: {name: maskray-valkey, key: password}"
FAULT_TOLERANCE = f"""  gcsFaultToleranceOptions: # a head that is lost is replaced, and workers wait for the new one
    redisAddress: valkey:6379
    redisPassword:
      {BY_REFERENCE}
"""

ALL_PRIVATE = "            except: [10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16]\n"
OUR_PODS = "- podSelector:\n            matchLabels: {app.kubernetes.io/part-of: maskray}"
OPEN_GROUP = "  security_group: {GroupName: x, IpPermissions: [{IpRanges: [{CidrIp: 0.0.0.0/0}]}]}"
DATABASE_PASSWORD = "${POSTGRES_PASSWORD:?a long random password for the database}"
ALLOWED_HOSTS = "${MLFLOW_ALLOWED_HOSTS:?names that clients call it by, as mlflow.example.com,mlflow.example.com:*}"
BIND = "${MLFLOW_BIND:?127.0.0.1 behind a proxy with TLS on this machine, else an address of a private network}"
TOKEN_PATH = "--env=RAY_AUTH_TOKEN_PATH=/home/maskray/.maskray/ray-token"
DISCOVERED = "    file_sd_configs:\n      - files: [/tmp/ray/prom_metrics_service_discovery.json]\n"

# file, rule, what stands there, what is planted; at its first place in the file
PLANTED = [
    # ------------------------------------------------------------------------------------------- KubeRay: the format
    (CLUSTER, "unknown-field", "maxReplicas: 8", "maxReplica: 8"),
    (CLUSTER, "unknown-field", "enableInTreeAutoscaling", "enableAutoscaling"),
    (CLUSTER, "unknown-field", "sizeLimit: 4Gi", "size: 4Gi"),
    (CLUSTER, "missing-field", "groupName: data", "name: data"),
    (CLUSTER, "wrong-value", "replicas: 1\n", 'replicas: "1"\n'),
    (CLUSTER, "wrong-value", 'num-cpus: "0"', "num-cpus: 0"),
    (CLUSTER, "wrong-value", "mode: token", "mode: tokens"),
    (CLUSTER, "wrong-value", "memory: 16Gi", "memory: 16GB"),
    (CLUSTER, "wrong-value", 'elastic-job: "true"', "elastic-job: true"),
    (CLUSTER, "wrong-value", "apiVersion: ray.io/v1", "apiVersion: ray.io/v1alpha1"),
    (CLUSTER, "wrong-value", "  autoscalerOptions:", "  rayVersion: 2.60.0\n  autoscalerOptions:"),
    (CLUSTER, "ray-version", "rayVersion: 2.60.0", "rayVersion: 2.59.0"),
    # ------------------------------------------------------------------------------------------- KubeRay: what it does
    (CLUSTER, "open-auth", "mode: token", "mode: disabled"),
    (CLUSTER, "open-port", "serviceType: ClusterIP", "serviceType: LoadBalancer"),
    (CLUSTER, "head-works", 'num-cpus: "0"', 'num-cpus: "4"'),
    (CLUSTER, "autoscaler", "version: v2", "version: v1"),
    (CLUSTER, "head-lost", FAULT_TOLERANCE, ""),
    (CLUSTER, "plain-secret", BY_REFERENCE, "value: abc"),
    (CLUSTER, "open-auth", f"    redisPassword:\n      {BY_REFERENCE}\n", ""),
    (CLUSTER, "plain-secret", "{name: AWS_REGION, value: eu-central-1}", "{name: AWS_SECRET_ACCESS_KEY, value: abc}"),
    (CLUSTER, "root", "runAsUser: 1000", "runAsUser: 0"),
    (CLUSTER, "root", "runAsNonRoot: true", "runAsNonRoot: false"),
    (CLUSTER, "privilege", "&confined\n", "&confined\n              privileged: true\n"),
    (CLUSTER, "privilege", "{type: RuntimeDefault}", "{type: Unconfined}"),
    (CLUSTER, "image-tag", "maskray:0.1.0-cpu", "maskray:latest"),
    (CLUSTER, "image-tag", "example.com/maskray:0.1.0-cpu", "example.com:5000/maskray"),
    (CLUSTER, "no-limit", 'limits: {cpu: "4", memory: 16Gi}', 'limits: {cpu: "4"}'),
    (CLUSTER, "requests", 'requests: {cpu: "4", memory: 16Gi}', 'requests: {cpu: "1", memory: 16Gi}'),
    (CLUSTER, "no-shm", "emptyDir: {medium: Memory, sizeLimit: 20Gi}", "emptyDir: {sizeLimit: 20Gi}"),
    (CLUSTER, "no-shm", "mountPath: /dev/shm", "mountPath: /shm"),
    (CLUSTER, "shm-size", "sizeLimit: 20Gi", "sizeLimit: 2Gi"),
    (CLUSTER, "shm-size", "sizeLimit: 20Gi", "sizeLimit: 64Gi"),
    (CLUSTER, "host", "emptyDir: {sizeLimit: 50Gi}", "hostPath: {path: /tmp}"),
    (CLUSTER, "host", "terminationGracePeriodSeconds: 60", "hostNetwork: true"),
    (CLUSTER, "no-limit", "emptyDir: {sizeLimit: 50Gi}", "emptyDir: {}"),
    (CLUSTER, "no-volume", "{name: shm, mountPath", "{name: memory, mountPath"),
    (CLUSTER, "no-probe", "livenessProbe: &alive", "startupProbe: &alive"),
    (CLUSTER, "api-token", "automountServiceAccountToken: false", "automountServiceAccountToken: true"),
    (CLUSTER, "placement", "nodeSelector: {maskray.example.com/pool: head}", "nodeSelector: {}"),
    (CLUSTER, "placement", "key: nvidia.com/gpu", "key: gpu"),
    (CLUSTER, "placement", "maskray:0.1.0-cuda", "maskray:0.1.0-cpu"),
    (CLUSTER, "restart", "restartPolicy: Never", "restartPolicy: Always"),
    (CLUSTER, "replicas", "minReplicas: 1", "minReplicas: 9"),
    (CLUSTER, "no-queue", "kueue.x-k8s.io/queue-name: maskray", "kueue.x-k8s.io/queue: maskray"),
    (JOB, "no-shutdown", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
    (JOB, "no-deadline", "activeDeadlineSeconds: 259200", "# none"),
    (JOB, "no-retry", "backoffLimit: 3", "backoffLimit: 0"),
    (JOB, "head-works", "entrypointNumCpus: 1", "entrypointNumCpus: 0"),
    (JOB, "plain-secret", "--set cluster.wait_seconds=1800", "--token=abc"),
    (JOB, "plain-secret", 'RAY_JOB_STOP_WAIT_TIME_S: "60"', 'MLFLOW_TRACKING_PASSWORD: "abc"'),
    (JOB, "plain-secret", "http://mlflow.mlflow", "http://trainer:abc@mlflow.mlflow"),
    (JOB, "wrong-value", 'RAY_JOB_STOP_WAIT_TIME_S: "60"', "RAY_JOB_STOP_WAIT_TIME_S: 60"),
    (JOB, "wrong-value", "K8sJobMode", "K8SJobMode"),
    (JOB, "no-limit", "limits: {cpu: 500m, memory: 1Gi}", "limits: {}"),
    (JOB, "open-auth", "mode: token", "mode: disabled"),
    # --------------------------------------------------------------------------------------------------- network, state
    (NETWORK, "open-world", OUR_PODS, "- ipBlock: {cidr: 0.0.0.0/0}"),
    (NETWORK, "open-port", "  ingress:\n", "  ingress:\n    - from: []\n"),
    (NETWORK, "open-world", ALL_PRIVATE, ""),
    (NETWORK, "unknown-field", "podSelector:\n    matchLabels", "podSelectors:\n    matchLabels"),
    (VALKEY, "no-match", "matchLabels: {app: valkey}\n  template", "matchLabels: {app: redis}\n  template"),
    (VALKEY, "open-port", "type: ClusterIP", "type: NodePort"),
    (VALKEY, "no-port", "tcpSocket: {port: redis}", "tcpSocket: {port: valkey}"),
    (VALKEY, "plain-secret", "kind: Service\n", "kind: Secret\n"),
    # ---------------------------------------------------------------------------------------------------------- MLflow
    (SERVER, "open-auth", "            - --app-name=basic-auth\n", ""),
    (SERVER, "open-hosts", "--cors-allowed-origins=https://mlflow.example.com", "--cors-allowed-origins=*"),
    (SERVER, "open-hosts", "--workers=4", "--disable-security-middleware"),
    (SERVER, "store", "postgresql+psycopg2://mlflow@postgres:5432/mlflow", "sqlite:////data/mlflow.db"),
    (SERVER, "plain-secret", "postgresql+psycopg2://mlflow@postgres", "postgresql+psycopg2://mlflow:mlflow@postgres"),
    (SERVER, "store", "postgresql+psycopg2://", "postgresql://"),
    (SERVER, "store", "s3://example-bucket/mlflow", "/mlflow/artifacts"),
    (SERVER, "privilege", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    (SERVER, "no-port", "path: /health, port: http}", "path: /health, port: web}"),
    (SERVER, "open-port", "type: ClusterIP", "type: LoadBalancer"),
    (POSTGRES, "root", "runAsUser: 999", "runAsUser: 0"),
    (POSTGRES, "image-tag", "postgres:17.6-bookworm", "postgres"),
    (ACCOUNTS, "open-auth", "default_permission = READ", "default_permission = MANAGE"),
    (ACCOUNTS, "plain-secret", "admin_username = admin", "admin_username = admin\nadmin_password = password1234"),
    (ACCOUNTS, "plain-secret", "mlflow@postgres", "mlflow:mlflow@postgres"),
    (ACCOUNTS, "store", "postgresql+psycopg2://mlflow@postgres:5432/mlflow", "sqlite:///basic_auth.db"),
    (ACCOUNTS, "unknown-field", "default_permission", "default_permissions"),
    (COMPOSE, "plain-secret", f"PGPASSWORD: {DATABASE_PASSWORD}", "PGPASSWORD: mlflow"),
    (COMPOSE, "default", DATABASE_PASSWORD, "${POSTGRES_PASSWORD:-mlflow}"),
    (COMPOSE, "default", "${AWS_REGION:?the region of the bucket}", "${AWS_REGION}"),
    (COMPOSE, "open-auth", "      - --app-name=basic-auth\n", ""),
    (COMPOSE, "open-hosts", ALLOWED_HOSTS, "*"),
    (COMPOSE, "open-port", f"{BIND}:5000:5000", '"5000:5000"'),
    (COMPOSE, "root", 'user: "1000:1000"', 'user: "0:0"'),
    (COMPOSE, "privilege", "cap_drop: [ALL]", "privileged: true"),
    (COMPOSE, "no-limit", "mem_limit: 4g", "# none"),
    (COMPOSE, "no-disk", "      - passing:/tmp", "      - passing:/var/tmp"),
    (COMPOSE, "image-tag", "maskray-mlflow:3.17.2", "maskray-mlflow:latest"),
    (COMPOSE, "host", "postgres:/var/lib/postgresql/data", "/srv/postgres:/var/lib/postgresql/data"),
    (COMPOSE, "unknown-field", "healthcheck:", "health_check:"),
    (COMPOSE, "wrong-value", "cpus: 2", 'cpus: "two"'),
    # ------------------------------------------------------------------------------------------------------------- AWS
    (AWS, "unknown-field", "idle_timeout_minutes: 10", "idle_timeout: 10"),
    (AWS, "wrong-value", "max_workers: 12", 'max_workers: "12"'),
    (AWS, "wrong-value", "max_workers: 12", "max_workers: 0"),
    (AWS, "wrong-value", "head_node_type: head", "head_node_type: main"),
    (AWS, "unknown-field", "InstanceType: m7i.xlarge", "InstanceTypes: m7i.xlarge"),
    (AWS, "wrong-value", "VolumeSize: 200", 'VolumeSize: "200"'),
    (AWS, "open-world", "SecurityGroupIds: [sg-0123456789abcdef0]", ""),
    (AWS, "open-world", "use_internal_ips: true", f"use_internal_ips: true\n{OPEN_GROUP}"),
    (AWS, "open-port", "use_internal_ips: true", "use_internal_ips: false"),
    (AWS, "open-port", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    (AWS, "open-auth", "    - --env=RAY_AUTH_MODE=token\n", "    - --env=RAY_AUTH_MODE=disabled\n"),
    (AWS, "plain-secret", TOKEN_PATH, "--env=RAY_AUTH_TOKEN=abc"),
    (AWS, "privilege", "IamInstanceProfile: {Name: maskray-head}", ""),
    (AWS, "privilege", "IamInstanceProfile: {Name: maskray-worker}", "IamInstanceProfile: {Name: maskray-head}"),
    (AWS, "privilege", "HttpTokens: required", "HttpTokens: optional"),
    (AWS, "privilege", "Encrypted: true", "Encrypted: false"),
    (AWS, "head-works", "resources: {CPU: 0}", "resources: {CPU: 4}"),
    (AWS, "head-works", " --num-cpus=0", ""),
    (AWS, "head-lost", "KeyName: maskray", "InstanceMarketOptions: {MarketType: spot}"),
    (AWS, "image-tag", "maskray:0.1.0-cuda", "maskray"),
    (AWS, "no-shm", "  run_options:", "  disable_shm_size_detection: true\n  run_options:"),
    (AWS, "unpinned", "\nsetup_commands: []\n", "\n"),  # Ray's own default comes in its place
    # ---------------------------------------------------------------------------------------------------------- images
    (IMAGE, "image-tag", "python:3.11.14-slim-bookworm", "python:latest"),
    (IMAGE, "image-tag", "python:3.11.14-slim-bookworm", "python"),
    (IMAGE, "root", "USER 1000:1000\n", ""),
    (IMAGE, "root", "USER 1000:1000", "USER maskray"),
    (IMAGE, "root", "USER 1000:1000", "USER 0"),
    (IMAGE, "plain-secret", "PYTHONUNBUFFERED=1", "AWS_SECRET_ACCESS_KEY=abc"),
    (IMAGE, "plain-secret", "ARG TORCH_INDEX=", "ARG INDEX_PASSWORD\nARG TORCH_INDEX="),
    (IMAGE, "unpinned", " --constraint constraints.txt hatchling", " hatchling"),
    (IMAGE, "unpinned", "RUN groupadd", "RUN curl -sSL https://example.com/install | bash\nRUN groupadd"),
    (IMAGE, "too-much", "COPY configs configs", "COPY . ."),
    (IMAGE, "too-much", " --no-install-recommends", ""),
    (IMAGE, "unknown-field", "WORKDIR /src", "WORKDIRS /src"),
    (IMAGE, "no-probe", "HEALTHCHECK NONE\n", ""),
    (MLFLOW_IMAGE, "no-probe", "HEALTHCHECK --interval", "LABEL interval"),
    (MLFLOW_IMAGE, "root", "USER 1000:1000\n", "USER root\n"),
    # ------------------------------------------------------------------------------------------------------ monitoring
    (PROMETHEUS, "unknown-field", "relabel_configs", "relabel_config"),
    (PROMETHEUS, "wrong-value", "scrape_interval: 15s", "scrape_interval: 15"),
    (PROMETHEUS, "no-match", DISCOVERED, ""),
    (ALERTS, "no-metric", "ray_maskray_step[20m]", "ray_maskray_steps[20m]"),
    (ALERTS, "no-metric", 'Location="SPILLED"', 'location="SPILLED"'),
    (ALERTS, "young", "ray_maskray_step offset 20m", "ray_maskray_step offset 10m"),
    (ALERTS, "wrong-value", "changes(ray_maskray_step[20m]))", "changes(ray_maskray_step[20m])"),
    (DASHBOARD, "no-metric", "ray_maskray_mfu", "maskray_mfu"),
    (DASHBOARD, "wrong-value", '"uid": "${datasource}"', '"uid": "P1809F7CD0C75ACF3"'),
    (DASHBOARD, "wrong-value", '"x": 8', '"x": 7'),
    (DASHBOARD, "unknown-field", '"legendFormat"', '"legend"'),
]  # fmt: skip


@pytest.mark.parametrize("path", manifests(), ids=lambda p: p.relative_to(INFRA).as_posix())
def test_what_ships_is_clean(path: Path):
    assert [str(finding) for finding in check(path.relative_to(INFRA).as_posix(), path.read_text())] == []


@pytest.mark.parametrize(("name", "rule", "there", "planted"), PLANTED)
def test_a_planted_mistake_is_named(name: str, rule: str, there: str, planted: str):
    text = (INFRA / name).read_text()
    assert there in text, "the file has changed: plant it elsewhere"
    found = check(name, text.replace(there, planted, 1))
    assert rule in {finding.rule for finding in found}, [str(finding) for finding in found]
    assert all(finding.where and finding.says for finding in found)
