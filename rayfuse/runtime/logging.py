"""What workers write to their logs: one line an event, `key=value`, for people and machines."""

import logging

_LOGGER = logging.getLogger("rayfuse.events")


def log_event(event: str, **fields: object) -> None:
    """Write an event to this process' log: run, stage, source, shard and whatever else is known."""
    if _LOGGER.isEnabledFor(logging.INFO):
        _LOGGER.info(" ".join([event, *(f"{name}={value}" for name, value in fields.items())]))


def set_up_worker_logs() -> None:
    """Let events into the log of a Ray worker, which the dashboard shows; Ray calls it by name."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s rayfuse %(message)s"))
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
