"""The placement groups of trainings. Ray keeps one until the driver's job ends, also when the process dies that asked
for it, unless that was a detached actor; so whoever is left has to find and remove it.
"""

import hashlib
import uuid
from fnmatch import fnmatchcase
from pathlib import Path

from ray import PlacementGroupID
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup


def name_for(folder: Path) -> str:
    """A new name for the group of a training that works in the folder."""
    return f"{_name_of(folder)}-{uuid.uuid4().hex}"


def free(folder: Path) -> None:
    """Remove the groups of trainings whose process has died, or is not waited for: in the folder, or, where its name
    is `*`, in any beside it.
    """
    for identity, group in placement_group_table().items():
        if fnmatchcase(group["name"], f"{_name_of(folder)}-*") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(identity)))


def _name_of(folder: Path) -> str:
    where = hashlib.sha256(str(folder.parent).encode()).hexdigest()[:16]
    return f"heliostat-{where}-{folder.name}"
