"""Write events to the logs of Ray workers: one `key=value` line per event."""

import logging

from rayfuse.config.addresses import mask_secrets
from rayfuse.config.text import show_on_one_line

_LOGGER = logging.getLogger("rayfuse.events")


def log_event(event: str, **fields: object) -> None:
    """Log an event with its fields, such as run, stage, source and shard."""
    if _LOGGER.isEnabledFor(logging.INFO):
        parts = [event, *(f"{name}={value}" for name, value in fields.items())]
        _LOGGER.info(show_on_one_line(mask_secrets(" ".join(parts))))


def set_up_worker_logs() -> None:
    """Enable events in the log of a Ray worker, which the dashboard shows."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s rayfuse %(message)s"))
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
