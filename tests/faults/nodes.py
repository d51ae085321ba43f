"""A process with a Ray of several nodes, all on this machine: it tells its address, then does what it is told.

`add` starts a node of one CPU and one `seat`, and `kill ID` ends one with SIGKILL; both tell its id. The head has two
CPUs and no seat.
"""

import sys

from ray.cluster_utils import Cluster

SOON_MISSED = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": SOON_MISSED})
    print(cluster.address, flush=True)
    try:
        for line in sys.stdin:
            match line.split():
                case ["add"]:
                    node = cluster.add_node(num_cpus=1, resources={"seat": 1})
                case ["kill", name]:
                    (node,) = [node for node in cluster.worker_nodes if node.node_id == name]
                    cluster.remove_node(node, allow_graceful=False)
            print(node.node_id, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
