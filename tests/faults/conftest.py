"""What a run that was disturbed has in MLflow."""

import json

import pytest


@pytest.fixture(scope="session")
def tracked():
    """The rows (step, value) of a metric of the run called `name`, in order, given what `run --json` printed."""
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    def rows(printed: str, name: str, metric: str) -> list[tuple[int, float]]:
        tracking = json.loads(printed)["tracking"]
        client = mlflow.MlflowClient(tracking["uri"])
        experiment = client.get_experiment_by_name(tracking["experiment"])
        (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return sorted((row.step, row.value) for row in client.get_metric_history(run.info.run_id, metric))

    return rows
