"""Nodes of a cluster that come and go, the latter by SIGKILL, while workers train on them."""

import pytest

EPOCHS = 120
"""Half a second each, until the test is in a hurry."""


@pytest.fixture(scope="module")
def nodes(cluster_of_nodes, tmp_path_factory):
    """One head where the driver runs, and two nodes with a seat for one worker each."""
    cluster = cluster_of_nodes(tmp_path_factory.mktemp("nodes"))
    cluster.add()
    cluster.add()
    yield cluster
    cluster.end()


@pytest.fixture
def training(watched, nodes):
    """One on the cluster, each of its workers on a seat."""
    training = watched(nodes.environment)

    def start(*, resources, **stage) -> None:
        resources["custom_resources"] = {"seat": 1}
        config = {"epochs": EPOCHS, "strategy": "ddp"}
        begin("--address", nodes.address, config=config, resources=resources, **stage)

    begin, training.start = training.start, start
    return training


def steps(rows) -> list[int]:
    return [step for step, _ in rows]


@pytest.mark.slow
def test_an_elastic_training_shrinks_when_a_node_leaves_and_grows_when_one_comes(training, nodes, tracked, details):
    training.start(resources={"workers": {"min": 1, "max": 2}})
    training.waits_for(lambda: training.epoch() >= 2, "two epochs")
    assert [worker.size for worker in training.workers()] == [2, 2]

    nodes.kill(training.workers()[0].node)
    training.waits_for(lambda: len(training.workers()) == 3, "one worker goes on")
    assert training.workers()[2].size == 1
    training.goes_on()

    nodes.add()
    training.waits_for(lambda: len(training.workers()) == 5, "two workers go on")
    assert [worker.size for worker in training.workers()[3:]] == [2, 2]
    training.goes_on()

    printed, _ = training.finish()
    workers = tracked(printed, "train", "workers")
    assert steps(workers) == list(range(1, EPOCHS + 1))
    sizes = [size for _, size in workers]
    assert [size for n, size in enumerate(sizes) if n == 0 or size != sizes[n - 1]] == [2, 1, 2]
    assert len(details(printed)["history"]) == EPOCHS


@pytest.mark.slow
def test_a_training_whose_node_was_lost_goes_on_on_another_as_one_of_its_retries(training, nodes, tracked, details):
    training.start(resources={"workers": 2}, retries=1)
    training.waits_for(lambda: training.epoch() >= 2, "two epochs")
    replacement, lost, kept = nodes.add(), training.workers()[0].node, training.history()
    nodes.kill(lost)
    training.waits_for(lambda: len(training.workers()) == 4, "two more began")
    assert {worker.node for worker in training.workers()[2:]} == {replacement, training.workers()[1].node}
    training.goes_on()

    printed, said = training.finish()
    history = details(printed)["history"]
    assert history[: len(kept)] == kept  # to the microsecond of each epoch's duration
    assert len(history) == EPOCHS
    assert steps(tracked(printed, "train", "val_loss")) == [*range(1, EPOCHS + 1), EPOCHS + 1]
    assert said.count("training goes on from its last checkpoint") == 1
