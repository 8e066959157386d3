"""Planted bugs in what records that no node has put may cost (see `planted`, `spoiling`)."""

from __future__ import annotations

from typing import Final

from dlmfs.sim.planted import Planted

HEARING: Final = "engine/hearing.py"

BUGS: Final[tuple[Planted, ...]] = (
    Planted(
        "unread-is-dead",
        HEARING,
        """        check_member(kv)
    except BadState as error:
        space.bad.note(kv.key, error)
""",
        """        check_member(kv)
    except BadState as error:
        space.bad.note(kv.key, error)
        return space.members.pop(node, None) is not None
""",
        100,
        "a member is believed dead because its record cannot be read (promise 1)",
        first=380,
    ),
    Planted(
        "unread-wish",
        HEARING,
        """    except BadState as error:
        space.bad.note(kv.key, error)
        return None
    space.bad.good(kv.key)
    return wish
""",
        """    except KeyError as error:
        space.bad.note(kv.key, str(error))
        return None
    space.bad.good(kv.key)
    return wish
""",
        100,
        "a wish that cannot be read costs the domain at every node (found)",
        first=280,
    ),
)
