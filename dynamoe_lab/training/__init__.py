"""The Trainer and its data; one file a method."""

from dynamoe_lab.training.dynamoe import train
from dynamoe_lab.training.trainer import TrainingDiverged

__all__ = ["TrainingDiverged", "train"]
