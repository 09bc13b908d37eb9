"""What a user decides with before anything is exported: chips, memory arithmetic, roofline.

Needs numpy and nothing else of the toolkit.
"""

from cpm_edge.benchmarks.plan.catalog import chip, chips
from cpm_edge.benchmarks.plan.chip import Chip, Device, Number, Prefill, Roofline
from cpm_edge.benchmarks.plan.errors import PlanError

__all__ = ["Chip", "Device", "Number", "PlanError", "Prefill", "Roofline", "chip", "chips"]
