"""Failures are the same when the same line raised the same error, whatever the numbers and the way there."""

from heliostat.runtime.failures import commonest, grouped, kind_of_failure, told

TRACEBACK = """\
RuntimeError: mat1 and mat2 cannot be multiplied ({rows}x8 and 16x3) of <Tensor at {address}>
  File "/home/me/task.py", line {caller}, in build_model
    net = block(width)
  File "/home/me/task.py", line {line}, in block
    return first @ second
"""


def reason(rows=4, address="0x7f3a80", caller=12, line=30):
    return TRACEBACK.format(rows=rows, address=address, caller=caller, line=line)


def test_the_same_mistake_with_other_numbers_and_on_another_way_is_one_kind():
    assert kind_of_failure(reason()) == kind_of_failure(reason(rows=8, address="0x55c0ff", caller=14))
    died = "worker {}: its process was killed or crashed: The actor died, ID: {}"
    assert kind_of_failure(died.format(0, "af16349d57175")) != kind_of_failure(reason())
    assert kind_of_failure(died.format(0, "af16349d5717595d91")) == kind_of_failure(
        died.format(1, "12ee27817cea60096d")
    )


def test_another_line_or_another_text_is_another_kind():
    assert kind_of_failure(reason()) != kind_of_failure(reason(line=31))
    assert kind_of_failure("val_loss is not a number") != kind_of_failure("val_f1 is not a number")


def test_the_commonest_comes_first_as_its_first_trial_told_it():
    told = commonest(["batch_size: -1", reason(rows=1), reason(rows=2), "batch_size: -2", reason(rows=3)])
    assert told == f"3 of 5: {reason(rows=1)}\n\n2 of 5: batch_size: -1"


def test_a_line_says_how_many_trials_failed_and_for_each_kind_which_was_the_first_and_where_it_was_raised():
    failed = {"0001": "batch_size: -1", "0002": reason(rows=1), "0004": reason(rows=2), "0007": reason(rows=3)}
    text, _, _ = reason(rows=1).partition("\n")
    groups = grouped(failed)
    assert [(group.count, group.first) for group in groups] == [(3, "0002"), (1, "0001")]
    line = f"4 of 10 trials failed: 3 like 0002: {text} (task.py:30); 0001: batch_size: -1"
    assert told(groups, of=10) == line


def test_the_place_of_a_failure_is_the_last_line_of_the_users_own_code():
    library = reason() + '  File "/venv/site-packages/torch/nn/functional.py", line 7, in linear\n'
    (group,) = grouped({"0001": library})
    assert group.line.endswith("(task.py:30)")
