"""Dense -> dynamic: calibration statistics, importance, reordering; one file a method."""

from dynamoe_lab.conversion.convert import convert
from dynamoe_lab.conversion.dynamoe import reorder
from dynamoe_lab.conversion.export import export
from dynamoe_lab.conversion.statistics import FORMULAS, calibrate, importance, importance_table

__all__ = ["FORMULAS", "calibrate", "convert", "export", "importance", "importance_table", "reorder"]
