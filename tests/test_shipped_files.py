"""Every file that is shipped to be used as it is passes the check that its user would run."""

from pathlib import Path

import pytest

from heliostat import load_pipeline, plan
from heliostat.runtime.cluster_files import validate

ROOT = Path(__file__).parents[1]
PIPELINES = sorted((ROOT / "pipelines").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("file", PIPELINES, ids=lambda path: path.name)
def test_pipelines_plan(file: Path, tmp_path: Path) -> None:
    planned = plan(load_pipeline(file, settings=[f"storage={tmp_path}"]))
    assert all(node.status == "run" for node in planned.nodes)


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda path: path.name)
def test_cluster_files_validate(file: Path) -> None:
    summary = validate(file)
    assert summary.token_auth, "a cluster takes jobs from those with its token only"


def test_nothing_is_missing() -> None:
    assert [p.name for p in PIPELINES] == ["mnist.yaml", "mnist_int8.yaml"]
    assert {p.name for p in CLUSTERS} == {
        "aws.yaml",
        "azure.yaml",
        "gcp.yaml",
        "kuberay.yaml",
        "local.yaml",
        "on-premise.yaml",
    }
