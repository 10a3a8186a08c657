"""The Trainer and its data; one file a method."""

from dynamoe_lab.training.run import train
from dynamoe_lab.training.trainer import TrainingDiverged

__all__ = ["TrainingDiverged", "train"]
