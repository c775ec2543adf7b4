"""Temporary."""

from dass_exp.storage.records import PeakMemory as PeakMemory
from dass_exp.storage.records import environment as environment
