"""What a user is told beside our own lines once the command is on a cluster."""

import logging

from rayfuse.runtime.connect import _quieten_ray_data

OPERATORS = "ray.data._internal.execution.operators.map_operator"


def test_an_actor_on_a_gpu_brings_no_warning_and_others_still_come():
    from ray.data._internal.execution.operators.map_operator import _canonicalize_ray_remote_args

    _quieten_ray_data()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger(OPERATORS)
    logger.addHandler(handler)
    try:
        _canonicalize_ray_remote_args({"num_cpus": 1, "num_gpus": 1})
        assert told == []
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert told == ["something else"]
