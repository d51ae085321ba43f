import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from heliostat.errors import HeliostatError, SpecError
from heliostat.runtime import cluster_files
from heliostat.runtime.cluster_files import validate

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "cluster").glob("*.yaml"))


@pytest.fixture
def variant(tmp_path):
    """Write a shipped file with some of its text replaced, and return where it is."""

    def write(name, *replacements):
        text = (REPOSITORY / "cluster" / name).read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for `ray` and `kubectl` that write down how they are called."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for tool in ("ray", "kubectl", "python"):
        (folder / tool).write_text(f'#!/bin/sh\necho {tool} "$@" mode=$RAY_AUTH_MODE >> {calls}\n')
        (folder / tool).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return lambda: calls.read_text().splitlines()


def test_the_six_cluster_files_are_there():
    names = {path.name for path in SHIPPED}
    assert names == {"local.yaml", "on-premise.yaml", "aws.yaml", "gcp.yaml", "azure.yaml", "kuberay.yaml"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_passes_rays_own_checks_with_tokens_on(path):
    summary = validate(path)
    assert summary.token_auth
    assert 0 <= summary.min_workers <= summary.max_workers
    assert not [w for w in summary.warnings if "on the nodes" in w or "an image with" in w]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_pins_the_versions_of_the_project(path):
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    assert validate(path).versions == {"python": "3.11", **{name: pinned[name] for name in ("ray", "torch", "mlflow")}}
    text = path.read_text()
    assert set(re.findall(r"\b(\d+\.\d+\.\d+)-py3", text)) <= {pinned["ray"]}
    assert set(re.findall(r"-py(\d+)", text)) <= {"311"}
    assert f"({pinned['mlflow']})" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_says_what_it_is_for_what_to_type_and_what_it_costs(path):
    header = path.read_text().split("\n\n")[0]
    name = f"cluster/{path.name}"
    for word in ("Fill in:", "Cost:", "Storage:", "Tracking:", "Token:", "heliostat submit"):
        assert word in header
    for verb in ("validate", "up", "status", "down"):
        assert f"heliostat cluster {verb} {name}" in header


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "aws.yaml",
            "max_workers: 4 # nodes",
            "max_worker: 4 # nodes",
            "max_worker: unknown field; did you mean 'max_workers'?",
        ),
        (
            "on-premise.yaml",
            "\nmin_workers: 2",
            "\nmin_worker: 2",
            "min_worker: unknown field; did you mean 'min_workers'?",
        ),
        (
            "aws.yaml",
            "    min_workers: 0",
            "    min_worker: 0",
            "available_node_types.worker.min_worker: unknown field; did",
        ),
        ("aws.yaml", "\nmax_workers: 4", "\nmin_workers: 1\nmax_workers: 4", "min_workers: Ray ignores it here"),
        (
            "aws.yaml",
            "    min_workers: 0",
            "    min_workers: two",
            "available_node_types.worker.min_workers: 'two' is not",
        ),
        ("aws.yaml", "    min_workers: 0", "    min_workers: 9", "smaller than the sum of `min_workers`"),
        ("aws.yaml", "head_node_type: head", "head_node_type: haed", "`head_node_type` must be one of"),
        ("aws.yaml", "type: aws", "type: awss", "provider.type: unknown 'awss'; did you mean 'aws'?"),
        (
            "aws.yaml",
            "cluster_name: heliostat",
            "cluster_nam: heliostat",
            "cluster_nam: unknown field; did you mean 'cluster_name'?",
        ),
        ("aws.yaml", "cluster_name: heliostat", "", "cluster_name: missing"),
        (
            "azure.yaml",
            "  ssh_user: ubuntu",
            "  sshuser: ubuntu",
            "auth.sshuser: unknown field; did you mean 'ssh_user'?",
        ),
        (
            "gcp.yaml",
            "    resources: {CPU: 4}",
            "    resources: {CPU: many}",
            "resources.CPU: 'many' is not of type integer",
        ),
        (
            "on-premise.yaml",
            "  head_ip: <head-host>",
            "  head_ips: h",
            "provider.head_ip: missing; it is required (there is 'head_ips')",
        ),
        (
            "on-premise.yaml",
            "[<worker-1-host>, <worker-2-host>]",
            "w",
            "provider.worker_ips: 'w' is not a list of hosts",
        ),
        ("local.yaml", "  type: local", "\ttype: local", "a tab"),
        ("local.yaml", "max_workers: 0", "max_workers: 0\nmax_workers: 1", "duplicate key 'max_workers'"),
        ("kuberay.yaml", "kind: RayCluster", "kind: RayClustre", "kind: 'RayClustre' is not 'RayCluster'"),
        ("kuberay.yaml", "ray.io/v1", "ray.io/v1alpha1", "apiVersion: 'ray.io/v1alpha1' is not 'ray.io/v1'"),
        (
            "kuberay.yaml",
            "  authOptions:",
            "  authOption:",
            "spec.authOption: unknown field; did you mean 'authOptions'?",
        ),
        ("kuberay.yaml", "mode: token", "mode: tokens", "spec.authOptions.mode: 'tokens' is not one of"),
        (
            "kuberay.yaml",
            "      minReplicas: 0",
            "      minReplica: 0",
            "workerGroupSpecs[0].minReplica: unknown field; did",
        ),
        (
            "kuberay.yaml",
            "      minReplicas: 0",
            "      minReplicas: 9",
            "minReplicas 9 <= replicas 1 <= maxReplicas 4",
        ),
        ("kuberay.yaml", "  rayVersion: 2.60.0", "  rayVersion: 2.59.0", "is not of spec.rayVersion 2.59.0"),
        ("kuberay.yaml", "            name: ray-head", "", None),
        ("kuberay.yaml", '              requests: {cpu: "2", memory: 8Gi}', "", "resources.requests.cpu: missing"),
        (
            "kuberay.yaml",
            "  headGroupSpec:",
            "  headGroup:",
            "spec.headGroup: unknown field; did you mean 'headGroupSpec'?",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_place_value_and_nearest_word(variant, name, old, new, message):
    if message is None:
        old, new, message = (
            "          - name: ray-head\n            image:",
            "          - image:",
            "containers[0].name: missing",
        )
    with pytest.raises(SpecError, match=re.escape(message)) as refused:
        validate(variant(name, (old, new)))
    assert name in str(refused.value)


def test_a_file_that_is_not_there_names_one_that_is():
    with pytest.raises(SpecError, match=r"no such file; did you mean 'aws\.yaml'"):
        validate(REPOSITORY / "cluster" / "awss.yaml")


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("- a", "list, not a mapping"), ("a: [", "not YAML")])
def test_what_is_not_a_cluster_file_at_all_is_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        validate(path)


