"""What a user decides with before anything is exported: chips, memory arithmetic, roofline.

Needs numpy and nothing else of the toolkit.
"""

from cpm_edge.benchmarks.plan.catalog import chip, chips
from cpm_edge.benchmarks.plan.chip import Chip, Device, Number, Prefill, Roofline
from cpm_edge.benchmarks.plan.detect import detect
from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.plan import Change, Plan, Question, plan

__all__ = [
    "Change", "Chip", "Device", "Number", "Plan", "PlanError", "Prefill", "Question", "Roofline",
    "chip", "chips", "detect", "plan",
]  # fmt: skip
