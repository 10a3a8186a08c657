"""Dense -> dynamic: calibration statistics, importance, reordering; one file a method."""

from dynamoe_lab.conversion.dynamoe import convert, reorder
from dynamoe_lab.conversion.statistics import FORMULAS, calibrate, importance, importance_table

__all__ = ["FORMULAS", "calibrate", "convert", "importance", "importance_table", "reorder"]