def test_a_line_number_counts_from_the_top_of_the_file_and_not_of_its_document(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("apiVersion: v1\nkind: Secret\n---\napiVersion: ray.io/v1\nkind: RayCluster\nkind: RayCluster\n")
    with pytest.raises(SpecError, match="line 6: duplicate key 'kind'; it is on line 5"):
        validate(path)


def test_what_is_to_be_filled_in_is_a_warning_and_keeps_the_cluster_from_starting(variant, tools):
    path = variant("gcp.yaml")
    assert "provider.project_id: <project-id>: still to be filled in" in validate(path).warnings
    with pytest.raises(SpecError, match=r"provider\.project_id: <project-id>: fill it in first"):
        cluster_files.up(path)


def test_other_versions_than_those_installed_are_warnings(variant):
    warnings = validate(variant("aws.yaml", ("2.60.0", "2.49.1"))).warnings
    assert "ray 2.49.1 on the nodes, 2.60.0 here" in warnings
    assert "an image with ray 2.49.1, 2.60.0 here" in warnings


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("local.yaml", "export RAY_AUTH_MODE=token; ", ""), ("kuberay.yaml", "  authOptions:\n    mode: token\n", "")],
)
def test_a_cluster_without_tokens_is_a_warning(variant, name, old, new):
    summary = validate(variant(name, (old, new)))
    assert not summary.token_auth
    assert any(w.startswith("no token authentication") for w in summary.warnings)


