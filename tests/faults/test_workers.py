"""`kill -9` of the workers of a training that several run together, and what they go on from."""

import os
import signal

import pytest


@pytest.mark.slow
def test_training_goes_on_from_its_last_checkpoint_after_one_worker_and_after_all_were_killed(
    training, tracked, details
):
    epochs = 100
    training.start(config={"epochs": epochs}, resources={"workers": 2}, retries=2)
    for killed in (1, 2):  # of the two that were started last
        training.goes_on()
        workers, kept = training.workers(), training.history()
        for worker in workers[-killed:]:
            os.kill(worker.pid, signal.SIGKILL)
        training.waits_for(lambda before=workers: len(training.workers()) == len(before) + 2, "two more began")
    training.goes_on()
    printed, said = training.finish()
    history = details(printed)["history"]
    assert history[: len(kept)] == kept  # to the microsecond of each epoch's duration
    assert len(history) == epochs
    assert said.count("train: warning: worker ") == len(details(printed)["warnings"]) == 2
    steps = [step for step, _ in tracked(printed, "train", "val_loss")]
    assert steps == [*range(1, epochs + 1), epochs + 1]  # the last figure is that of the model


@pytest.mark.slow
def test_a_damaged_part_of_the_newest_checkpoint_is_told_to_the_user_and_the_one_before_is_used(
    training, tracked, tracked_run, details
):
    epochs = 20
    training.start(config={"epochs": epochs, "strategy": "fsdp"}, resources={"workers": 2})
    training.waits_for(lambda: training.epoch() >= 3, "three epochs")
    training.kill()
    newest, history = training.checkpoints()[0], training.history()
    shard = newest / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)

    training.go_on()
    printed, said = training.finish()
    found = details(printed)
    assert found["history"][: len(history) - 1] == history[:-1]
    assert found["history"][len(history) - 1] != history[-1]  # trained again: it took another time
    assert len(found["history"]) == epochs
    steps = [step for step, _ in tracked(printed, "train", "val_loss")]
    assert steps == [*range(1, epochs + 1), epochs + 1]

    (warning,) = found["warnings"]
    assert warning.startswith(f"checkpoint {newest} is damaged")
    assert f"train: warning: {warning}" in said
    assert tracked_run(printed, "train")[1].data.tags["heliostat.warnings"] == warning
