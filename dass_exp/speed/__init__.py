"""The former name of :mod:`dass_exp.benchmark`."""

import logging

from dass_exp.benchmark import __path__ as __path__

logging.getLogger(__name__).warning("dass_exp.speed is now called dass_exp.benchmark")
