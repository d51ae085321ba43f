"""int8 with one scale over boxes in pixels and scores between 0 and 1."""

import json
from pathlib import Path

from mlflow import MlflowClient


def test_a_model_that_int8_ruins_is_reported_with_a_warning_and_max_drop_keeps_it(case_file, heliostat):
    process = heliostat("run", case_file("mixed_range/pipeline.yaml"), "--json")
    document = json.loads(process.stdout)
    nodes = {node["name"]: node for node in document["nodes"]}
    records = {name: json.loads(Path(node["path"], "record.json").read_text()) for name, node in nodes.items()}

    (warning,) = records["static"]["details"]["warnings"]
    assert "a large fall from train" in warning
    assert "val_accuracy 0.98 -> 0.4" in warning
    assert "/Concat" in warning
    assert warning in process.stderr
    tracked = MlflowClient(document["tracking"]["uri"]).get_run(records["static"]["tracking"]["run_id"])
    assert tracked.data.tags["heliostat.warnings"] == warning

    assert nodes["guarded"]["metrics"]["val_accuracy"] >= 0.97
    details = records["guarded"]["details"]
    assert "warnings" not in details
    assert details["chosen"] == "in float: /Concat"
    assert [row["tried"] for row in details["tried"]][:2] == ["as the file says", "in float: /Concat"]
    assert details["tried"][0]["val_accuracy_drop"] > 0.5
