"""Failures are the same when the same line raised the same error, whatever the numbers and the way there."""

from heliostat.runtime.failures import commonest, kind_of_failure

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
