"""What a run is told where machines do not see its folder."""

import pytest

from heliostat.errors import SpecError
from heliostat.runner import load_pipeline, plan
from heliostat.runtime.shared_disk import check_answers

SEEN, BLIND = None, ""


@pytest.fixture
def check(toy):
    """Says no, or nothing, to answers of nodes."""

    def check(*answers, storage=None, **stage):
        document = {**toy.document, **({"storage": storage} if storage else {})}
        document["stages"] = document["stages"][:1] if not stage else [*document["stages"][:2], stage]
        planned = plan(load_pipeline(toy.write(document)))
        addresses = [f"10.0.0.{number}" for number in range(len(answers))]
        check_answers(planned, list(zip(addresses, answers, strict=True)), num_nodes=len(answers) + 1)

    return check


def test_a_folder_must_be_seen_by_all(check, toy):
    check(SEEN, SEEN)
    with pytest.raises(SpecError, match=f"1 of 3 nodes do not see this machine's {toy.folder}.*: 10.0.0.1.*s3://"):
        check(SEEN, BLIND)


def test_a_bucket_that_every_machine_can_use_will_do(check, s3):
    check(SEEN, BLIND, storage="s3://models/team")
    with pytest.raises(SpecError, match=r"and 10.0.0.1 cannot use the bucket instead: no answer"):
        check(BLIND, "no answer", storage="s3://models/team")


def test_a_stage_whose_processes_share_files_in_another_way_is_refused(check, s3):
    small = {"name": "small", "uses": "compress", "inputs": {"model": "train"}}
    small["config"] = {"max_drop": {"val_accuracy": 0.5}}
    with pytest.raises(SpecError, match=r"stage 'small' \(compress\) leave for each other does not go by way"):
        check(BLIND, storage="s3://models/team", **small)
