"""Everything that touches Ray."""

from heliostat.runtime.environment import apply

apply()
