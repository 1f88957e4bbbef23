"""How much of a node's memory an actor or a task reserves, by Ray's resource `memory`.

Ray gives it to each node that is up: 70 % of its memory, less what is used. A node type of an
autoscaler may lack it (Google Cloud; a file that does not list it): Ray would then wait forever for
a node with it, so nothing is reserved.
"""

from collections.abc import Iterator, Sequence

from rayfuse.config.base import UserError
from rayfuse.runtime.autoscaler import NodeKind

MEMORY = "memory"

GIB = 2**30


def find_room(
    needs: dict[str, float], live: Sequence[NodeKind], addable: Sequence[NodeKind] | None
) -> float | None:
    """Find the most memory of a node that has all else that an actor needs.

    Args:
        needs: The other resources of the actor.
        live: The nodes that are up.
        addable: The node types that the autoscaler may add; None if they are unknown.

    Returns:
        None where no such node is known, or one of the types has no such resource.
    """
    if addable is None:
        return None
    amounts = list(_list_amounts(needs, (*live, *addable)))
    return None if not amounts or 0.0 in amounts else max(amounts)


def _list_amounts(needs: dict[str, float], kinds: Sequence[NodeKind]) -> Iterator[float]:
    for kind in kinds:
        fits = all(kind.resources.get(name, 0.0) >= amount for name, amount in needs.items())
        if fits and kind.max_count:
            yield kind.resources.get(MEMORY, 0.0)


class NoRoomError(UserError):
    """No node has the memory that an actor needs."""


def check_room(num_bytes: float, room: float, setting: str) -> None:
    """Check that a node can reserve the memory of an actor.

    Args:
        num_bytes: Of the actor.
        room: As `find_room` finds it.
        setting: The setting that gives the actor's memory, such as `sources.a.memory_gib`.

    Raises:
        NoRoomError: No node can.
    """
    if num_bytes > room:
        raise NoRoomError(
            f"{setting} is {num_bytes / GIB:.1f}, the host memory of one actor in GiB, more than "
            f"the {room / GIB:.1f} that the largest fitting node can reserve; add a larger node, "
            f"lower capture.chunk_positions or batch_tokens, or set {setting} if it needs less "
            "(0 reserves none)"
        )
