"""The switches of Ray that are environment variables: each value with the reason for it.

They are read when Ray is imported or when its processes start, so the package applies them before any of its modules
can import Ray. What the user has set already stays.
"""

import os

SWITCHES: dict[str, tuple[str, str]] = {
    "RAY_USAGE_STATS_ENABLED": ("0", "nothing is sent anywhere"),
    "RAY_ENABLE_AUTO_CONNECT": ("0", "a thread that outlives its session does not start another Ray"),
    "RAY_DEDUP_LOGS": ("0", "the log file keeps every line that a worker prints"),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": ("0", "the behaviour to come, without its FutureWarning"),
    "RAY_enable_metrics_collection": (
        "0",
        "nobody scrapes an embedded Ray; its exporter only logs that it cannot connect",
    ),
    "RAY_task_oom_retries": ("1", "the default is to start what runs out of memory again for ever, with any `retries`"),
    "RAY_CHDIR_TO_TRIAL_DIR": ("0", "relative paths in the user's code mean the same everywhere"),
    "RAY_AIR_NEW_OUTPUT": ("0", "Tune's and Train's own tables would fight with the live view"),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": (
        "0.1",
        "the controller notices the end of training by polling; the default is 2 s",
    ),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": ("0", "one process less to start; a lost node is noticed without it"),
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": ("0", "the driver's loggers are the session's to set"),
    "RAY_TRAIN_METRICS_ENABLED": ("0", "Prometheus gauges that nobody reads"),
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": ("1", "JSON, CSV and TensorBoard files per trial; the journal is the record"),
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": ("1", "a failed trial reports its reason instead of metrics"),
    "TUNE_GLOBAL_CHECKPOINT_S": ("1e9", "no snapshots of the experiment; the journal is what a search resumes from"),
    "TUNE_PRINT_ALL_TRIAL_ERRORS": ("0", "a failed trial is a state, reported once"),
    "TUNE_DISABLE_SIGINT_HANDLER": ("1", "Ctrl-C belongs to the runner"),
}


def apply() -> None:
    for name, (value, _) in SWITCHES.items():
        os.environ.setdefault(name, value)
