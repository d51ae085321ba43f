"""What `heliostat show` makes of what a stage found out."""

import io

from rich.console import Console

from heliostat.report.details import detail_tables


def shown(details) -> str:
    console = Console(file=io.StringIO(), width=120)
    for table in detail_tables(details, width=console.width):
        console.print(table)
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


RUNGS = [
    {"epoch": 1, "reached": 16, "stopped": 9, "lowest_cut": 0.81234567, "highest_cut": 0.9},
    {"epoch": 4, "reached": 7, "stopped": 0, "lowest_cut": None, "highest_cut": None},
]


def test_a_list_of_rows_is_a_table_under_its_name():
    lines = cells(shown({"rungs": RUNGS}))
    assert lines[0] == ["rungs"]
    assert lines[1] == ["epoch", "reached", "stopped", "lowest_cut", "highest_cut"]
    assert lines[3:] == [["1", "16", "9", "0.8123", "0.9"], ["4", "7", "0"]]


def test_single_values_are_told_by_name_one_level_deep():
    lines = cells(shown({"algorithm": "bayesian", "objective": {"mode": "max", "deeper": {"a": 1}}, "rungs": RUNGS}))
    assert ["algorithm", "bayesian"] in lines
    assert ["objective.mode", "max"] in lines
    assert not any("deeper" in cell for line in lines for cell in line)


def test_texts_have_a_line_each():
    lines = [line.strip() for line in shown({"warnings": ["a worker died", "a checkpoint is damaged"]}).splitlines()]
    assert lines[lines.index("warnings   a worker died") + 1] == "a checkpoint is damaged"


def test_rows_may_have_mappings_and_need_not_be_alike():
    front = [{"trial": "0001", "objectives": {"val_accuracy": 0.9}}, {"trial": "0002", "why": "fast"}]
    lines = cells(shown({"front": front}))
    assert lines[1] == ["trial", "objectives.val_accuracy", "why"]
    assert lines[3:] == [["0001", "0.9"], ["0002", "fast"]]


def test_candidates_have_the_table_that_a_run_ends_with():
    metrics = {"val_loss": 0.1, "val_accuracy": 0.95, "size_mb": 1.5, "num_params": 10.0, "latency_ms": 0.25}
    row = {"model": "train", "chosen": True, "why": "the best", "speed_up": 1.0, "size_ratio": 1.0, "metrics": metrics}
    text = shown({"chosen": "train", "table": [row]})
    assert "candidates, the uncompressed baseline first" in text
    assert "0.95" in text


def test_a_record_without_details_shows_none():
    assert shown({}) == ""


def test_the_reason_of_each_layer_has_a_line_behind_its_name():
    text = shown({"pruned": {"channels_removed": {"a": 3}, "kept": {"head": "it gives the output", "b": "too many"}}})
    assert "pruned.kept" in text
    assert "head: it gives the output" in text
    assert "b: too many" in text
