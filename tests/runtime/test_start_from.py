import pytest

from heliostat.core.spec import Resources

pytestmark = pytest.mark.usefixtures("ray_session")

GIVEN = [{"optimizer.lr": 0.05, "model_args.width": 8}, {"optimizer.lr": 0.002, "model_args.width": 2}]


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "optuna_tpe"])
def test_a_search_tries_what_it_is_given_first_and_goes_on_the_same_after_an_interruption(run, tmp_path, algorithm):
    settings = {"algorithm": algorithm, "trials": 5, "start_from": GIVEN}
    one_at_a_time = Resources(max_concurrent_trials=1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "torn").mkdir()
    whole = run(**settings, folder=tmp_path / "whole", resources=one_at_a_time)
    assert [dict(trial.params) for trial in whole.trials[:2]] == GIVEN
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    ends = [i for i, line in enumerate(journal) if b'"ended"' in line]
    (tmp_path / "torn" / "journal.jsonl").write_bytes(b"".join(journal[: ends[2] + 1]))
    resumed = run(**settings, folder=tmp_path / "torn", resources=one_at_a_time)
    assert [(t.id, t.params, t.status) for t in resumed.trials] == [(t.id, t.params, t.status) for t in whole.trials]
