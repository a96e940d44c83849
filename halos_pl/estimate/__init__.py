"""Memory, communication and time of a training step on paper: formulas over a model's shapes and a plan of the run."""

from halos_pl.estimate.communication import Communication, communication
from halos_pl.estimate.memory import Memory, largest_rows, memory
from halos_pl.estimate.plan import Lora, Plan, PlanError
from halos_pl.estimate.shapes import Shapes, Unit, read_shapes
from halos_pl.estimate.speed import Machine, Speed, speed

__all__ = [
    "Communication",
    "Lora",
    "Machine",
    "Memory",
    "Plan",
    "PlanError",
    "Shapes",
    "Speed",
    "Unit",
    "communication",
    "largest_rows",
    "memory",
    "read_shapes",
    "speed",
]