def test_what_ray_says_about_a_file_becomes_plain_warnings(variant):
    path = variant("on-premise.yaml", ("min_workers: 2\nmax_workers: 2", "min_workers: 2\nmax_workers: 5"))
    (warning,) = [w for w in validate(path).warnings if "max_workers" in w]
    assert "greater than the number of available worker ips (2)" in warning
    assert "\x1b" not in warning


def test_validation_leaves_the_file_and_its_folder_alone(variant):
    path = variant("aws.yaml")
    before = path.read_bytes()
    validate(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_up_status_and_down_hand_a_launcher_file_to_ray(variant, tools):
    path = variant("aws.yaml")
    assert [cluster_files.up(path), cluster_files.status(path), cluster_files.down(path)] == [0, 0, 0]
    up, status, down = tools()
    assert up.startswith(f"ray up -y {path}")
    assert status.startswith(f"ray exec {path} RAY_AUTH_MODE=token ray status")
    assert down.startswith(f"ray down -y {path}")


def test_up_status_and_down_hand_a_manifest_to_kubectl(variant, tools):
    path = variant("kuberay.yaml", ("<registry>", "images"), ("<storage-class>", "nfs"))
    assert [cluster_files.up(path), cluster_files.status(path), cluster_files.down(path)] == [0, 0, 0]
    up, status, down = tools()
    assert up.startswith(f"kubectl apply -f {path}")
    assert status.startswith("kubectl get raycluster,pods -l ray.io/cluster=heliostat")
    assert down.startswith(f"kubectl delete -f {path}")


def test_a_head_on_this_machine_is_started_here_without_ssh(variant, tools):
    path = variant("local.yaml", ("setup_commands: []\nhead_setup", "setup_commands: [ray --version]\nhead_setup"))
    assert cluster_files.up(path) == 0
    assert cluster_files.down(path) == 0
    version, start, stop = tools()
    assert version.startswith("ray --version")
    assert start.startswith("ray start --head --port=6379")
    assert start.endswith("mode=token")
    assert stop.startswith("ray stop")


def test_a_command_that_fails_ends_the_start_with_its_exit_code(variant, tools):
    path = variant("local.yaml", ("setup_commands: []\nhead_setup", "setup_commands: [exit 7]\nhead_setup"))
    assert cluster_files.up(path) == 7


def test_a_missing_tool_is_named_with_what_to_do(variant, tmp_path, monkeypatch):
    path = variant("kuberay.yaml", ("<registry>", "images"), ("<storage-class>", "nfs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HeliostatError, match="kubectl is not on the PATH: install kubectl"):
        cluster_files.up(path)


def test_paths_that_are_copied_to_the_nodes_are_looked_for_here(variant, tmp_path, monkeypatch):
    path = variant("aws.yaml")
    monkeypatch.chdir(tmp_path)
    assert any(w.startswith("file_mounts.~/heliostat-dist: ./dist is not here") for w in validate(path).warnings)
    (tmp_path / "dist").mkdir()
    assert not any("./dist" in w for w in validate(path).warnings)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_no_pipeline_result_lands_where_a_cluster_forgets_it(path):
    text = path.read_text()
    documents = list(yaml.safe_load_all(text))
    if "docker" in documents[0]:
        assert any(":/home/ray/heliostat" in option for option in documents[0]["docker"]["run_options"])
    assert "~/heliostat" in text or path.name == "local.yaml"
