"""Which warnings of Ray Data reach the user, and what errors say."""

import logging
from pathlib import Path

import pytest

from rayfuse.runtime.connect import ClusterError, _join, _quiet_ray_data, describe_error

OPERATORS = "ray.data._internal.execution.operators.map_operator"


def test_a_gpu_actor_causes_no_warning_and_other_warnings_stay():
    from ray.data._internal.execution.operators.map_operator import _canonicalize_ray_remote_args

    _quiet_ray_data()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(OPERATORS)
    logger.addHandler(handler)
    try:
        _canonicalize_ray_remote_args({"num_cpus": 1, "num_gpus": 1})
        assert messages == []
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert messages == ["something else"]


def test_the_error_of_a_task_prints_no_traceback_and_other_errors_stay(capsys):
    _quiet_ray_data()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    executor = logging.getLogger("ray.data._internal.execution.streaming_executor_state")
    exceptions = logging.getLogger("ray.data.exceptions")
    for logger in (executor, exceptions):
        logger.addHandler(handler)
    try:
        executor.error('An exception was raised from a task of operator "X".', exc_info=OSError())
        exceptions.error("Full stack trace:", exc_info=OSError())
        executor.error("something else")
    finally:
        for logger in (executor, exceptions):
            logger.removeHandler(handler)
    assert messages == ["something else"]


def test_no_advice_on_the_memory_of_our_own_calls_is_printed():
    import ray.data

    _quiet_ray_data()
    assert ray.data.DataContext.get_current().issue_detectors_config.detectors == []


def test_an_error_is_described_without_the_advice_of_ray_data():
    from ray.data._internal.util import iterate_with_retry

    def fail():
        raise ValueError("capture.top_k is 9\nuse 8")

    with pytest.raises(ValueError, match="DataContext") as raised:
        list(iterate_with_retry(fail, "apply UDF transform", max_attempts=1))
    assert describe_error(raised.value) == "capture.top_k is 9\nuse 8"


def test_the_error_of_a_full_disk_has_its_remedy():
    with pytest.raises(OSError) as raised, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert describe_error(raised.value).endswith(
        "No space left on device; free space there, then resume"
    )
    with pytest.raises(OSError) as raised:
        Path("/dev/null/x").read_bytes()
    assert describe_error(raised.value) == str(raised.value)


def test_a_cluster_of_other_versions_is_named_with_both():
    from ray._private.utils import check_version_info

    def join(**_: object) -> None:
        check_version_info({"ray_version": "2.1.0", "python_version": "3.10.4"}, "10.0.0.2:1")

    with pytest.raises(ClusterError) as raised:
        _join(join, "auto", {})
    message = str(raised.value)
    assert "RAY_ADDRESS is 'auto', a cluster with other versions (" in message
    assert "started with: Ray: 2.1.0 Python: 3.10.4 This process on 10.0.0.2:1" in message
    assert message.endswith("or run the command there with `ray job submit`")


def test_the_warning_of_many_worker_processes_is_dropped_and_other_messages_stay(capsys):
    from ray._private import worker

    _quiet_ray_data()
    _quiet_ray_data()
    message = {"pid": "raylet", "is_err": False}
    warning = "WARNING: 14 PYTHON worker processes have been started on node: x with address: y."
    worker.print_to_stdstream(message | {"lines": [warning]}, ignore_prefix=False)
    assert capsys.readouterr().out == ""
    worker.print_to_stdstream(message | {"lines": ["a disk is full"]}, ignore_prefix=False)
    assert "a disk is full" in capsys.readouterr().out
